from __future__ import annotations

import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest

from raydetr import recipes
from raydetr.cli.arguments import read_config
from raydetr.config import from_yaml, override
from raydetr.tune.record import SearchOptions
from raydetr.tune.result import (
    SearchResult,
    best_command,
    importance_of,
    train_command,
    trial_table,
    write_result,
)
from raydetr.tune.space import Distribution, Space
from raydetr.tune.trials import Evaluation, Proposal, Status, Trial, rank_trials
from raydetr.visualization import search_plots


def trial(
    number: int, lr: float, status: Status, epoch: int = 0, AP: float | None = None, **metrics: float
) -> Trial:
    numbers = metrics if AP is None else {"AP": AP, **metrics}
    evaluations = (Evaluation(48 * epoch, 48 * epoch, epoch, 0.0, numbers),) if epoch else ()
    cause = "too hot" if status == "failed" else None
    proposal = Proposal(number, {"optim.lr": lr})
    return Trial(f"search-{number:03d}", (proposal,), 4, status, evaluations, cause)


TRIALS = (
    trial(1, 0.00123456, "failed"),
    trial(2, 0.5, "stopped by ASHA", 1, 0.9, AP50=0.95, latency_ms=10.0),
    trial(3, 0.25, "finished", 4, 0.2, AP50=0.4, latency_ms=12.5),
    trial(4, 0.125, "finished", 4, 0.3, AP50=0.6, latency_ms=20.0),
    trial(5, 1.0, "stopped by ASHA", 1),
    trial(6, 2.0, "finished", 4, 0.1, AP50=0.2, latency_ms=15.0),
)


def test_trials_that_finished_come_first_and_the_higher_AP_before_the_lower() -> None:
    assert [trial.number for trial in rank_trials(TRIALS)] == [4, 3, 6, 2, 5, 1]


def test_the_table_shows_every_trial_and_why_one_failed() -> None:
    assert trial_table(rank_trials(TRIALS), SearchOptions()).splitlines() == [
        "trial  AP     AP50   epochs  status           optim.lr",
        "4      0.300  0.600  4/4     finished         0.125",
        "3      0.200  0.400  4/4     finished         0.25",
        "6      0.100  0.200  4/4     finished         2",
        "2      0.900  0.950  1/4     stopped by ASHA  0.5",
        "5      -      -      1/4     stopped by ASHA  1",
        "1      -      -      0/4     failed           0.001235",
        "trial 1 failed: too hot",
    ]
    assert json.loads(json.dumps(TRIALS[0].to_dict()))["overrides"] == {"optim.lr": 0.00123456}


def test_the_table_of_a_search_with_two_objectives_marks_the_front() -> None:
    lines = trial_table(rank_trials(TRIALS), SearchOptions("tpe", objective="latency_ms")).splitlines()
    assert lines[0].split() == ["trial", "AP", "AP50", "latency_ms", "epochs", "status", "optim.lr"]
    assert {line.split()[0] for line in lines if "front" in line} == {"3", "4"}


def test_a_result_without_an_evaluated_trial_has_no_best() -> None:
    result = SearchResult(
        "search", Path("/runs/search"), "sqlite:///x", SearchOptions(), TRIALS[:1], None, (), {}
    )
    assert result.best is None
    assert "none: no trial was evaluated" in result.to_text()


def test_the_best_member_of_a_population_has_a_schedule(tmp_path: Path) -> None:
    first, second = Proposal(1, {"optim.lr": 0.1}, 2), Proposal(1, {"optim.lr": 0.2}, takes_over=2)
    other = Trial("search-002", (Proposal(2, {"optim.lr": 0.3}, 2),), 4)
    one = Trial("search-001", (first, second), 4)
    command = best_command(recipes.quickstart(), one, [one, other], tmp_path)
    assert command == f"raydetr train quickstart --schedule {tmp_path / 'schedule.yaml'}"
    assert (
        best_command(recipes.quickstart(), other, [one, other], tmp_path)
        == "raydetr train quickstart optim.lr=0.3"
    )


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


def test_a_result_is_written_with_pictures_also_for_values_that_are_not_drawn(tmp_path: Path) -> None:
    """Outside its range, `otherwise` has no place on an axis, and no logarithm if it is 0."""
    space = Space(tmp_path / "space.yaml", "", {
        "optim.schedule": Distribution("choice", ("step", "cosine")),
        "optim.weight_decay": Distribution("loguniform", (1e-5, 1e-3), ("optim.schedule", ("cosine",)), (0.0,)),
        "optim.lr": Distribution("loguniform", (1e-5, 1e-3)),
    })  # fmt: skip
    trials = []
    for number in range(1, 9):
        overrides = space.draw_random(random.Random(number))
        metrics = {"AP": 0.1 * number, "AP50": 0.2, "latency_ms": 10.0 * number}
        evaluation = Evaluation(48, 48, 1, 0.0, metrics)
        proposal = Proposal(number, overrides)
        trials.append(Trial(f"search-{number:03d}", (proposal,), 1, "finished", (evaluation,)))
    assert any(trial.overrides["optim.weight_decay"] == 0.0 for trial in trials)
    options = SearchOptions("tpe", 8, objective="latency_ms")
    ranked = rank_trials(trials)
    importance = importance_of(space, ranked, 48)
    assert importance  # of the paths that all trials have
    result = SearchResult(
        "search", tmp_path, "sqlite:///x", options, ranked, "raydetr train ...", (), importance
    )
    given = override(recipes.quickstart(), {"optim.min_lr_ratio": 0.0})
    write_result(result, space, given, 48)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        "trials.txt",
        "trials.json",
        "best.yaml",
        "curves.png",
        "parallel.png",
        "importance.png",
        "front.png",
    }
    best = from_yaml(tmp_path / "best.yaml")
    assert best.optim.lr == trials[-1].overrides["optim.lr"]


def test_a_picture_that_fails_does_not_cost_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(search_plots, "plot_curves", fail)
    space = Space(tmp_path / "space.yaml", "", {"optim.lr": Distribution("uniform", (0.1, 1.0))})
    result = SearchResult(
        "s", tmp_path, "sqlite:///x", SearchOptions(), rank_trials(TRIALS), "raydetr train", (), {}
    )
    write_result(result, space, recipes.quickstart(), 48)
    assert {path.name for path in tmp_path.iterdir()} == {
        "trials.txt",
        "trials.json",
        "best.yaml",
        "parallel.png",
    }
    assert "no curves.png: RuntimeError: no fonts" in capfd.readouterr().err
