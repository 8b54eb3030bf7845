"""Runs whose evaluations are scored while training goes on: what waits for the AP, and what a kill does not lose."""

from __future__ import annotations

import errno
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detrs import zoo
from raydetr.config import RunConfig, override
from raydetr.data.splits import open_splits
from raydetr.evaluation import scoring, stored
from raydetr.runs import run, session
from raydetr.runs.run_folder import Run
from raydetr.tracking.events import Metrics, read_events
from raydetr.training import checkpoint, loop
from raydetr.training.loop import EvaluationReport, StepReport, Training, train
from raydetr.training.world import World
from tiny_runs import tiny_config

pytestmark = pytest.mark.xdist_group("scoring")  # one run to compare with

EPOCH = 48  # samples
SHORT = {"optim.epochs": 3, "tracking.log_every_steps": 1}  # epochs of 6 steps


@pytest.fixture
def short(tiny_run: RunConfig) -> RunConfig:
    return override(tiny_run, SHORT)


@pytest.fixture(scope="module")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> run.RunResult:
    """A run of `short`, which no test may change."""
    config = override(tiny_config(tiny_data, tmp_path_factory.mktemp("runs")), SHORT)
    return run.start(config, local=True, name="undisturbed")


def die(*arguments: object, **settings: object) -> None:
    raise KeyboardInterrupt


