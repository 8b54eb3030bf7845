"""Complete runs in one process: what they write, how they resume, what they refuse."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from mlflow_history import fetch_history
from raydetr.config import ConfigError, RunConfig, from_yaml, override
from raydetr.data.order import ORDER_VERSION
from raydetr.evaluation import stored
from raydetr.evaluation.score import speed
from raydetr.runs import run
from raydetr.runs.evaluate import evaluate_checkpoint
from raydetr.runs.resolve import resolve
from raydetr.runs.result import Effort
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source
from raydetr.tracking import mlflow_run
from raydetr.tracking.events import Metrics, read_events
from raydetr.tracking.uris import default_uri
from raydetr.training import checkpoint
from raydetr.training.checkpoint import CheckpointError

EPOCH = 48  # samples


REPORT_FILES = (
    "report.html", "report.json", "precision_recall.png", "classes.png", "tide.png", "confusion.png",
    "calibration.png", "mistakes.jpg", "losses.jpg",
)  # fmt: skip


def at(run_folder: Path, epoch: int) -> Path:
    """The folder of the checkpoint after an epoch of the tiny data."""
    return checkpoint.folder_of(run_folder, epoch * EPOCH)


def positions(run_folder: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (run_folder / "checkpoints").iterdir())


def state_of(folder: Path) -> dict:
    return torch.load(folder / "state.pt", weights_only=True)


def assert_same_state(first: Path, second: Path) -> None:
    """Bit for bit: weights, moving average, optimizer, position."""
    a, b = (torch.utils._pytree.tree_flatten(state_of(folder)) for folder in (first, second))
    assert a[1] == b[1]
    for left, right in zip(a[0], b[0], strict=True):
        same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
        assert same, (left, right)


def test_a_run_leaves_checkpoints_metrics_and_artifacts(tiny_run: RunConfig) -> None:
    config = override(tiny_run, {"optim.epochs": 2, "tracking.upload": True, "evaluation.report": True})
    result = run.start(config, local=True)
    assert from_yaml(result.folder / "config.yaml").model.num_classes == 4  # filled in from the data
    assert positions(result.folder) == [48, 96]
    tracked = mlflow_run.fetch_run(result.tracking_uri, result.mlflow_run_id)
    assert tracked.status == "FINISHED"
    assert tracked.params["optim.lr"] == "0.004"
    assert {
        "AP/AP", "AP/AP50", "loss/loss", "loss_aux/giou_dn", "lr/backbone", "loss/grad_norm", "time/images_per_second",
        "time/latency_ms", "time/evaluation_images_per_second",
    } <= set(tracked.metrics)  # fmt: skip
    assert set(tracked.artifacts) == {
        "config.yaml", f"environment/{socket.gethostname()}.json", "checkpoint.json", "evaluation/ap.json",
        "evaluation/ap.md", "evaluation/evaluation.json", "curves.png", "predictions.png",
        *(f"evaluation/report/{name}" for name in REPORT_FILES),
    }  # fmt: skip
    reference = json.loads(
        mlflow_run.fetch_artifact(result.tracking_uri, result.mlflow_run_id, "checkpoint.json")
    )
    assert checkpoint.read_meta(Path(reference["path"])).fingerprint == reference["fingerprint"]
    table = json.loads(
        mlflow_run.fetch_artifact(result.tracking_uri, result.mlflow_run_id, "evaluation/ap.json")
    )
    assert table["AP"] == result.metrics["AP"] == tracked.metrics["AP/AP"]
    parts = stored.read_parts(stored.folder_of(result.folder, 96), 1)
    times = speed(parts)
    assert result.metrics["latency_ms"] == times["latency_ms"] == tracked.metrics["time/latency_ms"]
    rate = tracked.metrics["time/evaluation_images_per_second"]
    assert result.metrics["evaluation_images_per_second"] == times["images_per_second"] == rate
    page = (stored.folder_of(result.folder, 96) / "report" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 24  # mistakes and largest losses
    assert page.count("<b>loss ") == 12
    assert [row["name"] for row in table["classes"]] == ["disc", "ring", "square", "triangle"]
    steps = [step for step, _ in fetch_history(result.tracking_uri, result.mlflow_run_id)["loss/loss"]]
    assert steps == [2, 4, 6, 8, 10, 12]
    assert evaluate_checkpoint(result.checkpoint, None, local=True)["AP"] == result.metrics["AP"]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tiny_run: RunConfig) -> None:
    short = override(tiny_run, {"optim.epochs": 1})
    first, second = run.start(short, local=True), run.start(short, local=True)
    assert first.folder != second.folder
    assert_same_state(first.checkpoint, second.checkpoint)
    other = run.start(override(short, {"seed": 1}), local=True)
    weights, others = (state_of(r.checkpoint)["model"] for r in (first, other))
    drawn = [name for name in weights if name.startswith("backbone.") and weights[name].ndim == 4]
    assert drawn
    assert not any(torch.equal(weights[name], others[name]) for name in drawn)


def test_a_resumed_run_ends_in_the_same_bits_as_an_unbroken_one(
    tiny_run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken = run.start(tiny_run, local=True)
    broken = unbroken.folder.with_name("broken")
    shutil.copytree(unbroken.folder, broken)
    for late in (3, 4):
        shutil.rmtree(at(broken, late))
    # A checkpoint that was damaged after it was written is skipped, with a line
    cut = at(broken, 3)
    shutil.copytree(at(broken, 2), cut)
    size = (cut / "state.pt").stat().st_size
    with (cut / "state.pt").open("r+b") as file:
        file.truncate(1000)
    capsys.readouterr()
    resumed = run.resume(broken, local=True)
    line = f"skipped: {cut}/state.pt: 1000 bytes, expected {size}: the copy is incomplete"
    assert capsys.readouterr().err.splitlines().count(line) == 1
    assert positions(broken) == [48, 96, 144, 192]
    assert_same_state(resumed.checkpoint, unbroken.checkpoint)
    assert resumed.metrics["AP"] == unbroken.metrics["AP"]
    rows = Metrics(read_events(resumed.folder)).rows
    assert [row["step"] for row in rows if "loss" in row] == list(range(2, 25, 2))


def test_epochs_that_the_batch_size_does_not_divide_end_and_so_does_the_run(tiny_run: RunConfig) -> None:
    config = override(tiny_run, {"data.limit_images": 13, "optim.epochs": 3})
    result = run.start(config, local=True)
    meta = checkpoint.read_meta(result.checkpoint)
    assert (meta.epoch, meta.position) == (3, 40)  # 3 * 13 = 39 samples need 5 steps of 8
    assert positions(result.folder) == [16, 32, 40]


def test_a_run_with_fewer_images_than_a_batch_ends_with_an_evaluation(tiny_run: RunConfig) -> None:
    config = override(
        tiny_run, {"data.limit_images": 3, "evaluation.every_epochs": 4}
    )  # 12 samples, 2 steps of 8
    result = run.start(config, local=True)
    assert checkpoint.read_meta(result.checkpoint).epoch == 4
    assert checkpoint.read_meta(result.checkpoint).position == 16


def test_the_newest_checkpoints_and_the_best_are_kept(tiny_run: RunConfig) -> None:
    result = run.start(override(tiny_run, {"storage.keep_checkpoints": 1}), local=True)
    evaluations = [event for event in read_events(result.folder) if event["kind"] == "evaluation"]
    scores = {event["position"] // EPOCH: event["metrics"]["AP"] for event in evaluations}
    assert list(scores) == [1, 2, 3, 4]
    best = max(scores, key=lambda epoch: (scores[epoch], epoch))
    assert positions(result.folder) == sorted({EPOCH * best, 4 * EPOCH})
    assert checkpoint.best(result.folder) == at(result.folder, best)
    # RUN, RUN/best and RUN/last stand for a checkpoint in every command
    assert (
        checkpoint.find(result.folder) == checkpoint.find(result.folder / "best") == at(result.folder, best)
    )
    assert checkpoint.find(result.folder / "last") == at(result.folder, 4) == result.checkpoint
    assert evaluate_checkpoint(result.folder / "best", None, local=True)["AP"] == scores[best]


def test_a_corrupt_best_checkpoint_is_passed_over_with_a_line(
    tiny_run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run.start(override(tiny_run, {"optim.epochs": 2}), local=True)
    for epoch, ap in ((1, 0.5), (2, 0.25)):
        metrics = checkpoint.read_metrics(at(result.folder, epoch)) | {"AP": ap}
        (at(result.folder, epoch) / "metrics.json").write_text(json.dumps(metrics))
    assert checkpoint.find(result.folder) == at(result.folder, 1)
    state = at(result.folder, 1) / "state.pt"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    for location in (result.folder, result.folder / "best"):
        assert checkpoint.find(location) == at(result.folder, 2)
        assert f"skipped: {state}: checksum differs" in " ".join(capsys.readouterr().err.split())
    (at(result.folder, 2) / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="this run has no evaluated checkpoint"):
        checkpoint.find(result.folder / "best")


def test_a_run_is_resumed_from_its_newest_checkpoint_only(tiny_run: RunConfig) -> None:
    short = override(tiny_run, {"optim.epochs": 1})
    folder = run.start(short, local=True).folder
    for location in (folder / "best", at(folder, 1)):
        with pytest.raises(ConfigError, match=rf"goes on from its newest checkpoint: give {folder};"):
            run.resume(location, overrides={"optim.epochs": 2}, local=True)
    longer = run.resume(folder / "last", overrides={"optim.epochs": 2}, local=True)
    assert checkpoint.read_meta(longer.checkpoint).position == 96
    assert checkpoint.read_meta(longer.checkpoint).versions["torch"] == torch.__version__
    text = " ".join(longer.to_text().split())
    assert "s with start-up, 96 images, resumed 1 time), peak memory" in text


def test_what_a_run_took_is_that_of_all_its_drivers() -> None:
    kinds = [
        ("launched", 100.0), ("started", 110.0), ("restart", 130.0), ("resumed", 140.0), ("step", 150.0),
        ("lost", 5000.0), ("launched", 9000.0), ("resumed", 9010.0), ("restart", 9020.0), ("finished", 9030.0),
    ]  # fmt: skip
    events = [{"kind": kind, "time": time} for kind, time in kinds]
    assert Effort.of(events[::-1]) == Effort(seconds=50.0 + 30.0, num_restarts=2, num_resumes=1)


def test_more_epochs_of_a_finished_run_continue_from_its_end(tiny_run: RunConfig) -> None:
    first = run.start(override(tiny_run, {"optim.epochs": 1}), local=True)
    longer = run.resume(first.folder, overrides={"optim.epochs": 2}, local=True)
    assert checkpoint.read_meta(longer.checkpoint).position == 96


def test_the_result_of_a_job_whose_working_directory_was_removed_is_printed(
    tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray removes it when the driver disconnects."""
    result = run.start(override(tiny_run, {"optim.epochs": 1}), local=True)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "mlflow ui --backend-store-uri" in result.to_text()


