"""Runs of an earlier version: settings that were added since then have their default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydetr.config import RunConfig, override
from raydetr.runs import run
from raydetr.runs.run import RunResult
from raydetr.training.checkpoint import CheckpointError


@pytest.fixture
def short_run(tiny_run: RunConfig) -> RunResult:
    return run.start(override(tiny_run, {"optim.epochs": 1}), local=True)


def rewrite_config(result: RunResult, change: Any) -> None:
    """Change the configuration in the checkpoint and in the run's folder, as if an older program had written it."""
    meta_file, yaml_file = result.checkpoint / "meta.json", result.folder / "config.yaml"
    meta, config = json.loads(meta_file.read_text()), yaml.safe_load(yaml_file.read_text())
    change(meta["config"])
    change(config)
    meta_file.write_text(json.dumps(meta))
    yaml_file.write_text(yaml.safe_dump(config))


def test_a_run_without_later_settings_is_resumed(short_run: RunResult) -> None:
    def forget(config: dict[str, Any]) -> None:
        del config["model"]["dropout"]  # of the model
        del config["model"]["loss"]["no_object_weight"]  # of a part of it
        del config["optim"]["max_skipped_steps"]
        del config["data"]["remote"]
        # One setting that is now two
        config["model"]["shared_heads"] = config["model"].pop("shared_class_heads")
        del config["model"]["shared_box_heads"]

    rewrite_config(short_run, forget)
    resumed = run.resume(short_run.folder, overrides={"optim.epochs": 2}, local=True)
    assert resumed.metrics["epoch"] == 2


def test_weights_that_lie_elsewhere_now_do_not_matter(short_run: RunResult) -> None:
    """The resumed weights are those of the checkpoint."""
    meta_file = short_run.checkpoint / "meta.json"
    meta = json.loads(meta_file.read_text())
    meta["config"]["model"]["backbone"]["weights"] = "/gone/resnet50.pth"
    meta_file.write_text(json.dumps(meta))
    assert run.resume(short_run.folder, overrides={"optim.epochs": 2}, local=True).metrics["epoch"] == 2


def test_another_model_is_refused_with_what_differs(short_run: RunResult) -> None:
    with pytest.raises(
        CheckpointError, match=r"another model: model\.num_queries is 25 in the checkpoint and 30 in the run"
    ):
        run.resume(short_run.folder, overrides={"optim.epochs": 2, "model.num_queries": 30}, local=True)


def test_a_setting_that_is_gone_is_named(short_run: RunResult) -> None:
    meta_file = short_run.checkpoint / "meta.json"
    meta = json.loads(meta_file.read_text())
    meta["config"]["optim"]["momentum"] = 0.9
    meta_file.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"not one of this version: optim\.momentum: no such setting"):
        run.resume(short_run.folder, overrides={"optim.epochs": 2}, local=True)


def test_a_relative_folder_is_resumed(short_run: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(short_run.folder.parent)
    resumed = run.resume(Path(short_run.folder.name), overrides={"optim.epochs": 2}, local=True)
    assert (resumed.folder, resumed.metrics["epoch"]) == (short_run.folder, 2)