class HeldScoring:
    """No process starts to score before `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.num_tries, popen = threading.Event(), 0, subprocess.Popen

        def start(command: list[str], **options: Any) -> Any:
            if "raydetr.evaluation.score" in command:
                self.num_tries += 1
                assert self.go.wait(120)
            return popen(command, **options)

        monkeypatch.setattr(subprocess, "Popen", start)


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Call `action` before a step."""
    take = Training.train_step

    def hooked(self: Training, *batches: Any) -> Any:
        if self.step == step:
            action()
        return take(self, *batches)

    monkeypatch.setattr(Training, "train_step", hooked)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The events of evaluations, without how fast they were."""
    events = [event for event in read_events(folder) if event["kind"] == "evaluation"]
    for event in events:
        for name in ("latency_ms", "evaluation_images_per_second", "worker_hours", "cpu_seconds"):
            assert event["metrics"].pop(name) >= 0
    return events


def test_training_goes_on_while_an_evaluation_is_scored(
    short: RunConfig, undisturbed: run.RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldScoring(monkeypatch)
    after_step(monkeypatch, 15, held.go.set)  # in the third epoch
    result = run.start(short, local=True, name="held")
    kinds = [(event["kind"], event.get("step")) for event in read_events(result.folder)]
    first = kinds.index(("evaluation", 6))
    assert ("step", 14) in kinds[:first]  # two evaluations had been made by then
    for event, expected in zip(evaluations(result.folder), evaluations(undisturbed.folder), strict=True):
        # Of the evaluation, not of the time when it was scored
        assert [event[name] for name in ("step", "position", "metrics")] == [
            expected[name] for name in ("step", "position", "metrics")
        ]
    assert [event["position"] for event in evaluations(result.folder)] == [EPOCH, 2 * EPOCH, 3 * EPOCH]
    for path in checkpoint.complete_checkpoints(result.folder):
        same = checkpoint.read_metrics(undisturbed.folder / "checkpoints" / path.name)
        assert checkpoint.read_metrics(path)["table"] == same["table"]
    assert (result.folder / "predictions.png").exists()
    assert (result.folder / "curves.png").exists()


def test_the_checkpoint_of_an_evaluation_without_ap_is_kept_and_the_best_stays_the_best(
    short: RunConfig, undisturbed: run.RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    aps = {event["position"]: event["metrics"]["AP"] for event in evaluations(undisturbed.folder)}
    best = max(aps, key=lambda position: (aps[position], position))
    # Make the first the best one, so that retention would have removed it
    score, seen = scoring.read_table, []

    def first_is_best(content: dict[str, Any]) -> Any:
        table = score(content)
        seen.append(content["position"])
        return type(table)(
            {**table.numbers, "AP": 0.9 if content["position"] == EPOCH else 0.1}, table.classes
        )

    monkeypatch.setattr(scoring, "read_table", first_is_best)
    held = HeldScoring(monkeypatch)
    kept: list[list[int]] = []
    folder = Path(short.storage.path) / "held"

    def look() -> None:
        kept.append(sorted(map(checkpoint.position_of, checkpoint.complete_checkpoints(folder))))
        held.go.set()

    after_step(monkeypatch, 17, look)
    config = override(short, {"storage.keep_checkpoints": 1, "storage.checkpoint_steps": 2})
    result = run.start(config, local=True, name="held")
    assert kept[0][:2] == [EPOCH, 2 * EPOCH]  # neither has its AP
    assert len(kept[0]) == 3  # and the newest one
    assert seen == [EPOCH, 2 * EPOCH, 3 * EPOCH]
    assert checkpoint.best(result.folder) == checkpoint.folder_of(result.folder, EPOCH)
    left = sorted(map(checkpoint.position_of, checkpoint.complete_checkpoints(result.folder)))
    assert left == [EPOCH, 3 * EPOCH]
    # Arrays are kept with their checkpoint; what was computed from them is always kept
    assert [each.position for each in stored.complete_evaluations(result.folder)] == [EPOCH, 3 * EPOCH]
    assert not (stored.folder_of(result.folder, 2 * EPOCH) / "detections").exists()
    assert all(stored.read_evaluation(stored.folder_of(result.folder, position)) for position in aps)
    assert best in aps


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_kill_while_an_evaluation_is_scored_loses_nothing(
    short: RunConfig, undisturbed: run.RunResult, monkeypatch: pytest.MonkeyPatch, at_the_end: bool
) -> None:
    """The resumed run scores what is there, and evaluates nothing again."""
    folder = Path(short.storage.path) / "hit"

    with monkeypatch.context() as patched:
        HeldScoring(patched)
        if at_the_end:
            patched.setattr(session._Session, "_wait_for_scores", die)
        else:
            after_step(patched, 14, die)
        with pytest.raises(KeyboardInterrupt):
            run.start(short, local=True, name="hit")
    assert evaluations(folder) == []
    last = 3 * EPOCH if at_the_end else 2 * EPOCH
    assert [each.position for each in stored.complete_evaluations(folder)] == list(
        range(EPOCH, last + 1, EPOCH)
    )
    made: list[int] = []
    evaluate = Training.evaluate

    def count(self: Training, *arguments: Any) -> Any:
        made.append(self.position)
        return evaluate(self, *arguments)

    monkeypatch.setattr(Training, "evaluate", count)
    resumed = run.resume(folder, local=True)
    assert made == ([] if at_the_end else [3 * EPOCH])
    found, expected = (
        [(event["position"], event["metrics"]) for event in evaluations(each.folder)]
        for each in (resumed, undisturbed)
    )
    assert found == expected
    assert resumed.metrics["table"] == undisturbed.metrics["table"]
    assert all(checkpoint.read_metrics(path) for path in checkpoint.complete_checkpoints(folder))


def test_an_evaluation_on_other_shards_is_made_again(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(short.storage.path) / "hit"

    with monkeypatch.context() as patched:
        HeldScoring(patched)
        after_step(patched, 7, die)
        with pytest.raises(KeyboardInterrupt):
            run.start(short, local=True, name="hit")
    resumed = run.resume(folder, overrides={"data.val": short.data.train, "optim.epochs": 1}, local=True)
    (only,) = evaluations(folder)
    assert only["position"] == EPOCH
    num_objects = sum(row["num_objects"] for row in resumed.metrics["table"]["classes"])
    assert num_objects == len(
        open_splits(override(short, {"data.val": short.data.train}).data)[1].coco()["annotations"]
    )


def test_a_scoring_that_fails_is_told_and_done_in_the_process_at_the_end(
    short: RunConfig,
    undisturbed: run.RunResult,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    popen = subprocess.Popen

    def fail(command: list[str], **options: Any) -> Any:
        if "raydetr.evaluation.score" in command:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", fail)
    monkeypatch.setattr(scoring, "PAUSE_SECONDS", 0.0)
    result = run.start(short, local=True, name="failing")
    failed = [event for event in read_events(result.folder) if event["kind"] == "scoring_failed"]
    assert [event["position"] for event in failed] == [
        EPOCH,
        EPOCH,
        2 * EPOCH,
        2 * EPOCH,
        3 * EPOCH,
        3 * EPOCH,
    ]
    assert "Cannot allocate memory" in failed[0]["reason"]
    assert "is not scored yet: [Errno 12] Cannot allocate memory" in " ".join(capsys.readouterr().err.split())
    assert [event["metrics"] for event in evaluations(result.folder)] == [
        event["metrics"] for event in evaluations(undisturbed.folder)
    ]


def test_arrays_that_cannot_be_written_are_scored_all_the_same(
    short: RunConfig,
    undisturbed: run.RunResult,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The disk of the run is full, that of the machine is not."""
    write, folder = session.write_file, Path(short.storage.path) / "full"

    def full(path: Path, content: bytes) -> None:
        if path.suffix == ".npz" and path.is_relative_to(folder):
            raise OSError(errno.ENOSPC, f"{path}: No space left on device")
        write(path, content)

    monkeypatch.setattr(session, "write_file", full)
    result = run.start(short, local=True, name="full")
    assert [event["metrics"] for event in evaluations(folder)] == [
        event["metrics"] for event in evaluations(undisturbed.folder)
    ]
    assert stored.complete_evaluations(folder) == []
    assert stored.read_evaluation(stored.folder_of(folder, 3 * EPOCH)) is not None
    assert (result.folder / "predictions.png").read_bytes() == (
        undisturbed.folder / "predictions.png"
    ).read_bytes()
    err = " ".join(capsys.readouterr().err.split())
    assert "the detections of this evaluation are scored, but cannot be kept" in err