def test_resuming_a_finished_run_is_refused(tiny_run: RunConfig) -> None:
    finished = run.start(override(tiny_run, {"optim.epochs": 1}), local=True)
    with pytest.raises(ConfigError, match=r"all 1 epochs; set optim\.epochs"):
        run.resume(finished.folder, local=True)


def test_resume_refuses_other_data_another_model_and_no_run(
    tiny_run: RunConfig, tiny_data: Path, tmp_path: Path
) -> None:
    done = run.start(override(tiny_run, {"optim.epochs": 1}), local=True)
    with pytest.raises(
        CheckpointError, match=r"model\.num_queries is 25 in the checkpoint and 30 in the run"
    ):
        run.resume(done.folder, overrides={"model.num_queries": 30, "optim.epochs": 2}, local=True)
    with pytest.raises(CheckpointError, match=r"other data \(fingerprint .*\).*start a new run"):
        run.resume(
            done.folder, overrides={"data.train": str(tiny_data / "val"), "optim.epochs": 9}, local=True
        )
    with pytest.raises(CheckpointError, match="made with seed 0, the run has 3"):
        run.resume(done.folder, overrides={"seed": 3, "optim.epochs": 2}, local=True)
    with pytest.raises(
        ConfigError, match=r"not the folder of a run, storage.path/NAME \(config\.yaml is missing\)"
    ):
        run.resume(tmp_path, local=True)
    shutil.rmtree(done.folder / "checkpoints")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run.resume(done.folder, local=True)


