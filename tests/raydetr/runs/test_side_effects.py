"""What only tracks, draws or describes a run must not end it: the run ends as usual, with a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydetr.config import RunConfig, override
from raydetr.inference.predict import predict
from raydetr.runs import pictures, run
from raydetr.runs.overfit import overfit
from raydetr.runs.sync import sync_runs
from raydetr.tracking import description, mlflow_run
from raydetr.tracking.uris import default_uri
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


def assert_is_complete(result: run.RunResult) -> None:
    assert read_meta(result.checkpoint).epoch >= 1
    assert "AP" in result.metrics
    assert str(result.checkpoint) in result.to_text()


def test_a_run_without_its_server_is_complete_and_uploaded_later(
    short: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run.start(override(short, {"tracking.uri": NOWHERE, "tracking.upload": True}), local=True)
    assert_is_complete(result)
    assert result.pending_upload is not None
    err = " ".join(capsys.readouterr().err.split())
    assert f"warning: could not upload {result.name} in MLflow at {NOWHERE}: " in err
    assert f"Send it with `raydetr track sync {result.folder}`" in err
    longer = run.resume(result.folder, overrides={"optim.epochs": 2}, local=True)
    assert_is_complete(longer)
    uri = default_uri(tmp_path / "later")
    (line,) = sync_runs([str(result.folder)], uri)
    assert line.startswith(f"{result.name}: sent ")
    tracked = mlflow_run.fetch_run(uri, result.name)
    assert tracked.status == "FINISHED"
    assert tracked.metrics["AP/AP"] == longer.metrics["AP"]
    assert list(sync_runs([str(result.folder)], uri)) == [f"{result.name}: complete"]


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
    missing, other = sorted(description.PICTURES, key=lambda file: file == "curves.png")
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
