from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_history import fetch_history
from mlflow_server import MlflowServer
from raydetr.tracking import mlflow_run
from raydetr.tracking.tracker import Tracker

# SQLAlchemy 2.1 deprecates an option that MLflow 3.17 uses
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return mlflow_run.default_uri(tmp_path_factory.mktemp("runs") / "made" / "by" / "create_run")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    running = MlflowServer(tmp_path_factory.mktemp("server"))
    running.start()
    yield running
    running.kill()


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


def test_default_uri_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert mlflow_run.default_uri(Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_a_run_from_beginning_to_end(database: str, tmp_path: Path) -> None:
    parent = mlflow_run.create_run(database, "search", "parent")
    run_id = mlflow_run.create_run(
        database, "search", "child", parent_run_id=parent, tags={"recipe": "quickstart"}
    )
    params = {
        "optim.lr": 2e-4,
        "data.short_sides": [480, 640],
        "optim.clip_max_norm": None,
        "model.aux_loss": True,
    }
    assert mlflow_run.log_params(database, run_id, {**params, "recipe": "quickstart"}) == {}
    mlflow_run.log_text(database, run_id, "a: 1\n", "config.yaml")
    tracker = Tracker(database, run_id, interval_s=0.1)
    tracker.log_metrics(10, {"loss": 2.5, "lr/backbone": 1e-5})
    tracker.log_metrics(20, {"loss": 1.5})
    tracker.log_text("table", "evaluation/ap.txt")
    tracker.log_bytes(b"\x89PNG", "evaluation/grid.png")
    tracker.log_bytes(b"\x89PNG", "curves.png")
    (tmp_path / "notes.txt").write_text("first")
    tracker.log_artifact(tmp_path / "notes.txt", "folder/below")
    (tmp_path / "notes.txt").write_text("changed later")
    tracker.close()
    mlflow_run.finish_run(database, run_id, "FINISHED")

    run = mlflow_run.fetch_run(database, "child")
    assert (run.run_id, run.name, run.status) == (run_id, "child", "FINISHED")
    assert run.metrics == {"loss": 1.5, "lr/backbone": 1e-5}
    # In the notation of the command line
    assert {path: json.loads(run.params[path]) for path in params} == params
    assert run.params["recipe"] == "quickstart"
    assert run.artifacts == (
        "config.yaml", "curves.png", "evaluation/ap.txt", "evaluation/grid.png", "folder/below/notes.txt"
    )  # fmt: skip
    assert mlflow_run.fetch_artifact(database, run_id, "folder/below/notes.txt") == b"first"
    assert mlflow_run.fetch_artifact(database, run_id, "curves.png").startswith(b"\x89PNG")
    assert fetch_history(database, run_id) == {
        "loss": [(10, 2.5), (20, 1.5)],
        "lr/backbone": [(10, 1e-5)],
    }
    client = mlflow_run.MlflowClient(tracking_uri=database)
    tags = client.get_run(run_id).data.tags
    assert (tags["mlflow.parentRunId"], tags["recipe"]) == (parent, "quickstart")
    beside = Path(database.removeprefix("sqlite:///")).parent / "mlflow-artifacts"
    assert list(beside.rglob("notes.txt"))


def test_more_values_than_fit_into_one_request(database: str) -> None:
    run_id = mlflow_run.create_run(database, "many", "many values")
    tracker = Tracker(database, run_id, interval_s=60)
    for step in range(500):
        tracker.log_metrics(step, {f"loss/{term}": step * term for term in range(5)})
    tracker.close()
    history = fetch_history(database, run_id)
    assert {name: len(points) for name, points in history.items()} == {f"loss/{i}": 500 for i in range(5)}
    assert history["loss/4"][-1] == (499, 4 * 499)


def test_values_that_are_not_finite_and_names_that_mlflow_does_not_allow(database: str) -> None:
    run_id = mlflow_run.create_run(database, "unusual", "unusual values")
    tracker = Tracker(database, run_id)
    tracker.log_metrics(
        1, {"nan": math.nan, "up": math.inf, "down": -math.inf, "AP/traffic light [8] @50": 0.5}
    )
    tracker.close()
    metrics = mlflow_run.fetch_run(database, run_id).metrics
    assert math.isnan(metrics["nan"])
    assert (metrics["up"], metrics["down"]) == (math.inf, -math.inf)
    assert metrics["AP/traffic light _8_ _50"] == 0.5


def test_long_params_are_marked_as_truncated(database: str) -> None:
    run_id = mlflow_run.create_run(database, "long", "long param")
    mlflow_run.log_params(database, run_id, {"names": "x" * 9000, **{f"p{i}": i for i in range(250)}})
    params = mlflow_run.fetch_run(database, run_id).params
    assert len(params) == 251
    assert len(params["names"]) == 6000
    assert params["names"].endswith("config.yaml has the complete value)")


def test_resume_continues_in_the_same_run(database: str) -> None:
    run_id = mlflow_run.create_run(database, "resume", "resumed")
    mlflow_run.log_params(database, run_id, {"optim.lr": 0.1, "optim.epochs": 2})
    first = Tracker(database, run_id)
    first.log_metrics(1, {"loss": 5.0})
    first.log_metrics(2, {"loss": 4.0})
    first.close()
    mlflow_run.finish_run(database, run_id, "FAILED")

    mlflow_run.reopen_run(database, run_id)
    assert mlflow_run.fetch_run(database, run_id).status == "RUNNING"
    assert mlflow_run.log_params(database, run_id, {"optim.lr": 0.1, "optim.epochs": 2}) == {}
    changed = mlflow_run.log_params(database, run_id, {"optim.lr": 0.1, "optim.epochs": 3, "seed": 1})
    assert changed == {"optim.epochs": ("2", "3")}
    time.sleep(0.01)
    second = Tracker(database, run_id)
    second.log_metrics(2, {"loss": 3.5})
    second.log_metrics(3, {"loss": 3.0})
    second.close()
    run = mlflow_run.fetch_run(database, run_id)
    assert run.params == {"optim.lr": "0.1", "optim.epochs": "2", "seed": "1"}
    assert fetch_history(database, run_id) == {"loss": [(1, 5.0), (2, 3.5), (3, 3.0)]}
    tags = mlflow_run.MlflowClient(tracking_uri=database).get_run(run_id).data.tags
    assert tags[mlflow_run.CHANGED_TAG] == "optim.epochs: 2 -> 3"


def test_dataset_is_an_input(database: str) -> None:
    run_id = mlflow_run.create_run(database, "data", "with data")
    fingerprint = "0123456789abcdef" * 4
    mlflow_run.log_dataset(
        database, run_id, name="coco", fingerprint=fingerprint, source="/data/coco/train", context="training",
        profile={"num_images": 80},
    )  # fmt: skip
    (logged,) = mlflow_run.MlflowClient(tracking_uri=database).get_run(run_id).inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("coco", fingerprint[:36])
    assert json.loads(logged.dataset.profile) == {"fingerprint": fingerprint, "num_images": 80}
    assert json.loads(logged.dataset.source) == {"uri": "/data/coco/train"}
    assert [(tag.key, tag.value) for tag in logged.tags] == [("mlflow.data.context", "training")]


def test_unknown_and_ambiguous_names(database: str) -> None:
    quoted = mlflow_run.create_run(database, "twins", "it's quoted")
    assert mlflow_run.fetch_run(database, "it's quoted").run_id == quoted
    ids = {mlflow_run.create_run(database, "twins", "twin") for _ in range(2)}
    with pytest.raises(ValueError, match="2 runs") as twice:
        mlflow_run.fetch_run(database, "twin")
    assert all(run_id in str(twice.value) for run_id in ids)
    with pytest.raises(ValueError, match=r"'gone'; the latest are: .*twin"):
        mlflow_run.fetch_run(database, "gone")
    with pytest.raises(mlflow_run.TrackingError, match=r"f{32}.*not found"):
        mlflow_run.fetch_run(database, "f" * 32)
    with pytest.raises(mlflow_run.TrackingError, match=r"no\.txt"):
        mlflow_run.fetch_artifact(database, ids.pop(), "no.txt")


def test_a_value_that_mlflow_refuses_is_an_error_at_the_end(database: str) -> None:
    tracker = Tracker(database, "f" * 32, interval_s=0.1)
    tracker.log_metrics(1, {"loss": 1.0})
    with pytest.raises(
        mlflow_run.TrackingError, match=r"1 metric values and 0 files of run f{32} did not reach"
    ):
        tracker.close()
    assert not tracker._thread.is_alive()


def test_everything_works_through_a_server(server: MlflowServer) -> None:
    run_id = mlflow_run.create_run(server.uri, "served", "served run")
    mlflow_run.log_params(server.uri, run_id, {f"p{i}": i for i in range(250)})
    mlflow_run.log_dataset(
        server.uri, run_id, name="d", fingerprint="ab", source="/d", context="training", profile={}
    )
    tracker = Tracker(server.uri, run_id)
    for step in range(300):
        tracker.log_metrics(step, {"a": step, "b": -step, "nan": math.nan, "inf": math.inf})
    tracker.log_text("hello", "folder/text.txt")
    tracker.close()
    run = mlflow_run.fetch_run(server.uri, "served run")
    assert (len(run.params), run.artifacts) == (250, ("folder/text.txt",))
    assert (run.metrics["a"], run.metrics["b"], run.metrics["inf"]) == (299, -299, math.inf)
    assert math.isnan(run.metrics["nan"])
    assert len(fetch_history(server.uri, run_id)["a"]) == 300
    assert mlflow_run.fetch_artifact(server.uri, run_id, "folder/text.txt") == b"hello"


@pytest.mark.usefixtures("short_timeouts")
def test_an_outage_costs_neither_time_nor_values(server: MlflowServer) -> None:
    run_id = mlflow_run.create_run(server.uri, "outage", "outage")
    tracker = Tracker(server.uri, run_id, interval_s=0.2)
    tracker.log_metrics(0, {"loss": 0.0})
    tracker.flush()

    server.freeze()
    _record(tracker, range(1, 50))
    _flush_fails(tracker, server.uri, within_s=40)
    server.thaw()
    tracker.flush()

    server.kill()
    _record(tracker, range(50, 100))
    _flush_fails(tracker, server.uri, within_s=40)
    with pytest.raises(mlflow_run.TrackingError, match=server.uri):
        mlflow_run.finish_run(server.uri, run_id, "FINISHED")
    server.start()
    tracker.close()
    assert fetch_history(server.uri, run_id) == {"loss": [(step, float(step)) for step in range(100)]}


@pytest.mark.usefixtures("short_timeouts")
def test_close_ends_in_bounded_time_without_a_server() -> None:
    uri = "http://127.0.0.1:9"  # the discard port: nothing listens
    with pytest.raises(mlflow_run.TrackingError, match=uri):
        mlflow_run.create_run(uri, "none", "none")
    tracker = Tracker(uri, "f" * 32)
    tracker.log_metrics(1, {"loss": 1.0})
    started = time.monotonic()
    with pytest.raises(mlflow_run.TrackingError, match=f"1 metric values and 0 files .* {uri}"):
        tracker.close()
    assert time.monotonic() - started < 40
    assert not tracker._thread.is_alive()


def _record(tracker: mlflow_run.Tracker, steps: range) -> None:
    started = time.monotonic()
    for step in steps:
        tracker.log_metrics(step, {"loss": step})
        time.sleep(0.01)
    assert time.monotonic() - started < 5.0  # one value that waited for the server would take longer


def _flush_fails(tracker: mlflow_run.Tracker, uri: str, within_s: float) -> None:
    started = time.monotonic()
    with pytest.raises(mlflow_run.TrackingError, match=uri):
        tracker.flush()
    assert time.monotonic() - started < within_s
