"""Scoring in a process of its own: the same AP, failures, and where the files are."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydetr.evaluation import scoring, stored
from raydetr.evaluation.coco_metrics import coco_ap
from raydetr.evaluation.detections import PackedDetections
from raydetr.evaluation.ground_truth import ground_truth, ground_truth_file
from raydetr.evaluation.read_images import from_shards
from raydetr.evaluation.report import analyze, report_files
from raydetr.evaluation.score import Request, speed
from raydetr.evaluation.scoring import Scored, Scoring, ScoringError, Unscored
from raydetr.evaluation.stored import Evaluated
from raydetr.shards.reader import ShardError, Shards, open_shards
from raydetr.shards.validation import RawSample
from raydetr.store.folders import Folder, write_file
from raydetr.store.retry import RemoteError

POSITION = 96


@pytest.fixture(scope="module")
def val(tiny_data: Path) -> Shards:
    return open_shards(tiny_data / "val")


def detections(val: Shards, seed: int = 0) -> PackedDetections:
    """The true boxes, moved."""
    draw = np.random.default_rng(seed)
    annotations = val.coco()["annotations"]
    boxes = np.array([a["bbox"] for a in annotations]) + draw.normal(0, 3, (len(annotations), 4))
    boxes[:, 2:] += boxes[:, :2]
    image_ids = val.samples["image_id"].astype(np.int64)
    return PackedDetections(
        np.array([a["image_id"] for a in annotations], np.int64),
        np.array([a["category_id"] for a in annotations], np.int64),
        boxes.astype(np.float32),
        draw.random(len(annotations)).astype(np.float32),
        image_ids,
        np.full(len(image_ids), 0.25, np.float32),
        np.arange(len(image_ids)) // 4 * 0.5 + 2.0,
        draw.random(len(image_ids)).astype(np.float32),
    )


def write(run: Folder, val: Shards, packed: PackedDetections, num_ranks: int = 2) -> Evaluated:
    """Write an evaluation by ranks which had every n-th image."""
    folder = stored.folder_of(run, POSITION)
    for rank in range(num_ranks):
        share = packed.of_images(packed.evaluated_ids[rank::num_ranks])
        write_file(stored.detections_file(folder, rank), share.to_npz())
    evaluated = Evaluated(POSITION, 12, 2, num_ranks, val.fingerprint, {"corrupt_rows": []})
    stored.mark_complete(folder, evaluated)
    return evaluated


def images_of(page: str) -> list[str]:
    return re.findall(r"data:image/jpeg;base64,[^\"]+", page)


def times(seconds: list[float], ended: list[float]) -> PackedDetections:
    """One image per entry, without detections."""
    of_images = {"evaluated_ids": np.arange(len(ended)), "seconds": np.array(seconds, np.float32),
                 "ended": np.array(ended), "losses": np.zeros(len(ended), np.float32)}  # fmt: skip
    return replace(PackedDetections.concatenate([]), **of_images)


@pytest.mark.parametrize(
    ("parts", "latency", "high", "rate"),
    [
        # Without the first batch: 3 images in 4 s
        ([([9.0, 9.0, 0.1, 0.1, 0.2], [2.0, 2.0, 3.0, 3.0, 6.0])], 100.0, 190.0, 0.75),
        # Two processes: 2 + 1 images, and the slower one took 4 s
        ([([9.0, 0.1, 0.3], [1.0, 3.0, 5.0]), ([8.0, 0.2], [7.0, 8.0])], 200.0, 290.0, 0.75),
        # A process with one batch beside one with two: its batch is a first one, too
        ([([9.0, 0.1], [1.0, 3.0]), ([8.0], [7.0]), ([], [])], 100.0, 100.0, 0.5),
        # Only first batches: they count, from the start
        ([([0.1, 0.1], [2.0, 2.0]), ([0.3], [4.0])], 100.0, 280.0, 0.75),
    ],
)
def test_the_first_batch_of_a_process_does_not_count_in_the_speed(
    parts: list[tuple[list[float], list[float]]], latency: float, high: float, rate: float
) -> None:
    found = speed([times(*part) for part in parts])
    expected = {"latency_ms": latency, "latency_p95_ms": high, "images_per_second": rate}
    assert found == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_without_images_has_no_speed() -> None:
    assert speed([]) == speed([times([], [])]) == {}


class Failures(list[tuple[int, str]]):
    def __call__(self, position: int, reason: str) -> None:
        self.append((position, reason))


def start(run: Folder, val: Shards, failures: Failures) -> Scoring:
    return Scoring(run, val, "raise", "hotcoco", True, failures)


def wait(one: Scoring) -> Scored | Unscored:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for outcome in one.take(1.0):
            return outcome
    raise AssertionError("not scored")


def test_the_process_computes_the_ap_of_the_arrays(run_folder: Folder, val: Shards) -> None:
    """In a folder and at a URL; with the ground truth that the shards have."""
    packed, failures = detections(val), Failures()
    expected = coco_ap(val.coco(), packed.results())
    assert 0.1 < expected["AP"] < 0.9
    one = start(run_folder, val, failures)
    assert one.take() == []
    one.add(write(run_folder, val, packed))
    scored = wait(one)
    assert isinstance(scored, Scored)
    assert (scored.table, scored.problem, scored.num_unreadable_records) == (expected, None, 0)
    assert (one.num_waiting, failures) == (0, [])
    content = stored.read_evaluation(stored.folder_of(run_folder, POSITION))
    assert content is not None
    assert content["metrics"] == dict(expected.numbers)
    assert content["table"] == expected.to_dict()
    parts = [packed.of_images(packed.evaluated_ids[rank::2]) for rank in range(2)]
    assert content["speed"] == scored.speed == speed(parts)
    assert (content["position"], content["epoch"], content["num_images"]) == (POSITION, 2, val.num_samples)
    report = json.loads((stored.folder_of(run_folder, POSITION) / "report" / "report.json").read_text())
    assert report["metrics"]["AP"] == pytest.approx(expected["AP"], abs=1e-12)
    largest = sorted(packed.image_losses().items(), key=lambda pair: -pair[1])[:12]
    assert [(row["image_id"], row["loss"]) for row in report["losses"]] == largest
    page = (stored.folder_of(run_folder, POSITION) / "report" / "report.html").read_text()
    assert "Where AP is lost" in page
    assert val.fingerprint in page
    # The page of `raydetr evaluate --html`, made in one process that reads the shards
    analyzed = analyze(val.coco(), packed.results(), losses=packed.image_losses(), speed=scored.speed)
    about = {"step": "12", "epoch": "2", "position": "96", "fingerprint": val.fingerprint}
    files = report_files(analyzed, from_shards(val), about=about)
    assert images_of(page) == images_of(files["report.html"].decode())
    assert len(images_of(page)) == len(analyzed.mistakes) + 12
    for name in ("mistakes.jpg", "losses.jpg"):
        found = (stored.folder_of(run_folder, POSITION) / "report" / name).read_bytes()
        assert found == files[name]
    truth = json.loads(ground_truth_file(run_folder, val.fingerprint).read_text())
    assert [a["bbox"] for a in truth["annotations"]] == [a["bbox"] for a in val.coco()["annotations"]]


def test_a_report_that_fails_does_not_take_the_ap_with_it(
    tmp_path: Path, val: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, failures = detections(val), Failures()
    one = start(tmp_path, val, failures)
    run_process = Scoring._run_process

    def fail(self: Scoring, request: Request, *rest: Any) -> None:
        # Its process ends before it can write anything
        run_process(self, replace(request, detections=["none"]) if request.images else request, *rest)

    monkeypatch.setattr(Scoring, "_run_process", fail)
    one.add(write(tmp_path, val, packed))
    scored = wait(one)
    assert isinstance(scored, Scored)
    assert scored.table == coco_ap(val.coco(), packed.results())
    assert scored.problem is not None
    assert scored.problem.startswith(
        "an evaluation has no report: its process ended with status 1: FileNotFound"
    )
    folder = stored.folder_of(tmp_path, POSITION)
    assert stored.read_evaluation(folder) is not None
    assert not (folder / "report").exists()
    assert failures == []


@pytest.mark.parametrize("corrupt", [True, False])
def test_images_that_cannot_be_read_are_missing_in_the_report(
    tmp_path: Path, val: Shards, monkeypatch: pytest.MonkeyPatch, corrupt: bool
) -> None:
    """Corrupt ones alone, as the evaluation has told; all of them, with the reason, if the server is away."""
    read_many = Shards.read_many

    def read(self: Shards, indices: Sequence[int]) -> list[RawSample | ShardError]:
        if not corrupt:
            raise RemoteError("the server does not answer")
        return [self.corrupt(indices[0], "it is cut off"), *read_many(self, indices[1:])]

    monkeypatch.setattr("raydetr.shards.reader.Shards.read_many", read)
    packed, failures = detections(val), Failures()
    one = start(tmp_path, val, failures)
    one.add(write(tmp_path, val, packed))
    scored = wait(one)
    assert isinstance(scored, Scored)
    assert scored.table == coco_ap(val.coco(), packed.results())
    assert failures == []
    folder = stored.folder_of(tmp_path, POSITION) / "report"
    page = (folder / "report.html").read_text()
    if corrupt:
        assert scored.problem is None
        assert len(images_of(page)) > 3
        assert "not readable" in page
        return
    assert scored.problem == "the report of an evaluation lacks images: the server does not answer"
    assert page.count("data:image/jpeg") == 0
    assert "Where AP is lost" in page
    assert not (folder / "losses.jpg").exists()


def test_the_ground_truth_is_read_from_the_shards_once(
    tmp_path: Path, val: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated, failures = write(tmp_path, val, detections(val)), Failures()
    first = start(tmp_path, val, failures)
    first.add(evaluated)
    table = wait(first)

    def fail(*_: object) -> None:
        raise AssertionError("the shards are read again")

    monkeypatch.setattr("raydetr.evaluation.ground_truth.ground_truth", fail)
    second = start(tmp_path, val, failures)
    second.add(evaluated)
    assert wait(second) == table


def test_the_ground_truth_has_no_segmentations(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Shards.read_in_order

    def with_segmentations(self: Shards, indices: range) -> Iterator[Any]:
        for sample in read(self, indices):
            assert isinstance(sample, RawSample)
            added = [{**a, "segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]} for a in sample.annotations]
            yield replace(sample, annotations=added)

    monkeypatch.setattr(Shards, "read_in_order", with_segmentations)
    full, truth = shards.coco(), ground_truth(shards, "raise").coco
    assert all("segmentation" in annotation for annotation in full["annotations"])
    assert not any("segmentation" in annotation for annotation in truth["annotations"])
    for name in ("id", "image_id", "category_id", "bbox", "area", "iscrowd"):
        assert [a[name] for a in truth["annotations"]] == [a[name] for a in full["annotations"]]
    assert [image["id"] for image in truth["images"]] == [image["id"] for image in full["images"]]
    assert truth["categories"] == full["categories"]
    head = ground_truth(shards.head(5), "mask").coco
    assert [image["id"] for image in head["images"]] == [image["id"] for image in full["images"]][:5]
    # A file name without brackets, which patterns of files would take for a set of characters
    assert ground_truth_file(Path("run"), shards.head(5).fingerprint).name.endswith("-5.json")


def fail_times(monkeypatch: pytest.MonkeyPatch, number: int, code: str) -> None:
    """The first processes run this code instead."""
    popen, left = scoring.subprocess.Popen, [code] * number

    def start_process(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, "-c", left.pop()] if left else command, **options)

    monkeypatch.setattr(scoring.subprocess, "Popen", start_process)
    monkeypatch.setattr(scoring, "PAUSE_SECONDS", 0.0)


def test_a_process_that_dies_is_told_and_started_again(
    tmp_path: Path, val: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_times(monkeypatch, 1, "import os; os.kill(os.getpid(), 9)")
    packed, failures = detections(val), Failures()
    one = start(tmp_path, val, failures)
    one.add(write(tmp_path, val, packed))
    scored = wait(one)
    assert isinstance(scored, Scored)
    assert scored.table == coco_ap(val.coco(), packed.results())
    assert failures == [(POSITION, "its process was killed by signal 9")]


def test_after_two_failures_it_can_be_scored_in_this_process(
    tmp_path: Path, val: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_times(monkeypatch, 2, "raise MemoryError('no memory')")
    packed, failures = detections(val), Failures()
    one = start(tmp_path, val, failures)
    one.add(write(tmp_path, val, packed))
    unscored = wait(one)
    assert isinstance(unscored, Unscored)
    assert failures == [(POSITION, "its process ended with status 1: MemoryError: no memory")] * 2
    scored = one.score_here(unscored)
    assert scored.table == coco_ap(val.coco(), packed.results())
    assert stored.read_evaluation(stored.folder_of(tmp_path, POSITION)) is not None
    stored.detections_file(stored.folder_of(tmp_path, POSITION), 1).unlink()
    with pytest.raises(ScoringError, match=r"position 96 could not be scored: .*MemoryError.*--resume"):
        one.score_here(unscored)


def test_a_diverged_model_is_an_error_and_not_tried_again(tmp_path: Path, val: Shards) -> None:
    packed, failures = detections(val), Failures()
    scores = packed.scores.copy()
    scores[3] = np.nan
    one = start(tmp_path, val, failures)
    one.add(write(tmp_path, val, replace(packed, scores=scores)))
    with pytest.raises(ValueError, match=r"not finite \(score nan.*has diverged"):
        wait(one)
    assert failures == []


def test_files_that_cannot_be_written_do_not_lose_the_ap(
    tmp_path: Path, val: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, failures = detections(val), Failures()
    evaluated = write(tmp_path / "elsewhere", val, packed)

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, f"{path}: No space left on device")

    monkeypatch.setattr(scoring, "write_file", full)
    one = start(tmp_path / "run", val, failures)
    one.add(evaluated, stored.folder_of(tmp_path / "elsewhere", POSITION))
    scored = wait(one)
    assert isinstance(scored, Scored)
    assert scored.table == coco_ap(val.coco(), packed.results())
    assert scored.problem is not None
    assert "No space left on device" in scored.problem


def test_arrays_of_other_evaluations_are_removed_and_their_scores_stay(
    run_folder: Folder, val: Shards
) -> None:
    evaluated, failures = write(run_folder, val, detections(val)), Failures()
    one = start(run_folder, val, failures)
    one.add(evaluated)
    wait(one)
    folder = stored.folder_of(run_folder, POSITION)
    stored.remove_arrays_except(run_folder, {POSITION, 48})
    assert len(stored.read_detections(folder).evaluated_ids) == val.num_samples
    assert stored.complete_evaluations(run_folder) == [evaluated]
    stored.remove_arrays_except(run_folder, {48})
    assert not (folder / "detections").exists()
    assert stored.complete_evaluations(run_folder) == []
    assert stored.read_evaluation(folder) is not None
    assert ground_truth_file(run_folder, val.fingerprint).exists()
    with pytest.raises(ValueError, match="not complete, or were removed with its checkpoint"):
        stored.read_detections(folder)
