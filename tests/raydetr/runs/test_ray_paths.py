"""Relative paths on Ray, whose workers have working directories of their own; other clusters than the run's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ray.cluster_utils import Cluster

from detrs.backbone import build_backbone
from raydetr.config import ConfigError, RunConfig, override
from raydetr.runs import run
from raydetr.runs.evaluate import evaluate_checkpoint

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:ray"),
]


@pytest.fixture
def relative_run(
    tiny_run: RunConfig, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RunConfig:
    """Everything that a run reads or writes, below the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("shards").symlink_to(tiny_data)
    torch.save(build_backbone(tiny_run.model.backbone).state_dict(), "resnet.pth")
    paths = {
        "data.train": "shards/train",
        "data.val": "shards/val",
        "model.backbone.weights": "resnet.pth",
        "storage.path": "runs",
        "tracking.uri": "sqlite:///tracking/mlflow.db",
    }
    return override(tiny_run, paths | {"optim.epochs": 1, "cluster.num_workers": 2})


def test_a_run_on_ray_takes_relative_paths_and_so_do_resume_and_evaluation(
    cluster: Cluster, relative_run: RunConfig, tmp_path: Path
) -> None:
    first = run.start(relative_run)
    assert first.folder.parent == tmp_path / "runs"
    assert (tmp_path / "tracking" / "mlflow.db").is_file()
    folder = Path(os.path.relpath(first.folder))
    assert not folder.is_absolute()
    resumed = run.resume(folder, overrides={"optim.epochs": 2})
    assert (resumed.folder, resumed.metrics["epoch"]) == (first.folder, 2)
    # A run of two workers, evaluated by one
    one = evaluate_checkpoint(Path(os.path.relpath(resumed.checkpoint)), {"cluster.num_workers": 1})
    assert one["AP"] == resumed.metrics["AP"]


def test_weights_that_are_not_there_are_found_out_before_anything_starts(relative_run: RunConfig) -> None:
    config = override(relative_run, {"model.backbone.weights": "resnet5.pth"})
    with pytest.raises(ConfigError, match=r"model\.backbone\.weights /.*/resnet5\.pth: no such file"):
        run.start(config)
    assert not Path("runs").exists()
