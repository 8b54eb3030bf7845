"""Report the result of a search: the trials, best first, and the command that trains the best one again."""

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
from raydetr.console import table
from raydetr.tracking.upload_state import read_run_id
from raydetr.tune.cluster import LeakedResource

Status = Literal["running", "finished", "stopped by ASHA", "failed", "interrupted"]
STATUS_ORDER: tuple[Status, ...] = ("finished", "stopped by ASHA", "interrupted", "running", "failed")


@dataclass(frozen=True)
class Trial:
    """One configuration of a search. AP and AP50 are those of its last evaluation."""

    number: int  # counted from 1
    name: str  # of its run, and of its folder
    overrides: Mapping[str, Any]  # the drawn values by dotted path
    status: Status = "running"
    epoch: int = 0  # of the last evaluation
    AP: float | None = None
    AP50: float | None = None
    cause: str | None = None  # of a failure


@dataclass(frozen=True)
class SearchResult:
    """Result of a complete or interrupted search."""

    name: str
    folder: Path
    tracking_uri: str
    epochs: int
    trials: tuple[Trial, ...]  # best first, see `rank_trials`
    command: str | None  # trains the best configuration again; None: no trial was evaluated
    leaked: tuple[LeakedResource, ...]  # resources that the search left on the cluster; should be empty
    pending_upload: str | None = None  # what MLflow lacks

    @property
    def mlflow_run_id(self) -> str | None:
        """Id of the MLflow run of the search; None if MLflow could not be reached so far."""
        return read_run_id(self.folder)

    @property
    def best(self) -> Trial | None:
        """The first of the trials; None if it was not evaluated."""
        return best_trial(self.trials)

    def to_text(self) -> str:
        """Return the table of trials, the causes of failures, and the command that trains the best one."""
        return "\n".join(
            [
                trial_table(self.trials, self.epochs),
                "",
                f"search      {self.folder}",
                f"MLflow      {self.tracking_uri}, run {self.mlflow_run_id or 'not created yet'}",
                f"best        {self.command or 'none: no trial was evaluated'}",
                *(f"WARNING     left on the cluster: {resource}" for resource in self.leaked),
            ]
        )


def rank_trials(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Sort trials, best first: by status (finished trials before stopped ones), then by AP."""

    def rank(trial: Trial) -> tuple[int, float, int]:
        return STATUS_ORDER.index(trial.status), math.inf if trial.AP is None else -trial.AP, trial.number

    return tuple(sorted(trials, key=rank))


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """Return the first of the ranked trials; None if it was not evaluated."""
    return trials[0] if trials and trials[0].AP is not None else None


def trial_table(trials: Sequence[Trial], epochs: int) -> str:
    """Format the trials as an aligned table, followed by a line per failure."""
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
    failed = [f"trial {trial.number} failed: {trial.cause}" for trial in trials if trial.status == "failed"]
    return "\n".join([table([head, *rows]), *failed])


def trials_as_json(trials: Sequence[Trial]) -> str:
    """Format the trials as JSON, with all digits."""
    return json.dumps([asdict(trial) for trial in trials], indent=1, allow_nan=False)


def train_command(config: RunConfig, overrides: Mapping[str, Any], config_file: Path) -> str:
    """Return the shell command that trains `config` (as the user gave it) with `overrides`.

    It names the recipe and the changed settings, or `config_file` if no recipe leads to this configuration.
    """
    try:
        recipe = flatten(to_dict(recipes.find(config.recipe)))
    except ConfigError:
        return _command(["--config", str(config_file)], overrides)
    settings = flatten(to_dict(config))
    if recipe.keys() != settings.keys():  # not the recipe's model, to which overrides cannot change it
        return _command(["--config", str(config_file)], overrides)
    changed = {path: value for path, value in settings.items() if value != recipe[path]}
    return _command([config.recipe], changed | dict(overrides))


def _command(words: list[str], assignments: Mapping[str, Any]) -> str:
    words = ["raydetr", "train", *words]
    return shlex.join(words + [f"{path}={_argument(path, value)}" for path, value in assignments.items()])


def _argument(path: str, value: Any) -> str:
    """Return the text that the command line parses as `value`."""
    if isinstance(value, str) and parse_assignments([f"{path}={value}"])[path] == value:
        return value
    return json.dumps(value)


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
