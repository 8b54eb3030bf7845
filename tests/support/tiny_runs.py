"""The configuration of short runs."""

from __future__ import annotations

from pathlib import Path

from raydetr import recipes
from raydetr.config import RunConfig, override


def tiny_config(data: Path, storage: Path) -> RunConfig:
    """Configure the quickstart on the tiny data: 4 epochs of 6 steps, evaluated after each, one worker."""
    return override(
        recipes.quickstart(),
        {
            "data.train": str(data / "train"),
            "data.val": str(data / "val"),
            "data.synthetic": None,
            "data.batch_size": 8,
            "data.eval_batch_size": 5,
            "optim.epochs": 4,
            "evaluation.every_epochs": 1,
            "cluster.num_workers": 1,
            "storage.path": str(storage),
            "storage.keep_checkpoints": 9,
            "tracking.log_every_steps": 2,
            # They take seconds
            "evaluation.report": False,
            "tracking.upload": False,
            "tracking.register_model": False,
        },
    )
