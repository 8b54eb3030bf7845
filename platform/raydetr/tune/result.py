"""What a search found: its trials, best first, as a table and as the command that repeats the best."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from raydetr import recipes
from raydetr.config import ConfigError, RunConfig, flatten, parse_assignments, to_dict
from raydetr.tune.cluster import LeakedResource

Status = Literal["running", "finished", "stopped by ASHA", "failed", "interrupted"]
ORDER: tuple[Status, ...] = ("finished", "stopped by ASHA", "interrupted", "running", "failed")


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried. AP and AP50 are those of its last evaluation."""

    number: int  # counted from 1
    name: str  # of its run, and of its folder
    overrides: Mapping[str, Any]
    status: Status = "running"
    epoch: int = 0  # the last that was evaluated
    AP: float | None = None
    AP50: float | None = None
    cause: str | None = None  # of a failure
    mlflow_run_id: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """A search that ended."""

    name: str
    folder: Path
    tracking_uri: str
    mlflow_run_id: str  # of the parent
    epochs: int
    trials: tuple[Trial, ...]  # best first: those that finished before those that were stopped
    command: str | None  # that trains the best configuration again; None: no trial has an AP
    leaked: tuple[LeakedResource, ...]  # what the search left on the cluster; should be empty

    @property
    def best(self) -> Trial | None:
        """The first of the trials, if it has an AP."""
        return best_trial(self.trials)

    def to_text(self) -> str:
        """The table of trials, why some failed, and what to type next."""
        return "\n".join(
            [
                trial_table(self.trials, self.epochs),
                "",
                f"search      {self.folder}",
                f"MLflow      {self.tracking_uri}, run {self.mlflow_run_id}",
                f"best        {self.command or 'none: no trial was evaluated'}",
                *(f"WARNING     left on the cluster: {left}" for left in self.leaked),
            ]
        )


def ranked(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Best first: by AP, but a trial that was stopped never comes before one that finished."""
    return tuple(
        sorted(trials, key=lambda t: (ORDER.index(t.status), math.inf if t.AP is None else -t.AP, t.number))
    )


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The first of ranked trials, if it was evaluated."""
    return trials[0] if trials and trials[0].AP is not None else None


def trial_table(trials: Sequence[Trial], epochs: int) -> str:
    """The trials as aligned lines, and a line for each failure."""
    paths = list(dict.fromkeys(path for trial in trials for path in trial.overrides))
    head = ["trial", "AP", "AP50", "epochs", "status", *paths]
    rows = [
        [
            str(trial.number),
            _fraction(trial.AP),
            _fraction(trial.AP50),
            f"{trial.epoch}/{epochs}",
            trial.status,
            *(_short(trial.overrides.get(path)) for path in paths),
        ]
        for trial in trials
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows]]
    lines += [f"trial {trial.number} failed: {trial.cause}" for trial in trials if trial.status == "failed"]
    return "\n".join(lines)


def trials_as_json(trials: Sequence[Trial]) -> str:
    """The trials as JSON, with all digits."""
    return json.dumps([asdict(trial) for trial in trials], indent=1)


def train_command(config: RunConfig, overrides: Mapping[str, Any], config_file: Path) -> str:
    """The command that trains `config` (as the user gave it) with `overrides`, ready to paste.

    A configuration that no recipe begins is named by `config_file`, where it is kept.
    """
    try:
        recipe = flatten(to_dict(recipes.find(config.recipe)))
    except ConfigError:
        return _command(["--config", str(config_file)], overrides)
    ours = flatten(to_dict(config))
    if recipe.keys() != ours.keys():  # another model than the recipe's: no override turns one into the other
        return _command(["--config", str(config_file)], overrides)
    changed = {path: value for path, value in ours.items() if value != recipe[path]}
    return _command([config.recipe], changed | dict(overrides))


def _command(words: list[str], assignments: Mapping[str, Any]) -> str:
    words = ["raydetr", "train", *words]
    return shlex.join(words + [f"{path}={_argument(path, value)}" for path, value in assignments.items()])


def _argument(path: str, value: Any) -> str:
    """The text that the command line reads back as `value`."""
    if isinstance(value, str) and parse_assignments([f"{path}={value}"])[path] == value:
        return value
    return json.dumps(value)


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
