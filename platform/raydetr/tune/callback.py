"""Track the trials of a search in the driver: print their progress, and finish their MLflow runs."""

from __future__ import annotations

import logging
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayTaskError

from raydetr.console import print_status
from raydetr.tracking import mlflow_run
from raydetr.tracking.tracker import Tracker
from raydetr.tune import cluster
from raydetr.tune.result import Status, Trial
from raydetr.tune.trial import SearchContext, to_python, trial_number

log = logging.getLogger(__name__)

# A trial that was stopped early is not a finished run in MLflow either
MLFLOW_STATUS: dict[Status, mlflow_run.Status] = {
    "finished": "FINISHED",
    "stopped by ASHA": "KILLED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}
# From the end of a trial until its placement group is removed: its controller has exited by then, and cannot start
# workers again
RELEASE_DELAY_SECONDS = 15.0
ENDED_TAG = "raydetr.ended"


class SearchCallback(tune.Callback):
    """Records the trials so far, by number. Ray Tune calls it in the driver."""

    def __init__(self, context: SearchContext) -> None:
        self._context, config = context, context.config
        self._epochs, self._batch_size = config.optim.epochs, config.data.batch_size
        self._uri, self._experiment = mlflow_run.tracking_uri(config), config.tracking.experiment
        self._positions: dict[int, int] = {}  # of the last evaluation
        self._groups: dict[int, str] = {}  # placement groups of the trials' workers
        self._to_remove: list[tuple[float, str]] = []  # (monotonic time, placement group)
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
        self.trials[number], self._positions[number] = now, result["position"]
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
        """Mark trials that are still running as interrupted, and correct the status of all MLflow runs.

        Call it after the processes of all trials have ended: a stopped trial may have set another status of its run
        while it was ending.
        """
        for trial in list(self.trials.values()):
            if trial.status == "running":
                self._record_end(replace(trial, status="interrupted"))
            elif trial.mlflow_run_id is not None:
                self._finish_mlflow_run(trial)

    def _record_end(self, trial: Trial) -> None:
        print_status(f"trial {trial.number}  {trial.status}" + (f": {trial.cause}" if trial.cause else ""))
        try:
            trial = replace(trial, mlflow_run_id=self._find_or_create_mlflow_run(trial))
            assert trial.mlflow_run_id is not None
            if trial.status == "stopped by ASHA":
                self._log_last_evaluation(trial)
            mlflow_run.set_tags(self._uri, trial.mlflow_run_id, {ENDED_TAG: self._description(trial)})
        except mlflow_run.TrackingError as error:
            log.warning("%s", error)
        self.trials[trial.number] = trial
        self._finish_mlflow_run(trial)

    def _finish_mlflow_run(self, trial: Trial) -> None:
        if trial.mlflow_run_id is None:
            return
        status = MLFLOW_STATUS[trial.status]
        try:
            if mlflow_run.fetch_run(self._uri, trial.mlflow_run_id).status != status:
                mlflow_run.finish_run(self._uri, trial.mlflow_run_id, status)
        except mlflow_run.TrackingError as error:
            log.warning("%s", error)

    def _find_or_create_mlflow_run(self, trial: Trial) -> str:
        """Return the id of the trial's MLflow run; create one if the trial failed before it did."""
        file = self._context.trial_folder(trial.number) / "mlflow_run_id"
        if file.exists():
            return file.read_text()
        parent = self._context.parent_run_id
        run_id = mlflow_run.create_run(self._uri, self._experiment, trial.name, parent_run_id=parent)
        mlflow_run.log_params(self._uri, run_id, trial.overrides)
        return run_id

    def _log_last_evaluation(self, trial: Trial) -> None:
        """Log AP and AP50, which the trial's process may not have sent before it was stopped because of them."""
        assert trial.mlflow_run_id is not None
        numbers = {"AP": trial.AP, "AP50": trial.AP50}
        tracker = Tracker(self._uri, trial.mlflow_run_id)
        tracker.log_metrics(
            self._positions[trial.number] // self._batch_size,
            {name: value for name, value in numbers.items() if value is not None},
        )
        tracker.close()

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