def test_a_report_that_cannot_be_written_does_not_end_the_run(
    short: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write, folder = scoring.write_file, Path(short.storage.path) / "full"

    def full(path: Path, content: bytes) -> None:
        if path.suffix == ".jpg":
            raise OSError(errno.ENOSPC, f"{path}: No space left on device")
        write(path, content)

    monkeypatch.setattr(scoring, "write_file", full)
    config = override(short, {"optim.epochs": 1, "evaluation.report": True})
    result = run.start(config, local=True, name="full")
    (only,) = evaluations(folder)
    assert only["position"] == EPOCH
    assert result.metrics["AP"] == only["metrics"]["AP"]
    assert not (stored.folder_of(folder, EPOCH) / "report" / "losses.jpg").exists()
    assert "losses.jpg: No space left on device" in " ".join(capsys.readouterr().err.split())


class Search:
    """Takes the reports of a session, as a search does."""

    def __init__(self) -> None:
        self.reported: list[tuple[int, Mapping[str, Any]]] = []
        self.training_step = 0

    def report(self, metrics: Mapping[str, Any]) -> None:
        self.reported.append((self.training_step, metrics))

    def show(self, progress: Any) -> None:
        self.training_step = progress.step

    def should_stop(self) -> bool:
        return False


@pytest.mark.parametrize("waits", [True, False])
def test_a_search_gets_the_ap_before_the_next_step_and_a_plain_run_reports_nothing(
    short: RunConfig, undisturbed: run.RunResult, tmp_path: Path, waits: bool
) -> None:
    search, config = Search(), run.resolve(short)[0]
    session.run_session(
        Run(config, tmp_path / "trial", waits_for_scores=waits), World.single_process(), search
    )
    assert [event["metrics"] for event in evaluations(tmp_path / "trial")] == [
        event["metrics"] for event in evaluations(undisturbed.folder)
    ]
    if not waits:
        assert search.reported == []
        return
    assert [step for step, _ in search.reported] == [6, 12, 18]
    expected = [event["metrics"]["AP"] for event in evaluations(undisturbed.folder)]
    assert [metrics["AP"] for _, metrics in search.reported] == expected
    assert [metrics["epoch"] for _, metrics in search.reported] == [1, 2, 3]
    assert all(metrics["latency_ms"] > 0 for _, metrics in search.reported)


def test_a_search_gets_the_ap_of_an_evaluation_before_a_kill(
    short: RunConfig, undisturbed: run.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = run.resolve(short)[0], tmp_path / "trial"

    with monkeypatch.context() as patched:
        patched.setattr(session._Session, "_wait_for_scores", die)
        with pytest.raises(KeyboardInterrupt):
            session.run_session(Run(config, folder, waits_for_scores=True), World.single_process(), Search())
    last = checkpoint.newest_valid(folder, pytest.fail)
    search = Search()
    session.run_session(Run(config, folder, last, waits_for_scores=True), World.single_process(), search)
    expected = [event["metrics"]["AP"] for event in evaluations(undisturbed.folder)]
    assert [metrics["AP"] for _, metrics in search.reported] == expected
    assert [metrics["epoch"] for _, metrics in search.reported] == [1, 2, 3]


def test_a_resume_after_a_scored_evaluation_scores_nothing_again(
    undisturbed: run.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(undisturbed.folder, tmp_path / "copy")
    last = checkpoint.folder_of(folder, 3 * EPOCH)
    before = checkpoint.read_metrics(last)
    added: list[int] = []
    add = scoring.Scoring.add

    def count(self: scoring.Scoring, evaluated: stored.Evaluated, source: Any = None) -> None:
        added.append(evaluated.position)
        add(self, evaluated, source)

    monkeypatch.setattr(scoring.Scoring, "add", count)
    run.resume(folder, overrides={"optim.epochs": 4}, local=True)
    assert added == [4 * EPOCH]
    assert checkpoint.read_metrics(last) == before


def test_metrics_that_were_not_written_before_a_kill_are_written_by_the_resumed_run(
    undisturbed: run.RunResult, tmp_path: Path
) -> None:
    """The AP was in the events by then, and a later checkpoint was complete."""
    copied = shutil.copytree(undisturbed.folder, tmp_path / "copy")
    folder = checkpoint.folder_of(copied, EPOCH)
    before = checkpoint.read_metrics(folder)
    (folder / checkpoint.METRICS).unlink()
    run.resume(copied, overrides={"optim.epochs": 4}, local=True)
    assert checkpoint.read_metrics(folder)["table"] == before["table"]
    positions = [event["position"] for event in evaluations(copied)]
    assert positions == [EPOCH, 2 * EPOCH, 3 * EPOCH, 4 * EPOCH]  # each once


# --- The loop ---


def make_training(config: RunConfig, num_samples: int) -> Training:
    torch.manual_seed(0)
    return Training(config, zoo.build(config.model), num_samples, World.single_process())


def test_the_training_loaders_live_on_during_an_evaluation(
    tiny_run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(tiny_run, {"model.num_classes": 4, "optim.epochs": 2, "data.num_loader_workers": 1})
    train_shards, val_shards = open_splits(config.data)
    training, made, batches = make_training(config, train_shards.num_samples), [], loop.train_batches

    def count(*arguments: Any, **options: Any) -> Any:
        made.append(options["position"])
        return batches(*arguments, **options)

    monkeypatch.setattr(loop, "train_batches", count)
    kinds = [type(report) for report in train(training, train_shards, val_shards)]
    assert (kinds.count(StepReport), kinds.count(EvaluationReport)) == (12, 2)
    assert made == [0]  # one iterator, whose processes end with it


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16)])
def test_an_evaluation_has_the_precision_of_the_training(
    tiny_run: RunConfig, precision: str, dtype: torch.dtype | None
) -> None:
    config = override(tiny_run, {"model.num_classes": 4, "optim.precision": precision})
    _, val_shards = open_splits(config.data)
    training, seen = make_training(config, 48), set()

    def look(*_: object) -> None:
        is_on = torch.is_autocast_enabled("cpu")
        seen.add(torch.get_autocast_dtype("cpu") if is_on else None)

    training.weights.register_forward_pre_hook(look)
    packed = training.evaluate(val_shards)
    assert seen == {dtype}
    assert packed.scores.dtype == np.float32
    assert sorted(packed.evaluated_ids.tolist()) == sorted(val_shards.samples["image_id"].tolist())


def gather_worker(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    try:
        world = World(rank, size, torch.device("cpu"))
        found = world.gather(bytes([rank]) * (rank + 1))
        assert found == ([b"\0", b"\1\1"] if rank == 0 else None)
    finally:
        dist.destroy_process_group()


def test_gather_returns_the_values_of_all_ranks_on_rank_0(tmp_path: Path) -> None:
    assert World.single_process().gather(5) == [5]
    mp.spawn(gather_worker, args=(2, str(tmp_path)), nprocs=2)


def test_metrics_of_a_late_evaluation_are_those_of_its_position() -> None:
    """A row that comes after later steps is one of its own position: a resume keeps or drops it by that."""
    metrics = Metrics()
    rows = [(1, 8), (6, 48), (7, 56)]
    for step, position in rows:
        metrics.add(
            {"kind": "step", "time": 0.0, "step": step, "position": position, "metrics": {"loss": 1.0}}
        )
    late = {"kind": "evaluation", "time": 0.0, "step": 6, "position": 48, "metrics": {"AP": 0.5, "epoch": 1}}
    metrics.add(late)
    metrics.add({"kind": "resumed", "time": time.time(), "position": 48})
    assert metrics.last("AP") == 0.5
    assert [row["position"] for row in metrics.rows] == [8, 48, 48]


def test_the_last_ap_is_that_of_the_last_evaluation_whichever_was_scored_last() -> None:
    metrics = Metrics()
    for position, ap in ((48, 0.1), (144, 0.3), (96, 0.2)):
        metrics.add({"kind": "evaluation", "time": 0.0, "step": position // 8, "position": position,
                     "metrics": {"AP": ap, "epoch": position // 48}})  # fmt: skip
    assert metrics.last("AP") == 0.3
    assert metrics.curves("AP", "epoch") == {"AP": [(1, 0.1), (2, 0.2), (3, 0.3)]}
