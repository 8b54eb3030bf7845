"""`raydetr tune` and `raydetr space`: what they refuse before anything starts, and what they print."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import CommandLine
from raydetr import recipes
from raydetr.config import RunConfig, from_yaml, to_yaml
from raydetr.tune import search
from raydetr.tune.record import SearchOptions, write_options
from raydetr.tune.space import read_space


@pytest.fixture
def raydetr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep what would be searched, instead of starting it."""
    plans: list[Any] = []

    def keep(plan: Any, *, is_new: bool) -> SimpleNamespace:
        plans.append((plan, is_new))
        return SimpleNamespace(to_text=lambda: "kept", pending_upload=None)

    monkeypatch.setattr(search, "_search", keep)
    return plans


@pytest.fixture
def files(tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(to_yaml(tiny_run))
    (tmp_path / "space.yaml").write_text("optim.lr: {loguniform: [1.0e-3, 1.0e-2]}\n")
    return tmp_path


def test_a_printed_space_can_be_searched(raydetr: CommandLine, tmp_path: Path) -> None:
    printed = raydetr("space", "quickstart")
    assert printed.code == 0
    (tmp_path / "space.yaml").write_text(printed.out)
    space = read_space(tmp_path / "space.yaml", recipes.quickstart())
    assert space.distributions["optim.lr"].values == (1e-3, 1.6e-2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--space FILE is missing", "raydetr space RECIPE"]),
        (["--space", "space.yaml", "--or-resume"], ["--or-resume needs the name", "--name"]),
        (["--space", "space.yaml", "--algorithm", "pbt"], ["--algorithm pbt needs --interval"]),
        (["--space", "space.yaml", "--algorithm", "pbt", "--interval", "4"], ["--interval 4", "optim.epochs=4"]),
        (["--space", "space.yaml", "--algorithm", "grid"], ["optim.lr", "a grid needs a list of values"]),
        (["--space", "space.yaml", "--name", "a/b"], ["a/b", "not the name of a folder"]),
        (["--space", "wide.yaml"], ["wide.yaml: model.hidden_dim=65", "num_heads"]),
        (["--space", "epochs.yaml", "--algorithm", "pbt", "--interval", "2"], ["optim.epochs cannot change"]),
        (["--resume", "nowhere", "--space", "space.yaml"], ["--resume continues", "omit --space"]),
        (["--resume", "nowhere"], ["nowhere", "not the folder of a search"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_starts(
    raydetr: CommandLine, files: Path, started: list[Any], arguments: list[str], words: list[str]
) -> None:
    (files / "wide.yaml").write_text("model.hidden_dim: {choice: [64, 65]}\n")
    (files / "epochs.yaml").write_text("optim.epochs: {choice: [4, 8]}\n")
    recipe = [] if "--resume" in arguments else ["--config", "run.yaml"]
    outcome = raydetr("tune", *recipe, *arguments)
    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    for word in words:
        assert word in outcome.err
    assert started == []
    assert not (files / "runs").exists()


def test_the_options_arrive(raydetr: CommandLine, files: Path, started: list[Any]) -> None:
    (files / "space.yaml").write_text(
        "optim.lr: {choice: [0.1, 0.2]}\nmodel.num_queries: {randint: [10, 12]}\n"
    )
    for algorithm, options in {
        "grid": (),
        "bohb": ("--trials", 5, "--grace-epochs", 2, "--reduction-factor", 4),
        "tpe": ("--objective", "latency_ms", "--keep", "best", "--concurrent", 3),
    }.items():
        raydetr("tune", "--config", "run.yaml", "--space", "space.yaml", "--algorithm", algorithm, *options)
    made = [plan.options for plan, _ in started]
    base = str(files)
    assert made == [
        SearchOptions("grid", 6, base=base),  # as many trials as there are combinations
        SearchOptions("bohb", 5, grace_epochs=2, reduction_factor=4, base=base),
        SearchOptions("tpe", max_concurrent=3, objective="latency_ms", keep="best", base=base),
    ]


def test_a_search_with_this_name_goes_on_only_if_it_is_the_same(
    raydetr: CommandLine, files: Path, started: list[Any]
) -> None:
    folder = files / "runs/mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text((files / "run.yaml").read_text())
    (folder / "space.yaml").write_text((files / "space.yaml").read_text())
    write_options(folder, SearchOptions(num_trials=5, base=str(files)))
    words = ("tune", "--config", "run.yaml", "--space", "space.yaml", "--name", "mine", "--trials", 5)
    assert "exists: continue it with `raydetr tune --resume" in raydetr(*words).err
    raydetr(*words, "--or-resume")
    (plan, is_new), = started  # fmt: skip
    assert not is_new
    assert (plan.options.num_trials, plan.context.folder) == (5, folder)
    other = raydetr(*words, "--or-resume", "optim.epochs=9")
    assert "is a search with other settings: optim.epochs" in other.err
    assert "the number of trials" in raydetr(*words[:-1], 4, "--or-resume").err
    assert "grace_epochs" in raydetr(*words, "--or-resume", "--grace-epochs", 2).err
    (files / "space.yaml").write_text("optim.lr: {loguniform: [1.0e-3, 2.0e-2]}\n")
    assert "the space space.yaml" in raydetr(*words, "--or-resume").err
    assert len(started) == 1


def test_more_trials_and_another_cluster_for_a_search_that_goes_on(
    raydetr: CommandLine, files: Path, started: list[Any]
) -> None:
    folder = files / "runs/mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text((files / "run.yaml").read_text())
    (folder / "space.yaml").write_text("init.checkpoint: {choice: [a, null]}\n")
    write_options(folder, SearchOptions("tpe", num_trials=5, base="/home/me"))
    assert "has 5 already; give more" in raydetr("tune", "--resume", folder, "--trials", 4).err
    assert "optim.lr cannot change" in raydetr("tune", "--resume", folder, "optim.lr=3").err
    raydetr("tune", "--resume", folder, "--trials", 7, "--concurrent", 2, "cluster.cpus_per_worker=2")
    (plan, _), = started  # fmt: skip
    assert (plan.options.num_trials, plan.options.max_concurrent) == (7, 2)
    assert plan.resolved.cluster.cpus_per_worker == 2
    assert plan.space.distributions["init.checkpoint"].values == ("/home/me/a", None)
    assert from_yaml(folder / "config.yaml").cluster.cpus_per_worker == 1


def test_the_exit_code_tells_that_mlflow_lacks_something(
    raydetr: CommandLine, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = SimpleNamespace(to_text=lambda: "the table", pending_upload="3 metric values")
    monkeypatch.setattr(search, "_search", lambda plan, *, is_new: outcome)
    done = raydetr("tune", "--config", "run.yaml", "--space", "space.yaml")
    assert (done.code, done.out) == (5, "the table\n")