def test_resume_refuses_a_checkpoint_of_another_order(tiny_run: RunConfig) -> None:
    done = run.start(override(tiny_run, {"optim.epochs": 1}), local=True)
    description = done.checkpoint / "meta.json"
    meta = json.loads(description.read_text())
    assert meta.pop("order") == ORDER_VERSION
    description.write_text(json.dumps(meta))  # as the first checkpoints were
    with pytest.raises(
        CheckpointError,
        match=rf"position 48 .* version 1 of the order.* version {ORDER_VERSION} .*init\.checkpoint=",
    ):
        run.resume(done.folder, overrides={"optim.epochs": 2}, local=True)
    meta = {**meta, "order": ORDER_VERSION}
    description.write_text(json.dumps(meta))
    resumed = run.resume(done.folder, overrides={"optim.epochs": 2}, local=True)
    assert resumed.checkpoint == at(done.folder, 2)


def test_num_classes_that_contradicts_the_data_is_refused(tiny_run: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"model\.num_classes is 3, but .*train has 4 classes.*set it to 4"):
        resolve(override(tiny_run, {"model.num_classes": 3}))
    with pytest.raises(ConfigError, match=r"model\.num_classes is 9"):
        resolve(override(tiny_run, {"model.num_classes": 9}))
    # The official convention has labels without a category
    official = override(tiny_run, {"model.num_classes": 91, "data.label_map": "category_id"})
    assert resolve(official)[0].model.num_classes == 91


