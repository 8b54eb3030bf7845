"""Find the mistakes with the highest scores, and say of each what kind of error it is."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from hotcoco.primitives import bbox_iou

from raydetr.evaluation.matches import BACKGROUND_IOU, IOU, Matches

MAX_PER_IMAGE = 2  # one bad image must not fill the list


@dataclass(frozen=True)
class Mistake:
    """A detection that matches no object."""

    image_id: int
    category_id: int
    score: float
    box_xywh: tuple[float, ...]  # pixels
    error: str  # one of TIDE's
    iou: float  # with the object that the error is about
    object_category_id: int | None  # of that object; None: background
    object_box_xywh: tuple[float, ...] | None


def most_confident(matches: Matches, number: int) -> list[Mistake]:
    """Return the mistakes with the highest scores, at most two of an image."""
    found: list[Mistake] = []
    per_image: Counter[int] = Counter()
    for mistake in mistakes(matches):
        if len(found) == number:
            break
        per_image[mistake.image_id] += 1
        if per_image[mistake.image_id] <= MAX_PER_IMAGE:
            found.append(mistake)
    return found


def mistakes(matches: Matches) -> Iterator[Mistake]:
    """Yield all detections that match no object, by descending score, with TIDE's error (Bolya et al., 2020, sec. 2.2).

    The order of the tests is that of TIDE's own code: localization, classification, duplicate, background, both.
    """
    results = matches.results
    objects = defaultdict(list)
    for annotation in matches.truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    rows = np.flatnonzero(~matches.is_correct)
    for row in rows[np.argsort(-results.scores[rows], kind="stable")].tolist():
        own = objects[int(results.image_ids[row])]
        category_id, box = int(results.category_ids[row]), results.boxes_xywh[row]
        truth = np.array([a["bbox"] for a in own], np.float64).reshape(-1, 4)
        ious = bbox_iou(box[None], truth, [False] * len(own))[0] if own else np.zeros(0)
        is_same = np.array([a["category_id"] == category_id for a in own], np.bool_)
        error, about = _error(ious, is_same)
        target = None if about is None else own[about]
        yield Mistake(
            image_id=int(results.image_ids[row]),
            category_id=category_id,
            score=float(results.scores[row]),
            box_xywh=tuple(box.tolist()),
            error=error,
            iou=0.0 if about is None else float(ious[about]),
            object_category_id=None if target is None else int(target["category_id"]),
            object_box_xywh=None if target is None else tuple(map(float, target["bbox"])),
        )


def _error(ious: np.ndarray, is_same: np.ndarray) -> tuple[str, int | None]:
    """Return the error of a detection without a match, and the number of the object that it is about."""
    same, other = np.where(is_same, ious, 0.0), np.where(is_same, 0.0, ious)
    best_same = int(same.argmax()) if len(ious) else None
    best_other = int(other.argmax()) if len(ious) else None
    if best_same is None or best_other is None:
        return "background", None
    if BACKGROUND_IOU <= same[best_same] <= IOU:
        return "localization", best_same
    if other[best_other] >= IOU:
        return "classification", best_other
    if same[best_same] >= IOU:
        return "duplicate", best_same
    if other[best_other] <= BACKGROUND_IOU:
        return "background", None
    return "both", best_other
