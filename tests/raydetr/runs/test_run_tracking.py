"""What a run stores of its tracking: no password, no path that binds it to its place, MLflow's own variables."""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient

from command_line import CommandLine
from raydetr.config import RunConfig, override, to_yaml
from raydetr.locations import sqlite_file
from raydetr.runs import run, session
from raydetr.runs.run_folder import read_config
from raydetr.runs.run_tracking import Uploads, log_launch
from raydetr.runs.sync import sync_runs
from raydetr.tracking import mlflow_run
from raydetr.tracking.events import EventLog, read_events
from raydetr.tracking.system_metrics import SystemMetrics
from raydetr.tracking.uris import default_uri

# SQLAlchemy 2.1 deprecates an option that MLflow 3.17 uses
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")


@pytest.fixture
def short(tiny_run: RunConfig) -> RunConfig:
    settings = {
        "optim.epochs": 1,
        "data.limit_images": 8,
        "tracking.log_every_steps": 1,
        "tracking.upload": True,
    }
    return override(tiny_run, settings)


def test_a_run_that_is_uploaded_later(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "SystemMetrics", partial(SystemMetrics, interval_seconds=0.05))
    result = run.start(override(short, {"tracking.upload": False}), local=True)
    assert result.pending_upload is None
    assert f"MLflow: nothing is sent before `raydetr track sync {result.folder}`" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not Path(short.storage.path, "mlflow.db").exists()
    assert [line.partition(": ")[2][:4] for line in sync_runs([str(result.folder)])] == ["sent"]
    tracked = mlflow_run.fetch_run(default_uri(short.storage.path), result.name)
    assert tracked.metrics["AP/AP"] == result.metrics["AP"]
    for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes"):
        assert f"system/{socket.gethostname()}/{name}" in tracked.metrics
    assert tracked.tags["mlflow.user"] == getpass.getuser()
    assert tracked.tags["mlflow.source.name"] == sys.argv[0]
    assert tracked.tags["mlflow.source.type"] == "LOCAL"
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    assert tracked.tags.get("mlflow.source.git.commit", "") == commit


