"""Report the result of a search: its trials, best first, the best configuration, and pictures."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from raydetr import recipes
from raydetr.config import ConfigError, RunConfig, flatten, override, parse_assignments, to_dict, to_yaml
from raydetr.console import print_status, table
from raydetr.store.folders import write_file
from raydetr.tracking.upload_state import read_run_id
from raydetr.tune.cluster import LeakedResource
from raydetr.tune.display import fraction, short
from raydetr.tune.population import policy
from raydetr.tune.record import SearchOptions
from raydetr.tune.samplers import importances
from raydetr.tune.space import Space
from raydetr.tune.trials import Trial, best_trial, pareto_front
from raydetr.visualization import search_plots
from raydetr.visualization.page import plot_png

TABLE, JSON, BEST, SCHEDULE = "trials.txt", "trials.json", "best.yaml", "schedule.yaml"
CURVES, PARALLEL, IMPORTANCE, FRONT = "curves.png", "parallel.png", "importance.png", "front.png"


@dataclass(frozen=True)
class SearchResult:
    """Result of a complete or interrupted search."""

    name: str
    folder: Path
    tracking_uri: str
    options: SearchOptions
    trials: tuple[Trial, ...]  # best first, see `rank_trials`
    command: str | None  # trains the best configuration again; None: no trial was evaluated
    leaked: tuple[LeakedResource, ...]  # resources that the search left on the cluster; should be empty
    importance: Mapping[str, float]  # of the paths; empty if it cannot be known
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
        shares = ", ".join(f"{path} {share:.0%}" for path, share in self.importance.items())
        return "\n".join(
            [
                trial_table(self.trials, self.options),
                "",
                f"search      {self.folder}",
                f"MLflow      {self.tracking_uri}, run {self.mlflow_run_id or 'not created yet'}",
                *([f"importance  {shares}"] if shares else []),
                f"best        {self.command or 'none: no trial was evaluated'}",
                *(f"WARNING     left on the cluster: {resource}" for resource in self.leaked),
            ]
        )


def trial_table(trials: Sequence[Trial], options: SearchOptions) -> str:
    """Format the trials as an aligned table, followed by a line per failure."""
    paths = list(dict.fromkeys(path for trial in trials for path in trial.overrides))
    objective = options.objective
    front = set() if objective is None else {trial.number for trial in pareto_front(trials, objective)}
    head = ["trial", "AP", "AP50", "epochs", "status", *paths]
    rows = [
        [
            str(trial.number),
            fraction(trial.AP),
            fraction(trial.AP50),
            f"{trial.epoch}/{trial.epochs}",
            trial.status,
            *(short(trial.overrides.get(path, "")) for path in paths),
        ]
        for trial in trials
    ]
    if objective is not None:
        head.insert(3, objective)
        for row, trial in zip(rows, trials, strict=True):
            cost = trial.last(objective)
            row.insert(3, ("-" if cost is None else f"{cost:.4g}") + " front" * (trial.number in front))
    failed = [f"trial {trial.number} failed: {trial.cause}" for trial in trials if trial.status == "failed"]
    return "\n".join([table([head, *rows]), *failed])


def write_result(result: SearchResult, space: Space, config: RunConfig, samples: int) -> None:
    """Write the result to the folder of the search: the texts first, then the pictures.

    Args:
        result: of the search.
        space: of the search.
        config: as the user gave it, without the password in `tracking.uri`.
        samples: after which trials are compared for the importance of the paths.

    Raises:
        OSError: a text cannot be written.
    """
    trials, best = result.trials, result.best
    contents: dict[str, bytes] = {
        TABLE: f"{result.to_text()}\n".encode(),
        JSON: json.dumps([trial.to_dict() for trial in trials], indent=1, allow_nan=False).encode() + b"\n",
    }
    if best is not None:
        contents[BEST] = to_yaml(override(config, best.overrides)).encode()
        if result.options.algorithm == "pbt":
            contents[SCHEDULE] = schedule_yaml(best, trials).encode()
    for name, content in contents.items():
        write_file(result.folder / name, content)
    pictures = _pictures(result, space, samples) if best is not None else {}
    for name, draw in pictures.items():
        try:
            write_file(result.folder / name, plot_png(draw()))
        except Exception as error:  # of any type: a picture must not cost the result
            print_status(f"warning: no {name}: {type(error).__name__}: {error}")


def _pictures(result: SearchResult, space: Space, samples: int) -> dict[str, Callable[[], Figure]]:
    trials, objective = result.trials, result.options.objective
    pictures: dict[str, Callable[[], Figure]] = {
        CURVES: lambda: search_plots.plot_curves([_curve(trial) for trial in trials]),
        PARALLEL: lambda: search_plots.plot_parallel(_axes(space, trials), [trial.AP for trial in trials]),
    }
    if result.importance:
        pictures[IMPORTANCE] = lambda: search_plots.plot_importance(result.importance, samples)
    if objective is not None and (front := pareto_front(trials, objective)):
        points = [(trial.number, trial.last(objective), trial.AP) for trial in trials]
        numbers = {trial.number for trial in front}
        pictures[FRONT] = lambda: search_plots.plot_front(points, numbers, objective)
    return pictures


def _axes(space: Space, trials: Sequence[Trial]) -> list[search_plots.Axis]:
    return [
        search_plots.Axis(
            path,
            one.kind,
            one.values,
            [trial.overrides[path] if space.is_drawn(path, trial.overrides) else None for trial in trials],
        )
        for path, one in space.distributions.items()
    ]


def importance_of(space: Space, trials: Sequence[Trial], samples: int) -> Mapping[str, float]:
    """Return the share of each path in the variance of AP after `samples` samples, the largest first."""
    return importances(space, trials, samples) if len(space.distributions) > 1 else {}


def _curve(trial: Trial) -> search_plots.TrialCurve:
    points = [(each.samples, AP) for each in trial.evaluations if (AP := each.get("AP")) is not None]
    return search_plots.TrialCurve(trial.number, trial.status, points)


def schedule_yaml(best: Trial, trials: Sequence[Trial]) -> str:
    """Return how the best member of a population was trained, for `raydetr train --schedule`."""
    steps = policy(best.number, {trial.number: trial for trial in trials})
    head = "# Overrides of the best trial by the epoch from which they count: `raydetr train RECIPE --schedule FILE`\n"
    return head + yaml.safe_dump({epoch: dict(overrides) for epoch, overrides in steps}, sort_keys=False)


def best_command(config: RunConfig, best: Trial, trials: Sequence[Trial], folder: Path) -> str:
    """Return the shell command that trains the best trial again."""
    steps = policy(best.number, {trial.number: trial for trial in trials})
    config_file = folder / "config.yaml"
    if len(steps) == 1:
        return train_command(config, best.overrides, config_file)
    return f"{train_command(config, {}, config_file)} --schedule {shlex.quote(str(folder / SCHEDULE))}"


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
