from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from raydetr import recipes
from raydetr.cli.arguments import read_config
from raydetr.config import override
from raydetr.tune.result import (
    SearchResult,
    Trial,
    rank_trials,
    train_command,
    trial_table,
    trials_as_json,
)

TRIALS = (
    Trial(1, "search-001", {"optim.lr": 0.00123456}, "failed", cause="too hot"),
    Trial(2, "search-002", {"optim.lr": 0.5}, "stopped by ASHA", 1, 0.9, 0.95),
    Trial(3, "search-003", {"optim.lr": 0.25}, "finished", 4, 0.2, 0.4),
    Trial(4, "search-004", {"optim.lr": 0.125}, "finished", 4, 0.3, 0.6),
    Trial(5, "search-005", {"optim.lr": 1.0}, "stopped by ASHA", 1, None, None),
)


def test_trials_that_finished_come_first_and_the_higher_AP_before_the_lower() -> None:
    assert [trial.number for trial in rank_trials(TRIALS)] == [4, 3, 2, 5, 1]


def test_the_table_shows_every_trial_and_why_one_failed() -> None:
    assert trial_table(rank_trials(TRIALS), 4).splitlines() == [
        "trial  AP     AP50   epochs  status           optim.lr",
        "4      0.300  0.600  4/4     finished         0.125",
        "3      0.200  0.400  4/4     finished         0.25",
        "2      0.900  0.950  1/4     stopped by ASHA  0.5",
        "5      -      -      1/4     stopped by ASHA  1",
        "1      -      -      0/4     failed           0.001235",
        "trial 1 failed: too hot",
    ]
    assert json.loads(trials_as_json(TRIALS))[0]["overrides"] == {"optim.lr": 0.00123456}


def test_a_result_without_an_evaluated_trial_has_no_best() -> None:
    result = SearchResult("search", Path("/runs/search"), "sqlite:///x", 4, TRIALS[:1], None, ())
    assert result.best is None
    assert "none: no trial was evaluated" in result.to_text()


@pytest.mark.parametrize(
    "overrides",
    [
        {"optim.lr": 0.0012345678901234567, "model.num_queries": 31},
        {"optim.lr": 1e-7, "optim.ema_decay": None, "optim.decay_norms_and_biases": True},
        {"optim.schedule": "step", "optim.min_lr_ratio": 0.0, "optim.lr_drop_epochs": [3, 5]},
        {"data.train_transform.short_sides": [], "model.loss.kind": "focal"},
    ],
)
def test_the_command_trains_the_same_configuration_when_pasted(overrides: dict[str, Any]) -> None:
    given = override(recipes.quickstart(), {"optim.epochs": 3, "storage.path": "/a folder/of runs"})
    words = shlex.split(train_command(given, overrides, Path("unused.yaml")))
    assert words[:3] == ["raydetr", "train", "quickstart"]
    assert read_config(words[2:], None) == override(given, overrides)


def test_the_command_for_a_configuration_without_a_recipe_has_its_file(tmp_path: Path) -> None:
    given = recipes.quickstart().model_copy(update={"recipe": "mine"})
    command = train_command(given, {"optim.lr": 0.5}, tmp_path / "config.yaml")
    assert command == f"raydetr train --config {tmp_path / 'config.yaml'} optim.lr=0.5"
