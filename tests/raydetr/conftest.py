"""Fixtures for data sets and runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from made_coco import write_coco
from raydetr import recipes
from raydetr.config import RunConfig, override
from raydetr.shards.reader import Shards, open_shards
from raydetr.shards.source import coco_source
from raydetr.shards.synthetic import write_synthetic_data
from raydetr.shards.writer import write_source


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
    write_synthetic_data(root / "coco", num_train=48, num_val=21)
    for split in ("train", "val"):
        annotations = root / "coco" / "annotations" / f"instances_{split}.json"
        write_source(coco_source(root / "coco" / split, annotations), root / split, samples_per_shard=16)
    return root


@pytest.fixture
def tiny_run(tiny_data: Path, tmp_path: Path) -> RunConfig:
    """Configure the quickstart on the tiny data: 4 epochs of 6 steps, evaluated after each, one worker."""
    return override(
        recipes.quickstart(),
        {
            "data.train": str(tiny_data / "train"),
            "data.val": str(tiny_data / "val"),
            "data.synthetic": None,
            "data.batch_size": 8,
            "data.eval_batch_size": 5,
            "optim.epochs": 4,
            "evaluation.every_epochs": 1,
            "cluster.num_workers": 1,
            "storage.path": str(tmp_path / "runs"),
            "storage.keep_checkpoints": 9,
            "tracking.log_every_steps": 2,
        },
    )
