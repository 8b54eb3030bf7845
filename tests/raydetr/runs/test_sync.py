"""`raydetr track sync` of several runs and searches: what cannot be uploaded does not keep the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import CommandLine
from logged_run import log_run
from raydetr.tracking import mlflow_run
from raydetr.tracking.uris import default_uri

# SQLAlchemy 2.1 deprecates an option that MLflow 3.17 uses
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens


@pytest.fixture
def sync(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return CommandLine(monkeypatch, capsys, "track", "sync")


def test_runs_that_fail_do_not_stop_the_others(sync: CommandLine, tmp_path: Path) -> None:
    database = default_uri(tmp_path)
    log_run(tmp_path / "away", NOWHERE)
    log_run(tmp_path / "here", database)
    log_run(tmp_path / "search", database, kind="search")
    log_run(tmp_path / "search" / "away", NOWHERE, kind="trial")
    log_run(tmp_path / "search" / "here", database, kind="trial", steps=[(1, {"loss": 1.0})])
    done = sync(tmp_path / "missing", tmp_path / "away", tmp_path / "here", tmp_path / "search")
    assert done.code == 1
    assert [line.partition(":")[0] for line in done.out.splitlines()] == ["here", "search", "here"]
    assert "error: 3 runs could not be uploaded:" in done.err
    assert f"{tmp_path / 'missing'}: not the folder of a run or a search" in done.err
    for folder in (tmp_path / "away", tmp_path / "search" / "away"):
        assert f"{folder}: could not upload away in MLflow at {NOWHERE}" in done.err
    (trial,) = mlflow_run.search_runs(database, "metrics.`loss/loss` = 1")
    assert (trial.name, trial.status) == ("here", "FINISHED")
    again = sync(tmp_path / "here")
    assert (again.code, again.out) == (0, "here: complete\n")


def test_after_two_failures_the_trials_of_a_search_wait(sync: CommandLine, tmp_path: Path) -> None:
    """So that nobody waits for as many timeouts as there are trials."""
    log_run(tmp_path / "search", NOWHERE, kind="search")
    for name in ("a", "b", "c"):
        log_run(tmp_path / "search" / name, NOWHERE, kind="trial")
    done = sync(tmp_path / "search")
    assert (done.code, done.out) == (1, "")
    assert "error: 2 runs could not be uploaded:" in done.err
    assert done.err.count(f"in MLflow at {NOWHERE}") == 2
    assert done.err.endswith("; the trials after it were not tried")
