"""Run one trial of a search: a normal run that also reports its evaluations to Ray Tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from raydetr.config import RunConfig, override
from raydetr.runs import run


@dataclass(frozen=True)
class SearchContext:
    """Configuration and names that all trials of a search have in common."""

    config: RunConfig  # resolved; its storage.path is the folder of the search
    name: str

    @property
    def folder(self) -> Path:
        """Folder of the search."""
        return Path(self.config.storage.path)

    def trial_name(self, number: int) -> str:
        """Return the name of a trial's run, which is also its folder in the folder of the search."""
        return f"{self.name}-{number:03d}"

    def trial_folder(self, number: int) -> Path:
        """Return the folder of a trial's run."""
        return self.folder / self.trial_name(number)


def trial_number(trial_id: str) -> int:
    """Return the number of a trial, counted from 1. Tune's ids end with a number that is counted from 0."""
    return int(trial_id.rpartition("_")[2]) + 1


def run_trial(drawn: Mapping[str, Any], context: SearchContext) -> None:
    """Train with the values that were drawn for this trial. Ray Tune calls it in a separate process.

    Raises:
        ConfigError, OSError, ValueError: the values contradict each other or the data, or the shards cannot be used.
        LaunchError: the workers failed.
    """
    number = trial_number(tune.get_context().get_trial_id())
    run.start(
        override(context.config, to_python(drawn)),
        name=context.trial_name(number),
        kind="trial",
        warn=False,
        callbacks=[TuneReportCallback()],  # type: ignore[no-untyped-call]
    )


def to_python(drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Convert drawn values to plain Python values: Tune's integers are numpy's."""
    return {path: value.item() if hasattr(value, "item") else value for path, value in drawn.items()}
