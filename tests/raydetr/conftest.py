"""Fixtures for data sets and runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from drawn_shards import write_drawn_shards
from faulty_proxy import FaultyProxy
from made_coco import write_coco
from object_stores import BUCKET, CREDENTIALS, S3Server
from raydetr.config import RunConfig
from raydetr.shards.reader import Shards, open_shards
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source
from raydetr.store.folders import Folder, open_folder
from tiny_runs import tiny_config


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write 53 generated images with annotations."""
    return write_coco(tmp_path_factory.mktemp("coco"), 53)


@pytest.fixture(scope="session")
def shards(coco: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Pack the same images into four shards."""
    out = tmp_path_factory.mktemp("shards") / "made"
    write_source(coco_source(*coco), out, samples_per_shard=15)
    return open_shards(out)


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    folder = os.environ.get("RAYDETR_COCO_TINY")
    if not folder:
        pytest.skip(
            "RAYDETR_COCO_TINY is not set: it names a folder with annotations/, train2017/ and val2017/"
        )
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with `coco`, and shards in `train` (48 images) and `val` (21 images)."""
    root = tmp_path_factory.mktemp("tiny")
    write_drawn_shards(root, 48, 21, samples_per_shard=16)
    return root


@pytest.fixture
def tiny_run(tiny_data: Path, tmp_path: Path) -> RunConfig:
    """Configure the quickstart on the tiny data: 4 epochs of 6 steps, evaluated after each, one worker."""
    return tiny_config(tiny_data, tmp_path / "runs")


# --- Folders of runs ---


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3_proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Forward requests to the server; the environment has the address and the credentials."""
    proxy = FaultyProxy(s3_server.address)
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": proxy.url}).items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.close()


@pytest.fixture
def s3_url(s3_proxy: FaultyProxy) -> str:
    """Return the URL of a folder that no other test uses."""
    return f"s3://{BUCKET}/{os.urandom(6).hex()}"


@pytest.fixture(params=["disk", "s3"])
def run_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "disk":
        return tmp_path / "run"
    return open_folder(f"{request.getfixturevalue('s3_url')}/run")
