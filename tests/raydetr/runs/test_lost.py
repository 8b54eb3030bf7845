"""A run whose driver was killed stays RUNNING in MLflow, until `raydetr runs` finds it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from logged_run import log_run, upload
from played_run import PlayedRun
from raydetr.cli.main import app
from raydetr.runs.state import state_of
from raydetr.tracking.events import EventLog, read_events
from raydetr.tracking.uris import default_uri

# SQLAlchemy 2.1 deprecates an option that MLflow 3.17 uses
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")


def test_a_run_that_is_uploaded_later_is_only_marked(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    played = PlayedRun(storage / "killed")
    log_run(storage / "killed", default_uri(storage), end=None, upload=False)
    played.kill()
    assert CliRunner().invoke(app, ["runs", str(storage)]).exit_code == 0
    assert "lost" in [event["kind"] for event in read_events(storage / "killed")]
    assert not (storage / "mlflow.db").exists()
    played.close()


def test_lost_runs_are_marked_once_and_running_ones_are_not(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    uri = default_uri(storage)
    client = MlflowClient(uri)
    played = {name: PlayedRun(storage / name) for name in ("goes-on", "killed")}
    ids = {}
    for name in played:
        log_run(storage / name, uri, end=None)
        ids[name] = upload(storage / name)
    played["killed"].kill()

    def statuses() -> dict[str, str]:
        return {name: client.get_run(run_id).info.status for name, run_id in ids.items()}

    assert statuses() == {"goes-on": "RUNNING", "killed": "RUNNING"}
    for _ in range(2):
        done = CliRunner().invoke(app, ["runs", str(storage)])
        assert done.exit_code == 0, done.output
        assert "killed (lost)" in done.output
    assert statuses() == {"goes-on": "RUNNING", "killed": "FAILED"}
    kinds = [event["kind"] for event in read_events(storage / "killed")]
    assert kinds.count("lost") == 1
    # It goes on
    again = EventLog(storage / "killed")
    (launch,) = (event for event in read_events(storage / "killed") if event["kind"] == "launched")
    again.append(**launch | {"time": time.time()})
    again.append("resumed", step=0, position=0, workers=1)
    assert again.flush()
    upload(storage / "killed")
    assert statuses()["killed"] == "RUNNING"
    assert state_of(storage / "killed").state == "lost"
    CliRunner().invoke(app, ["runs", str(storage)])
    assert statuses()["killed"] == "FAILED"
    for one in played.values():  # their pipes
        one.close()
