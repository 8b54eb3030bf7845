"""Compare the AP of benchmarks/average_precision.py with pycocotools."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIDE = 100.0


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("average_precision", BENCHMARKS / "average_precision.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look it up there
    spec.loader.exec_module(loaded)
    return loaded


def coco_ap(truth, found) -> float:
    """Return pycocotools' AP."""
    annotations, results = [], []
    for image, (objects, detections) in enumerate(zip(truth, found, strict=True), 1):
        for label, (x, y, right, bottom) in zip(objects.labels, objects.boxes_xyxy, strict=True):
            box = [float(n) for n in (x, y, right - x, bottom - y)]
            key = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label) + 1, "iscrowd": 0}
            annotations.append({**key, "bbox": box, "area": box[2] * box[3]})
        for label, (x, y, right, bottom), score in zip(
            detections.labels, detections.boxes_xyxy, detections.scores, strict=True
        ):
            box = [float(n) for n in (x, y, right - x, bottom - y)]
            record = {"image_id": image, "category_id": int(label) + 1, "bbox": box, "score": float(score)}
            results.append(record)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(1, len(truth) + 1)],
        "annotations": annotations,
        "categories": [{"id": label} for label in range(1, 4)],
    }
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corners = rng.uniform(0, 70, (count, 2))
    return np.concatenate((corners, corners + rng.uniform(5, 30, (count, 2))), axis=1)


@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools(module: ModuleType, seed: int) -> None:
    """Detections are objects that were moved, other objects, and up to 300 random boxes of an image."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for image in range(25):
        boxes = random_boxes(rng, int(rng.integers(0, 9)))
        labels = rng.integers(0, 3, len(boxes))
        truth.append(module.Objects(labels, boxes, np.ones(len(boxes))))
        moved = np.repeat(boxes, 2, axis=0) + rng.normal(0, 1.5, (2 * len(boxes), 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        others = random_boxes(rng, 300 if image % 5 == 0 else 4)
        given = np.concatenate((np.repeat(labels, 2), rng.integers(0, 3, len(others))))
        scores = rng.uniform(0, 1, len(given)).round(2 if seed % 2 else 9)  # with ties, and without
        found.append(module.Objects(given, np.concatenate((moved, others)), scores))
    assert module.average_precision(truth, found) == pytest.approx(coco_ap(truth, found), abs=1e-9)


def test_perfect_and_missing_detections(module: ModuleType) -> None:
    boxes = np.array([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    truth = [module.Objects(np.array([0, 1]), boxes, np.ones(2))]
    nothing = [module.Objects(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))]
    assert module.average_precision(truth, truth) == 1
    assert module.average_precision(truth, nothing) == 0
