"""What a search records of its trials, some of which end without a word."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.util.state.exception import ServerUnavailable

from logged_run import log_run
from raydetr.config import RunConfig, override
from raydetr.tracking.events import EventLog, read_events
from raydetr.tune import cluster, search
from raydetr.tune.callback import SearchCallback
from raydetr.tune.result import Trial
from raydetr.tune.space import Distribution, Space
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


def test_a_search_that_an_error_ends_is_failed_and_keeps_its_results_and_no_password(
    tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The head of the cluster dies: neither trials nor what they left on it can be reached."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def run_trials(context: SearchContext, space: Space, callback: SearchCallback, *_: object) -> None:
        trial = SimpleNamespace(trial_id="x_00000", config={"optim.lr": 0.1})
        callback.on_trial_start(0, [trial], trial)
        log_run(context.trial_folder(1), "http://127.0.0.1:9", kind="trial", end=None)
        result = {"epoch": 1, "position": 48, "AP": 0.25, "AP50": 0.5, "placement_group": "0" * 36}
        callback.on_trial_result(0, [trial], trial, result)
        raise RuntimeError("the head is gone")

    def release(*_: object) -> None:
        raise ServerUnavailable("the dashboard does not answer")

    monkeypatch.setattr(search, "connected", lambda cluster: nullcontext())
    monkeypatch.setattr(search, "_job_id", lambda: "01")
    monkeypatch.setattr(search, "_run_trials", run_trials)
    for name, value in {"check_dashboard": None, "limit_concurrency": 1, "list_leaked_resources": []}.items():
        monkeypatch.setattr(cluster, name, lambda *_, value=value: value)
    monkeypatch.setattr(cluster, "release_leaked_resources", release)
    config = override(tiny_run, {"tracking.uri": "http://me:s3cr3t@127.0.0.1:9"})
    distributions = {"optim.lr": Distribution("choice", (0.1,))}
    space = Space(tmp_path / "space.yaml", "optim.lr: {choice: [0.1]}", distributions)
    with pytest.raises(RuntimeError, match="the head is gone"):
        search.search(config, space, num_trials=1)
    (folder,) = Path(tiny_run.storage.path).glob("tune-*")
    end = read_events(folder)[-1]
    assert (end["kind"], end["reason"]) == ("failed", "RuntimeError: the head is gone")
    assert end["metrics"]["AP"] == 0.25
    assert (folder / "trials.json").exists()
    found = [path for path in folder.rglob("*") if path.is_file() and b"s3cr3t" in path.read_bytes()]
    assert found == []
    printed = "".join(capfd.readouterr())
    assert "cannot be found out: the dashboard does not answer" in " ".join(printed.split())
    assert "s3cr3t" not in printed
