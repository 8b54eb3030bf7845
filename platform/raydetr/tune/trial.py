"""What Ray Tune runs for one trial: a run like any other, whose evaluations are reported to the search."""

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
class Study:
    """What every trial of a search gets."""

    config: RunConfig  # resolved; its storage is the search's folder
    name: str
    parent_run_id: str

    def trial_name(self, number: int) -> str:
        """The name of a trial's run, and of its folder below that of the search."""
        return f"{self.name}-{number:03d}"

    def trial_folder(self, number: int) -> Path:
        """Where a trial keeps its run."""
        return self.config.storage.path / self.trial_name(number)


def trial_number(trial_id: str) -> int:
    """Counted from 1. Tune numbers the trials of a search from 0 at the end of their ids."""
    return int(trial_id.rpartition("_")[2]) + 1


def run_trial(drawn: Mapping[str, Any], study: Study) -> None:
    """Train with the values that were drawn for this trial; called by Ray Tune in a process of its own.

    Raises:
        ConfigError, ValueError: the values contradict each other or the data.
        LaunchError: the workers failed.
    """
    number = trial_number(tune.get_context().get_trial_id())
    run.start(
        override(study.config, plain(drawn)),
        name=study.trial_name(number),
        parent_run_id=study.parent_run_id,
        warn=False,
        callbacks=[TuneReportCallback()],  # type: ignore[no-untyped-call]
    )


def plain(drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What Tune drew, as plain Python values: its integers are numpy's."""
    return {path: value.item() if hasattr(value, "item") else value for path, value in drawn.items()}