def test_a_password_is_nowhere(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = override(short, {"tracking.uri": "http://me:s3cr3t@127.0.0.1:9"})
    monkeypatch.setattr(sys, "argv", ["raydetr", "train", "tracking.uri=http://me:s3cr3t@127.0.0.1:9"])
    result = run.start(config, local=True)
    printed = result.to_text() + "".join(capfd.readouterr())
    assert "http://me:***@127.0.0.1:9" in printed
    assert "s3cr3t" not in printed
    found = [path for path in result.folder.rglob("*") if path.is_file() and b"s3cr3t" in path.read_bytes()]
    assert found == []
    assert read_config(result.folder).tracking.uri == "http://me:***@127.0.0.1:9"
    run.resume(result.folder, overrides={"optim.epochs": 2}, local=True)


def test_a_moved_folder_is_resumed_in_its_database(short: RunConfig, tmp_path: Path) -> None:
    result = run.start(short, local=True)
    before = Path(short.storage.path)
    after = tmp_path / "elsewhere" / "runs"
    after.parent.mkdir()
    shutil.move(before, after)
    resumed = run.resume(after / result.name, overrides={"optim.epochs": 2}, local=True)
    assert not before.exists()
    assert resumed.pending_upload is None
    assert resumed.tracking_uri == default_uri(after)
    client = MlflowClient(resumed.tracking_uri)
    assert resumed.mlflow_run_id is not None
    assert len(client.get_metric_history(resumed.mlflow_run_id, "AP/AP")) == 2
    assert [path.parent for path in tmp_path.rglob("mlflow.db")] == [after]
    artifacts = [file.path for file in client.list_artifacts(resumed.mlflow_run_id)]
    assert "curves.png" in artifacts
    config = read_config(after / result.name)
    assert (config.storage.path, config.tracking.uri) == (str(after), None)


def test_the_variables_of_mlflow_count_where_settings_are_not_given(
    short: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = default_uri(tmp_path / "other")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    result = run.start(short, local=True)
    assert f"MLflow {other}, experiment mine" in " ".join(capsys.readouterr().err.split())
    assert not Path(short.storage.path, "mlflow.db").exists()
    experiment = MlflowClient(other).get_experiment_by_name("mine")
    assert experiment is not None
    assert MlflowClient(other).get_run(result.mlflow_run_id).info.experiment_id == experiment.experiment_id
    # The settings of a run that is resumed are its own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", default_uri(tmp_path / "third"))
    assert run.resume(result.folder, overrides={"optim.epochs": 2}, local=True).tracking_uri == other

    given = override(
        short, {"tracking.uri": default_uri(tmp_path / "given"), "tracking.experiment": "theirs"}
    )
    resolved, _ = run.resolve(given)
    assert (resolved.tracking.uri, resolved.tracking.experiment) == (
        default_uri(tmp_path / "given"),
        "theirs",
    )


def test_a_resumed_run_stays_in_its_default_database(
    short: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run.start(short, local=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", default_uri(tmp_path / "other"))
    resumed = run.resume(result.folder, overrides={"optim.epochs": 2}, local=True)
    assert (resumed.tracking_uri, resumed.pending_upload) == (result.tracking_uri, None)
    assert resumed.mlflow_run_id is not None
    assert len(MlflowClient(result.tracking_uri).get_metric_history(resumed.mlflow_run_id, "AP/AP")) == 2
    assert not (tmp_path / "other").exists()


def test_a_run_that_goes_on_stays_in_its_place(short: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run.start(short, local=True, name="stays")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    again = run.start(short, local=True, name="stays", or_resume=True)
    assert (again.tracking_uri, again.pending_upload) == (result.tracking_uri, None)


def test_a_run_that_goes_on_has_the_password_that_is_given(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, uris = "postgresql://me:s3cr3t@127.0.0.1:9/mlflow", []

    @contextmanager
    def uploading(folder: Path, config: RunConfig, uri: str, kind: str) -> Iterator[Uploads]:
        uris.append(uri)
        yield Uploads()

    monkeypatch.setattr(run, "uploading", uploading)
    config = override(short, {"tracking.uri": uri})
    for _ in range(2):  # the second time, it is finished, and not uploaded
        run.start(config, local=True, name="goes-on", or_resume=True)
    assert uris == [uri, uri]


def test_a_user_without_a_name_starts_a_run(
    short: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the random user ids of some clusters, which are not in /etc/passwd."""

    def fail() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", fail)
    config, splits = run.resolve(short)
    log = EventLog(tmp_path / "run")
    log_launch(log, tmp_path / "run", config, splits, "run")
    assert log.flush()
    (launch,) = read_events(tmp_path / "run")
    assert "mlflow.user" not in launch["tags"]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (
            ["/venv/bin/raydetr", "train", "quickstart", "data.train=my data"],
            "raydetr train quickstart 'data.train=my data'",
        ),
        (["jobs/quickstart.py", "optim.epochs=1"], "python jobs/quickstart.py optim.epochs=1"),
    ],
)
def test_the_command_of_a_run_can_be_pasted(
    short: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], command: str
) -> None:
    config, splits = run.resolve(short)
    monkeypatch.setattr(sys, "argv", arguments)
    log = EventLog(tmp_path / "run")
    log_launch(log, tmp_path / "run", config, splits, "run")
    assert log.flush()
    (launch,) = read_events(tmp_path / "run")
    assert launch["command"] == command


def test_a_run_that_fails_before_the_loop_is_marked(short: RunConfig) -> None:
    config = override(short, {"storage.checkpoint_steps": 1})
    broken = override(config, {"init.checkpoint": str(Path(config.data.train))})
    with pytest.raises(ValueError, match=r"meta\.json"):
        run.start(broken, local=True, name="broken")
    uri = default_uri(config.storage.path)
    file = sqlite_file(uri)
    assert file is not None
    if file.exists():
        client = MlflowClient(uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        assert [found.info.status for found in client.search_runs(experiments)] == ["FAILED"]


def test_the_exit_code_tells_that_mlflow_lacks_something(
    short: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(override(short, {"tracking.uri": "http://127.0.0.1:9"})))
    raydetr = CommandLine(monkeypatch, capsys)
    done = raydetr("train", "--config", tmp_path / "run.yaml", "--local", "--name", "pending")
    assert done.code == 5, done.err
    assert "raydetr track sync" in done.err
    folder = Path(short.storage.path) / "pending"
    done = raydetr("track", "sync", folder, "--uri", default_uri(tmp_path / "later"))
    assert done.code == 0, done.err
    assert done.out.startswith("pending: sent ")
