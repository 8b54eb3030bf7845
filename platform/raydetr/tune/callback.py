"""Track the trials of a search in the driver: print their progress, and log how they ended."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayTaskError

from raydetr.console import print_status
from raydetr.tracking.events import EventLog, read_events
from raydetr.tune import cluster
from raydetr.tune.result import Status, Trial
from raydetr.tune.trial import SearchContext, to_python, trial_number

# The event that ends a trial. One that was stopped early is not a finished run in MLflow either
EVENTS: dict[Status, str] = {
    "finished": "finished",
    "stopped by ASHA": "stopped",
    "interrupted": "stopped",
    "failed": "failed",
}
# From the end of a trial until its placement group is removed: its controller has exited by then, and cannot start
# workers again
RELEASE_DELAY_SECONDS = 15.0
ENDED_TAG = "raydetr.ended"


class SearchCallback(tune.Callback):
    """Records the trials so far, by number. Ray Tune calls it in the driver.

    Args:
        context: of the search.
        log_failed_launch: logs the start of a trial that failed before it could do that itself.
    """

    def __init__(self, context: SearchContext, log_failed_launch: Callable[[Trial, EventLog], None]) -> None:
        self._context, self._log_failed_launch = context, log_failed_launch
        self._epochs = context.config.optim.epochs
        self._groups: dict[int, str] = {}  # placement groups of the trials' workers
        self._to_remove: list[tuple[float, str]] = []  # (monotonic time, placement group)
        self._ended_at: dict[int, float] = {}
        self.trials: dict[int, Trial] = {}

    @property
    def num_ended(self) -> int:
        """Number of trials that finished, failed or were stopped by ASHA."""
        return sum(trial.status not in ("running", "interrupted") for trial in self.trials.values())

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Add a trial whose process starts."""
        number = trial_number(trial.trial_id)
        self.trials[number] = Trial(number, self._context.trial_name(number), to_python(trial.config))
        print_status(f"trial {number}  starts  {_overrides(self.trials[number])}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record and print an evaluation."""
        number = trial_number(trial.trial_id)
        before = self.trials[number]
        if "epoch" not in result:  # Tune's own last report, which has no metrics
            return
        now = replace(before, epoch=result["epoch"], AP=result.get("AP"), AP50=result.get("AP50"))
        self.trials[number] = now
        self._groups[number] = result["placement_group"]
        if now != before:
            print_status(f"trial {number}  {_numbers(now, self._epochs)}  {_overrides(now)}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial has finished, or that ASHA has stopped it."""
        number = trial_number(trial.trial_id)
        finished = self.trials[number].epoch >= self._epochs
        self._record_end(replace(self.trials[number], status="finished" if finished else "stopped by ASHA"))
        if number in self._groups:
            self._to_remove.append((time.monotonic() + RELEASE_DELAY_SECONDS, self._groups[number]))

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Release the resources that an ended trial may still hold.

        Ray's cleanup releases them at once, but it asks the dashboard, which does not always answer. The next trial
        would then wait for its workers forever.
        """
        while self._to_remove and self._to_remove[0][0] < time.monotonic():
            cluster.remove_group(self._to_remove.pop(0)[1])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial has failed."""
        number = trial_number(trial.trial_id)
        self._record_end(
            replace(self.trials[number], status="failed", cause=_cause(Path(trial.pickled_error_file)))
        )

    def finalize(self) -> None:
        """Mark trials that are still running as interrupted, and log how all ended.

        Call it after the processes of all trials have ended: a trial that was stopped may have logged another end of
        its run.
        """
        for trial in list(self.trials.values()):
            if trial.status == "running":
                self._record_end(replace(trial, status="interrupted"))
            elif trial.status != "finished":
                self._log_end(trial)

    def _record_end(self, trial: Trial) -> None:
        print_status(f"trial {trial.number}  {trial.status}" + (f": {trial.cause}" if trial.cause else ""))
        self.trials[trial.number] = trial
        self._ended_at[trial.number] = time.time()
        self._log_end(trial)

    def _log_end(self, trial: Trial) -> None:
        folder = self._context.trial_folder(trial.number)
        log = EventLog(folder)
        try:
            if not any(event["kind"] == "launched" for event in read_events(folder)):
                self._log_failed_launch(trial, log)
                self._ended_at[trial.number] = time.time()  # not before its start
        except OSError as error:  # a hiccup of the storage must not end the search
            print_status(f"warning: {error}")
        log.append(
            EVENTS[trial.status],
            time=self._ended_at[trial.number],
            reason=trial.status,
            tags={ENDED_TAG: self._description(trial)},
        )
        if not log.flush():
            print_status(f"warning: {log.problem}")

    def _description(self, trial: Trial) -> str:
        cause = f": {trial.cause}" if trial.cause else ""
        return f"{trial.status}{cause} (epoch {trial.epoch} of {self._epochs})"


def _overrides(trial: Trial) -> str:
    return " ".join(
        f"{path}={value:.4g}" if isinstance(value, float) else f"{path}={value}"
        for path, value in trial.overrides.items()
    )


def _numbers(trial: Trial, epochs: int) -> str:
    numbers = (("AP", trial.AP), ("AP50", trial.AP50))
    return "  ".join(
        [f"epoch {trial.epoch}/{epochs}"]
        + [f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in numbers]
    )


def _cause(error_file: Path) -> str:
    """Return the error of a trial in one line; error.txt in the same folder has the tracebacks of Ray's layers."""
    error = pickle.loads(error_file.read_bytes())
    inner = getattr(error, "cause", None) or error
    lines = str(inner).strip().splitlines() or [type(inner).__name__]
    # A RayTaskError starts with the traceback and ends with the message
    return lines[-1].strip() if isinstance(inner, RayTaskError) else lines[0]