def test_more_workers_than_images_are_refused_where_batch_norm_needs_an_image(
    tiny_run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve(override(tiny_run, {"cluster.num_workers": 3}))  # shares of 2 and 3 images
    assert "without an image" not in capsys.readouterr().err
    more = override(tiny_run, {"cluster.num_workers": 10})
    message = r"data\.batch_size=8 leaves 2 of cluster\.num_workers=10 without an image.* use 1 to 8 workers"
    with pytest.raises(ConfigError, match=message):
        resolve(override(more, {"model.backbone.norm": "batch"}))
    resolve(override(more, {"model.backbone.norm": "frozen"}))
    assert "leaves 2 of cluster.num_workers=10 without an image" in capsys.readouterr().err


def test_splits_with_other_categories_are_refused(
    tiny_run: RunConfig, tiny_data: Path, tmp_path: Path
) -> None:
    annotations = json.loads((tiny_data / "coco/annotations/instances_val.json").read_text())
    annotations["categories"][0]["name"] = "plate"
    renamed = tmp_path / "renamed.json"
    renamed.write_text(json.dumps(annotations))
    write_source(coco_source(tiny_data / "coco/val", renamed), tmp_path / "val")
    with pytest.raises(ValueError, match=r"different categories.*plate"):
        resolve(override(tiny_run, {"data.val": str(tmp_path / "val")}))


def test_a_diverging_run_stops_with_step_images_and_remedy_and_is_marked_failed(tiny_run: RunConfig) -> None:
    wild = override(tiny_run, {"optim.lr": 1e30, "optim.lr_backbone": 1e30, "optim.warmup_fraction": 0.0,
                               "tracking.upload": True})  # fmt: skip
    with pytest.raises((FloatingPointError, ValueError), match=r"finite|NaN|nan"):
        run.start(wild, local=True)
    uri = default_uri(tiny_run.storage.path)
    (folder,) = Path(tiny_run.storage.path).glob("quickstart-*")
    assert mlflow_run.fetch_run(uri, folder.name).status == "FAILED"


def test_a_model_that_cannot_be_built_is_refused_before_anything_starts(tiny_run: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"model\.hidden_dim: 65 is not a multiple of 4"):
        run.start(override(tiny_run, {"model.hidden_dim": 65}))
    assert not Path(tiny_run.storage.path).exists()
