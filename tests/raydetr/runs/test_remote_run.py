"""A run from a server, with the node cache, is the same as the run from a folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from object_stores import WebServer
from raydetr.config import RunConfig, override
from raydetr.runs import run
from raydetr.runs.evaluate import evaluate_checkpoint
from raydetr.tracking import mlflow_run
from raydetr.training import checkpoint


def test_a_driver_opens_each_split_once(
    tiny_run: RunConfig, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = WebServer(tiny_data)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(run, "_execute", lambda *_: None)
    run.start(
        override(tiny_run, {"data.train": f"{server.url}/train", "data.val": f"{server.url}/val"}), local=True
    )
    for split in ("train", "val"):
        for file in ("manifest.json", "index.npz"):  # its version, then all of it
            asked = [wanted for path, wanted in server.requests if path == f"/{split}/{file}"]
            assert asked == ["bytes=0-0", None]
    shards = [path for path, _ in server.requests if ".tar" in path]
    assert len(shards) == len(set(shards)) == 5  # their sizes
    server.close()


@pytest.mark.slow  # three trainings
def test_a_run_from_a_server(
    tiny_run: RunConfig, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    server = WebServer(tiny_data)
    short = override(tiny_run, {"optim.epochs": 1, "data.num_loader_workers": 1, "tracking.upload": True})
    urls = {"data.train": f"{server.url}/train", "data.val": f"{server.url}/val"}
    cache = {"data.remote.cache_dir": str(tmp_path / "cache"), "data.remote.cache_gb": 0.1}
    near, far = run.start(short, local=True), run.start(override(short, urls | cache), local=True)
    assert far.metrics["AP"] == near.metrics["AP"]
    assert [checkpoint.read_meta(result.checkpoint).state_crc32 for result in (near, far)] == [
        checkpoint.read_meta(near.checkpoint).state_crc32
    ] * 2
    assert len(list((tmp_path / "cache").glob("*/users"))) == 2  # both splits
    assert sum(wanted is None for _, wanted in server.requests) == 4  # manifest and index, each once per node
    params = mlflow_run.fetch_run(far.tracking_uri, far.mlflow_run_id).params
    assert {name: params[name] for name in urls} == urls
    num_before = len(server.requests)
    assert evaluate_checkpoint(far.checkpoint, None, local=True)["AP"] == far.metrics["AP"]
    assert all("/val/" in path for path, _ in server.requests[num_before:])
    resumed = run.resume(far.folder, overrides={"optim.epochs": 2}, local=True)
    assert resumed.metrics["AP"] is not None
    server.close()
