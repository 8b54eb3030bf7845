"""A tiny data set and run for the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from raydetr import recipes
from raydetr.config import RunConfig, override
from raydetr.data.sample_data import write_sample_data
from raydetr.data.writing.shards import write_shards


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `coco`, and shards in `train` (48 images) and `val` (21 images)."""
    root = tmp_path_factory.mktemp("tiny")
    write_sample_data(root / "coco", num_train=48, num_val=21)
    for split in ("train", "val"):
        annotations = root / "coco" / "annotations" / f"instances_{split}.json"
        write_shards(root / "coco" / split, annotations, root / split, samples_per_shard=16)
    return root


@pytest.fixture
def tiny_run(tiny_data: Path, tmp_path: Path) -> RunConfig:
    """The quickstart on the tiny data: 4 epochs of 6 steps, evaluated after each, one worker."""
    return override(
        recipes.quickstart(),
        {
            "data.train": str(tiny_data / "train"),
            "data.val": str(tiny_data / "val"),
            "data.sample": None,
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
