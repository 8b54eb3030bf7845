"""What a search records of its trials, some of which end without a word."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from logged_run import log_run
from raydetr.config import RunConfig, override
from raydetr.tracking.events import EventLog, read_events
from raydetr.tune.callback import SearchCallback
from raydetr.tune.result import Trial
from raydetr.tune.trial import SearchContext


def test_the_ends_of_trials_are_logged(tiny_run: RunConfig, tmp_path: Path) -> None:
    context = SearchContext(override(tiny_run, {"storage.path": str(tmp_path / "search")}), "search")
    launched: list[int] = []

    def log_failed_launch(trial: Trial, log: EventLog) -> None:
        launched.append(trial.number)
        log.append("launched")

    callback = SearchCallback(context, log_failed_launch)
    trials = [SimpleNamespace(trial_id=f"x_{number:05d}", config={"optim.lr": 0.1}) for number in range(3)]
    for trial in trials:
        callback.on_trial_start(0, trials, trial)
    for number in (1, 2):  # the third ends before it can log anything
        log_run(context.trial_folder(number), "sqlite:///mlflow.db", kind="trial", end=None)
    result = {"epoch": 1, "position": 48, "AP": 0.25, "AP50": 0.5, "placement_group": "0" * 36}
    callback.on_trial_result(0, trials, trials[0], result)
    callback.on_trial_result(0, trials, trials[1], {**result, "epoch": 4})
    callback.on_trial_complete(0, trials, trials[0])
    callback.on_trial_complete(0, trials, trials[1])
    callback.finalize()
    ended = [(trial.status, trial.AP) for _, trial in sorted(callback.trials.items())]
    assert ended == [("stopped by ASHA", 0.25), ("finished", 0.25), ("interrupted", None)]
    assert launched == [3]
    last = [read_events(context.trial_folder(number))[-1] for number in (1, 2, 3)]
    assert [event["kind"] for event in last] == ["stopped", "finished", "stopped"]
    assert [event["tags"]["raydetr.ended"] for event in last] == [
        "stopped by ASHA (epoch 1 of 4)", "finished (epoch 4 of 4)", "interrupted (epoch 0 of 4)"
    ]  # fmt: skip
