"""Read MLflow runs that MLflow's own client wrote."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from mlflow import MlflowClient

from raydetr.tracking import mlflow_run
from raydetr.tracking.uris import TrackingError, default_uri

# SQLAlchemy 2.1 deprecates an option that MLflow 3.17 uses
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return default_uri(tmp_path_factory.mktemp("runs"))


def create_run(uri: str, experiment: str, name: str) -> str:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    experiment_id = client.create_experiment(experiment) if found is None else found.experiment_id
    return str(client.create_run(experiment_id, run_name=name).info.run_id)


def test_default_uri_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_uri(Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_params_metrics_and_artifacts(database: str, tmp_path: Path) -> None:
    run_id = create_run(database, "all", "child")
    client = MlflowClient(database)
    client.log_param(run_id, "optim.lr", "0.1")
    for name, value in {"nan": math.nan, "up": math.inf, "down": -math.inf, "loss": 1.5}.items():
        client.log_metric(run_id, name, value)
    (tmp_path / "notes.txt").write_text("first")
    client.log_artifact(run_id, str(tmp_path / "notes.txt"), "folder/below")
    client.set_terminated(run_id, "FAILED")
    run = mlflow_run.fetch_run(database, "child")
    assert (run.run_id, run.name, run.status) == (run_id, "child", "FAILED")
    assert (run.params, run.artifacts) == ({"optim.lr": "0.1"}, ("folder/below/notes.txt",))
    assert math.isnan(run.metrics["nan"])
    assert {name: run.metrics[name] for name in ("up", "down", "loss")} == {
        "up": math.inf, "down": -math.inf, "loss": 1.5
    }  # fmt: skip
    assert mlflow_run.fetch_artifact(database, run_id, "folder/below/notes.txt") == b"first"


def test_unknown_and_ambiguous_names(database: str) -> None:
    quoted = create_run(database, "twins", "it's quoted")
    assert mlflow_run.fetch_run(database, "it's quoted").run_id == quoted
    ids = {create_run(database, "twins", "twin") for _ in range(2)}
    with pytest.raises(ValueError, match="2 runs") as twice:
        mlflow_run.fetch_run(database, "twin")
    assert all(run_id in str(twice.value) for run_id in ids)
    with pytest.raises(ValueError, match=r"'gone'; the latest are: .*twin"):
        mlflow_run.fetch_run(database, "gone")
    with pytest.raises(TrackingError, match=r"f{32}.*not found"):
        mlflow_run.fetch_run(database, "f" * 32)
    with pytest.raises(TrackingError, match=r"no\.txt"):
        mlflow_run.fetch_artifact(database, ids.pop(), "no.txt")
