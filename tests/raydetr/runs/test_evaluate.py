"""Evaluation of checkpoints: what can be overridden, and what has no effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from raydetr.config import ConfigError, RunConfig, override
from raydetr.runs import run
from raydetr.runs.evaluate import SETTINGS, evaluate_checkpoint
from raydetr.runs.run import RunResult
from raydetr.shards.reader import open_shards


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    from raydetr import recipes

    config = override(
        recipes.quickstart(),
        {
            "data.train": str(tiny_data / "train"),
            "data.val": str(tiny_data / "val"),
            "data.synthetic": None,
            "optim.epochs": 1,
            "cluster.num_workers": 1,
            "storage.path": str(tmp_path_factory.mktemp("runs")),
        },
    )
    return run.start(config, local=True)


def test_other_shards_and_batch_sizes(trained: RunResult, tiny_data: Path) -> None:
    table = evaluate_checkpoint(trained.checkpoint, {"data.eval_batch_size": 3}, local=True)
    assert table["AP"] == pytest.approx(trained.metrics["AP"], abs=1e-6)
    other = evaluate_checkpoint(trained.checkpoint, {"data.val": str(tiny_data / "train")}, local=True)
    objects = sum(row.num_objects for row in other.classes)
    assert objects == open_shards(tiny_data / "train").manifest.num_annotations


def test_relative_paths(trained: RunResult, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.checkpoint.parent)
    before = evaluate_checkpoint(trained.checkpoint, local=True)
    monkeypatch.chdir(tiny_data)
    here = evaluate_checkpoint(trained.checkpoint, {"data.val": "val"}, local=True)
    assert here == before


@pytest.mark.parametrize(
    "path",
    ["optim.lr", "data.train", "data.batch_size", "model.num_queries", "cluster.max_failures", "data.vall"],
)
def test_an_override_without_effect_is_refused(trained: RunResult, path: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{path} has no effect on an evaluation.*data\.val.*cluster\.num_workers"
    ):
        evaluate_checkpoint(trained.checkpoint, {path: 1}, local=True)


def test_a_misspelt_setting_names_the_nearest(trained: RunResult) -> None:
    with pytest.raises(ConfigError, match=r"did you mean data\.val_transform\.short_sides"):
        evaluate_checkpoint(trained.checkpoint, {"data.val_transform.short_side": [64]}, local=True)


def test_what_can_be_overridden_exists(tiny_run: RunConfig) -> None:
    from raydetr.config import known_paths

    known = known_paths(type(tiny_run))
    for name in SETTINGS:
        assert any(path == name or (name.endswith(".") and path.startswith(name)) for path in known), name
