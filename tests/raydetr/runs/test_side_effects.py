"""What only tracks, draws or describes a run must not end it: the run ends as usual, with a warning."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from raydetr.config import RunConfig, override
from raydetr.inference.predict import predict
from raydetr.runs import pictures, run
from raydetr.runs.overfit import overfit
from raydetr.tracking import mlflow_run
from raydetr.tracking.events import Metrics, read_events
from raydetr.training import nonfinite
from raydetr.training.checkpoint import read_meta
from small_checkpoint import write_checkpoint

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")


@pytest.fixture
def short(tiny_run: RunConfig) -> RunConfig:
    return override(tiny_run, {"optim.epochs": 1, "data.limit_images": 8, "tracking.log_every_steps": 1})


class FailingServer:
    """An MLflow server that creates a run, and answers 500 to everything after it."""

    def __init__(self, *, creates: bool) -> None:
        outer = self
        self.num_failed = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                found: dict[str, Any] = {}
                if creates and "experiments/get-by-name" in self.path:
                    found = {"experiment": {"experiment_id": "1", "name": "raydetr"}}
                if creates and "runs/create" in self.path:
                    found = {"run": {"info": {"run_id": "a" * 32, "run_name": "x", "experiment_id": "1"}}}
                outer.num_failed += not found
                self.send_response(200 if found else 500)
                self.end_headers()
                self.wfile.write(json.dumps(found or {"error_code": "INTERNAL_ERROR"}).encode())

            do_GET = do_POST = do_PATCH = do_PUT = answer

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def creates_only() -> Iterator[FailingServer]:
    server = FailingServer(creates=True)
    yield server
    server.stop()


@pytest.fixture
def broken() -> Iterator[FailingServer]:
    server = FailingServer(creates=False)
    yield server
    server.stop()


def assert_is_complete(result: run.RunResult) -> None:
    assert read_meta(result.checkpoint).epoch >= 1
    assert "AP" in result.metrics
    assert str(result.checkpoint) in result.to_text()


def test_a_server_that_refuses_is_replaced_by_a_database(
    short: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run.start(override(short, {"tracking.uri": NOWHERE}), local=True)
    assert_is_complete(result)
    own = mlflow_run.default_uri(result.folder)
    err = " ".join(capsys.readouterr().err.split())
    assert f"warning: could not create the run {result.name} in MLflow at {NOWHERE}" in err
    assert f"this run is logged in {own}" in err
    tracked = mlflow_run.fetch_run(own, result.name)
    assert tracked.status == "FINISHED"
    assert tracked.metrics["AP"] == result.metrics["AP"]


@pytest.mark.slow
def test_a_server_that_answers_500_from_the_beginning(short: RunConfig, broken: FailingServer) -> None:
    result = run.start(override(short, {"tracking.uri": broken.uri}), local=True)
    assert_is_complete(result)
    assert broken.num_failed >= 1
    longer = run.resume(result.folder, overrides={"optim.epochs": 2}, local=True)
    assert longer.mlflow_run_id == result.mlflow_run_id
    own = mlflow_run.default_uri(result.folder)
    assert mlflow_run.fetch_run(own, result.name).status == "FINISHED"


def test_a_server_that_answers_500_later(
    short: RunConfig, creates_only: FailingServer, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run.start(override(short, {"tracking.uri": creates_only.uri}), local=True)
    assert_is_complete(result)
    assert creates_only.num_failed >= 3  # of the description, of metrics, of the reference at the end
    err = " ".join(capsys.readouterr().err.split())
    for action in ("log the params", "finish the run"):
        assert f"warning: could not {action}" in err or "could not store checkpoint.json" in err
    assert f"warning: MLflow at {creates_only.uri}: " in err or "did not reach MLflow" in err
    rows = Metrics(read_events(result.folder)).rows
    assert any("AP" in row for row in rows)


@pytest.mark.slow
def test_a_run_resumes_without_its_server(short: RunConfig, creates_only: FailingServer) -> None:
    result = run.start(override(short, {"tracking.uri": creates_only.uri}), local=True)
    creates_only.stop()
    assert_is_complete(run.resume(result.folder, overrides={"optim.epochs": 2}, local=True))


@pytest.mark.slow
@pytest.mark.parametrize("error", [MlflowException("500"), ModuleNotFoundError("No module named 'boto3'")])
def test_an_artifact_store_that_fails(
    short: RunConfig, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow lets the errors of the store's client through."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(mlflow_run.MlflowClient, "log_artifact", fail)
    result = run.start(short, local=True)
    assert_is_complete(result)
    assert str(error) in capsys.readouterr().err
    tracked = mlflow_run.fetch_run(result.tracking_uri, result.mlflow_run_id)
    assert tracked.metrics["AP"] == result.metrics["AP"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learning_curves", "draw_grid", "coco_boxes", "decode_image"])
def test_a_picture_that_cannot_be_drawn(
    short: RunConfig, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("raqm_layout() failed.")

    monkeypatch.setattr(pictures, name, fail)
    result = run.start(short, local=True)
    assert_is_complete(result)
    missing, other = sorted(pictures.PICTURES, key=lambda file: file == "curves.png")
    if name == "learning_curves":
        missing, other = other, missing
    err = " ".join(capsys.readouterr().err.split())
    assert f"warning: no {missing} of this evaluation: RuntimeError: raqm_layout() failed." in err
    assert not (result.folder / missing).exists()
    assert (result.folder / other).exists()
    tracked = mlflow_run.fetch_run(result.tracking_uri, result.mlflow_run_id)
    assert tracked.status == "FINISHED"
    assert other in tracked.artifacts


def test_overfitting_without_pictures(
    short: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no font")

    for name in ("draw_grid", "learning_curves"):
        monkeypatch.setattr(pictures, name, fail)
    found = overfit(short, None, num_images=2, num_steps=2, long_side=64, out=tmp_path / "out")
    assert found.predictions is None
    assert "warning: no predictions.png of this evaluation: OSError: no font" in capsys.readouterr().err
    assert "predictions  -" in found.to_text()
    assert json.loads((tmp_path / "out/overfit.json").read_text())["predictions"] is None


@pytest.mark.slow
def test_a_batch_that_cannot_be_written(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of the batch of a step that was skipped is only for looking at it."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def is_nan(criterion: Any, outputs: Any, *rest: Any, **options: Any) -> nonfinite.StepLoss:
        return nonfinite.StepLoss(nonfinite._nan_loss(outputs), {}, "the loss is NaN")

    monkeypatch.setattr(nonfinite, "_dump", fail)
    monkeypatch.setattr("raydetr.training.loop.compute_loss", is_nan)
    result = run.start(short, local=True)
    assert_is_complete(result)
    err = " ".join(capsys.readouterr().err.split())
    assert "Not all of it could be written: OSError: [Errno 28] No space left on device" in err


def test_predictions_without_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("raqm_layout() failed.")

    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    for stem in ("a", "b" * 250):  # as long as a name may be
        Image.fromarray(pixels).save(tmp_path / f"{stem}.jpg")
    predicted = predict(checkpoint, [tmp_path / f"{'b' * 250}.jpg"], tmp_path / "long", device="cpu")
    assert predicted.notes == []
    assert [path.name for path in (tmp_path / "long").glob("*.jpg")] == [f"00001-{'b' * 60}.jpg"]
    monkeypatch.setattr("raydetr.inference.predict.draw_boxes", fail)
    predicted = predict(checkpoint, [tmp_path / "a.jpg"], tmp_path / "out", device="cpu")
    assert json.loads((tmp_path / "out/results.json").read_text()) == predicted.results != []
    assert predicted.notes == [f"no picture of {tmp_path}/a.jpg: RuntimeError: raqm_layout() failed."]
