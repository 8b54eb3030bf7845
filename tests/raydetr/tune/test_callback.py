"""What a search records of its trials while MLflow fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from raydetr.config import RunConfig, override
from raydetr.runs.run import tracking_warnings
from raydetr.tune.callback import SearchCallback
from raydetr.tune.result import SearchResult
from raydetr.tune.search import _log_result
from raydetr.tune.trial import SearchContext

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens


def test_a_search_goes_on_without_mlflow(
    tiny_run: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    context = SearchContext(override(tiny_run, {"tracking.uri": NOWHERE}), "search", "0" * 32)
    callback = SearchCallback(context)
    trials = [SimpleNamespace(trial_id=f"x_{number:05d}", config={"optim.lr": 0.1}) for number in range(3)]
    for trial in trials:
        callback.on_trial_start(0, trials, trial)
    result = {"epoch": 1, "position": 48, "AP": 0.25, "AP50": 0.5, "placement_group": "0" * 36}
    callback.on_trial_result(0, trials, trials[0], result)
    callback.on_trial_result(0, trials, trials[1], {**result, "epoch": 4})
    callback.on_trial_complete(0, trials, trials[0])
    callback.on_trial_complete(0, trials, trials[1])
    callback.finalize()
    ended = [(trial.status, trial.AP) for _, trial in sorted(callback.trials.items())]
    assert ended == [("stopped by ASHA", 0.25), ("finished", 0.25), ("interrupted", None)]
    best = callback.trials[2]
    found = SearchResult(
        name="search", folder=Path("search"), mlflow_run_id="0" * 32, tracking_uri=NOWHERE, epochs=4,
        trials=(best, callback.trials[1]), command="raydetr train ...", leaked=(),
    )  # fmt: skip
    assert found.best == best
    with tracking_warnings():
        _log_result(found, is_complete=True)
    assert f"in MLflow at {NOWHERE}" in " ".join(capsys.readouterr().err.split())
