"""Compute COCO's average precision in numpy, where pycocotools is not installed. A test compares the two.

Without crowds, and for objects of any size: enough for data that is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
RECALLS = np.linspace(0, 1, 101)
MOST_DETECTIONS = 100  # of an image


@dataclass(frozen=True)
class Objects:
    """Objects or detections of one image. `scores` are those of detections."""

    labels: npt.NDArray[np.int64]  # [n]
    boxes_xyxy: Floats  # [n, 4]
    scores: Floats  # [n]


def average_precision(truth: Sequence[Objects], found: Sequence[Objects]) -> float:
    """Return the mean over classes and IoU thresholds, in [0, 1]; image i of `found` belongs to image i of `truth`."""
    found = [best(detections) for detections in found]
    labels = sorted({int(label) for objects in truth for label in objects.labels})
    return float(np.mean([_of_class(truth, found, label) for label in labels]))


def best(detections: Objects) -> Objects:
    """Return the MOST_DETECTIONS detections of each class with the highest scores, best first."""
    order = np.argsort(-detections.scores, kind="stable")
    kept = [
        order[detections.labels[order] == label][:MOST_DETECTIONS] for label in np.unique(detections.labels)
    ]
    chosen = np.concatenate(kept) if kept else order
    return Objects(detections.labels[chosen], detections.boxes_xyxy[chosen], detections.scores[chosen])


def _of_class(truth: Sequence[Objects], found: Sequence[Objects], label: int) -> float:
    """Return the mean over thresholds, for one class."""
    scores: list[Floats] = [np.zeros(0)]
    matched: list[npt.NDArray[np.bool_]] = [np.zeros((len(THRESHOLDS), 0), bool)]
    num_objects = 0
    for objects, detections in zip(truth, found, strict=True):
        wanted, given = objects.labels == label, detections.labels == label
        num_objects += int(wanted.sum())
        scores.append(detections.scores[given])
        matched.append(_match(objects.boxes_xyxy[wanted], detections.boxes_xyxy[given]))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hits = np.concatenate(matched, axis=1)[:, order]
    return float(np.mean([_area(row, num_objects) for row in hits]))


def _match(boxes: Floats, detections: Floats) -> npt.NDArray[np.bool_]:
    """Return whether each detection, best first, gets an object of its own, [threshold, detection]."""
    overlaps = _iou(detections, boxes)
    matched = np.zeros((len(THRESHOLDS), len(detections)), bool)
    for row, threshold in zip(matched, THRESHOLDS, strict=True):
        free = np.ones(len(boxes), bool)
        for number, overlap in enumerate(overlaps):
            candidates = np.where(free, overlap, -1.0)
            # Of several objects with the same overlap COCO's evaluation takes the last
            chosen = len(candidates) - 1 - int(candidates[::-1].argmax()) if len(candidates) else -1
            if chosen >= 0 and candidates[chosen] >= min(threshold, 1 - 1e-10):
                row[number], free[chosen] = True, False
    return matched


def _iou(one: Floats, other: Floats) -> Floats:
    """Return the IoU of every pair of boxes, [len(one), len(other)]."""
    top_left = np.maximum(one[:, None, :2], other[None, :, :2])
    bottom_right = np.minimum(one[:, None, 2:], other[None, :, 2:])
    common = np.clip(bottom_right - top_left, 0, None).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (one, other)]
    union: Floats = areas[0][:, None] + areas[1][None] - common
    return np.asarray(common / np.where(union > 0, union, 1))


def _area(hits: npt.NDArray[np.bool_], num_objects: int) -> float:
    """Return the area under the curve of precision, which is read at 101 recalls and made to fall."""
    true_positives = hits.cumsum()
    precision = true_positives / np.arange(1, len(hits) + 1)
    recall = true_positives / num_objects
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, RECALLS, side="left")
    return float(np.append(falling, 0.0)[np.minimum(at, len(hits))].mean())
