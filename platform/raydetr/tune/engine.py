"""Run the trials of a search with Ray Tune, which starts and ends their processes.

What begins and what stops is the decision of a `Coordinator`; Tune asks it through its own interfaces for searchers and
schedulers.
"""

from __future__ import annotations

import logging
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raydetr.runs.ray_train import OUT_OF_MEMORY, is_out_of_memory
from raydetr.store.background import BackgroundThreads
from raydetr.tune import cluster
from raydetr.tune.coordinator import Coordinator
from raydetr.tune.trial import TUNE, SearchContext, as_tune_config, run_trial
from raydetr.tune.trials import Trial

# The process of a trial only waits for its workers. It takes a fraction of a resource of the head that nothing else
# uses: with one CPU per trial, two trials on two CPUs would wait for their workers forever.
TRIAL_RESOURCES = {"node:__internal_head__": 0.001}
# From the end of a trial until what it may have left is removed: its controller has exited by then, and cannot start
# workers again
RELEASE_DELAY_SECONDS = 15.0

# Ray Tune reads these in this process. A value that the user has set is kept.
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the events have the results
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # AP is undefined if the data has no boxes
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `should_stop` ends the search
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: no output of Tune's own
}


def run_trials(
    context: SearchContext,
    coordinator: Coordinator,
    should_stop: Callable[[], bool],
    on_change: Callable[[Trial], None],
    on_released: Callable[[Trial], None],
    note: Callable[[str], None],
) -> None:
    """Run trials until all have ended, or until `should_stop`.

    Args:
        context: of the search.
        coordinator: of the search.
        should_stop: is asked often.
        on_change: is called with a trial that begins, was evaluated or has ended.
        on_released: is called in a thread with a trial some time after its end, when its processes have ended.
        note: prints a line.
    """
    link = _Link(coordinator, on_change, should_stop, on_released)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, context=context), TRIAL_RESOURCES),
        tune_config=tune.TuneConfig(
            metric="AP", mode="max", scheduler=_Scheduler(link), search_alg=_Searcher(link), num_samples=-1
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(context.folder),
            callbacks=[_Callback(link, note)],
            verbose=0,
            # Of a trial's process, whose run starts its own workers again. Only a process that dies is a failure here
            failure_config=tune.FailureConfig(max_failures=context.config.cluster.max_failures),
            stop=_Stopper(should_stop),
        ),
    )
    # The table of trials already has Tune's messages and the errors of trials
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    (context.folder / TUNE).mkdir(exist_ok=True)
    try:
        tuner.fit()
    finally:
        shutil.rmtree(context.folder / TUNE, ignore_errors=True)  # Tune's own files


class _Unstored:
    """Is stored without its state: Tune stores its objects, to restore an experiment; the events have all of it."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class _Link(_Unstored):
    """Connects the objects that Tune calls with the coordinator; maps Tune's ids to the numbers of trials."""

    def __init__(
        self,
        coordinator: Coordinator,
        on_change: Callable[[Trial], None],
        should_stop: Callable[[], bool],
        on_released: Callable[[Trial], None],
    ) -> None:
        self.coordinator, self._on_change, self._should_stop = coordinator, on_change, should_stop
        self._on_released = on_released
        self._threads = BackgroundThreads(1, "release")
        self.numbers: dict[str, int] = {}
        self.failures: dict[int, str] = {}  # that trials have reported
        self.groups: dict[int, str] = {}  # placement groups of the trials' workers
        self._to_release: list[
            tuple[float, Trial, str | None]
        ] = []  # (monotonic time, trial, placement group)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._should_stop():  # while nothing runs, Tune does not ask the stopper
            return str(Searcher.FINISHED)
        proposal = self.coordinator.next()
        if proposal is None:
            return None if self.coordinator.may_propose else str(Searcher.FINISHED)
        self.numbers[trial_id] = proposal.number
        self._on_change(self.coordinator.trials[proposal.number])
        return as_tune_config(proposal)

    def add_result(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Record a report; return whether the trial is to stop."""
        number = self.numbers[trial_id]
        if "failure" in result:
            self.failures[number] = result["failure"]
        if "epoch" not in result:  # Tune's own last report, which has no metrics
            return False
        if result.get("placement_group") is not None:
            self.groups[number] = result["placement_group"]
        is_stopped = self.coordinator.add_evaluation(number, result)
        self._on_change(self.coordinator.trials[number])
        return is_stopped

    def end(self, trial_id: str, failure: str | None = None) -> None:
        if self._should_stop():  # Tune ends all trials
            return
        number = self.numbers[trial_id]
        trial = self.coordinator.end(number, self.failures.pop(number, failure))
        self._to_release.append(
            (time.monotonic() + RELEASE_DELAY_SECONDS, trial, self.groups.pop(number, None))
        )
        self._on_change(trial)

    def release(self) -> None:
        """Release what trials may still hold that ended some time ago: in a thread, for Tune's loop must not wait."""
        while self._to_release and self._to_release[0][0] < time.monotonic():
            self._threads.submit(self._release, *self._to_release.pop(0)[1:])

    def _release(self, trial: Trial, group: str | None) -> None:
        # Ray's cleanup releases the workers at once, but it asks the dashboard, which does not always answer. The next
        # trial would then wait for its workers forever
        if group is not None:
            cluster.remove_group(group)
        self._on_released(trial)


class _Searcher(Searcher):
    def __init__(self, link: _Link) -> None:
        super().__init__(metric="AP", mode="max")
        self._link = link

    def suggest(self, trial_id: str) -> Any:
        return self._link.suggest(trial_id)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: `_Callback` records it."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the events of the search have its state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing; see `save`."""


class _Scheduler(FIFOScheduler):
    def __init__(self, link: _Link) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._link = link

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        is_stopped = self._link.add_result(trial.trial_id, result)
        return str(TrialScheduler.STOP if is_stopped else TrialScheduler.CONTINUE)


class _Stopper(_Unstored, tune.Stopper):
    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._should_stop()


class _Callback(_Unstored, tune.Callback):
    def __init__(self, link: _Link, note: Callable[[str], None]) -> None:
        self._link, self._note = link, note

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._link.end(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._link.end(trial.trial_id, _cause(trial))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self._link.numbers[trial.trial_id]
        self._note(f"trial {number}  its process has died, and is started again: {_cause(trial)}")

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Release what ended trials may still hold."""
        self._link.release()


def _cause(trial: Any) -> str:
    """Return the error of a trial's process in one line."""
    if trial.pickled_error_file is None:  # an error of Tune's own
        return "Ray Tune has ended its process"
    error = pickle.loads(Path(trial.pickled_error_file).read_bytes())
    inner = getattr(error, "cause", None) or error
    text = str(inner).strip()
    if is_out_of_memory(text):
        return OUT_OF_MEMORY
    lines = text.splitlines() or [type(inner).__name__]
    # A RayTaskError starts with the traceback and ends with the message
    return lines[-1].strip() if isinstance(inner, RayTaskError) else lines[0]
