"""TIDE as its paper defines it (Bolya et al., ECCV 2020, sections 2.2 and 2.3), as a reference for tests.

Crowds are no objects; a detection on one does not count, as in COCO. AP of a class without objects left is 0.
Of several detections about one object, only the one with the highest score is corrected: over both kinds, as in the
authors' code (tidecv 1.0.1, `BestGTMatch`); the paper may be read as: of each kind.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

RECALLS = np.linspace(0, 1, 101)  # pycocotools' own, bit for bit: 0.28 is reached by 7 of 25 or not
KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
FOREGROUND, BACKGROUND = 0.5, 0.1


def tide_by_definition(
    truth: dict[str, Any], results: list[dict[str, Any]]
) -> tuple[float, dict[str, int], dict[str, float]]:
    """Return AP50, the number of errors of each kind, and by how much AP50 rises without those of each kind."""
    objects = [dict(a, taken=False) for a in truth["annotations"] if not a.get("iscrowd")]
    crowds = [a for a in truth["annotations"] if a.get("iscrowd")]
    detections = []
    for result in sorted(results, key=lambda r: -r["score"]):
        own = [o for o in objects if o["image_id"] == result["image_id"]]
        free = [o for o in own if o["category_id"] == result["category_id"] and not o["taken"]]
        best = max(free, key=lambda o: iou(result["bbox"], o["bbox"]), default=None)
        if best is not None and iou(result["bbox"], best["bbox"]) >= FOREGROUND:
            best["taken"] = True
            detections.append((result, True, own))
        elif not any(on_crowd(result, crowd) for crowd in crowds):
            detections.append((result, False, own))
    errors: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    usable: dict[int, int] = {}  # object -> the first detection about it
    for number, (result, is_correct, own) in enumerate(detections):
        if is_correct:
            continue
        kind, target = error_of(result, own)
        errors[kind].append((number, target))
        if kind in ("classification", "localization"):
            usable.setdefault(id(target), number)
    errors["missed"] = [(None, o) for o in objects if not o["taken"] and id(o) not in usable]
    categories = sorted({o["category_id"] for o in objects})
    base = [(r["category_id"], r["score"], is_correct) for r, is_correct, _ in detections]
    counts: dict[int, int] = defaultdict(int)
    for each in objects:
        counts[each["category_id"]] += 1
    ap50 = mean_ap(base, counts, categories)
    deltas = {
        kind: mean_ap(*fixed(base, dict(counts), kind, errors[kind], usable), categories) - ap50
        for kind in KINDS
    }
    return ap50, {kind: len(found) for kind, found in errors.items()}, deltas


def error_of(result: dict[str, Any], own: list[dict[str, Any]]) -> tuple[str, dict[str, Any] | None]:
    """Return the kind of error of a false positive, and the object it is about."""
    same = [o for o in own if o["category_id"] == result["category_id"]]
    other = [o for o in own if o["category_id"] != result["category_id"]]
    near = max(same, key=lambda o: iou(result["bbox"], o["bbox"]), default=None)
    near_other = max(other, key=lambda o: iou(result["bbox"], o["bbox"]), default=None)
    iou_same = 0.0 if near is None else iou(result["bbox"], near["bbox"])
    iou_other = 0.0 if near_other is None else iou(result["bbox"], near_other["bbox"])
    if BACKGROUND <= iou_same <= FOREGROUND:
        return "localization", near
    if iou_other >= FOREGROUND:
        return "classification", near_other
    if iou_same >= FOREGROUND:
        return "duplicate", near
    if iou_other <= BACKGROUND:
        return "background", None
    return "both", near_other


def fixed(
    base: list[tuple[int, float, bool]],
    counts: dict[int, int],
    kind: str,
    errors: list[Any],
    first: dict[int, int],
) -> tuple[list[tuple[int, float, bool]], dict[int, int]]:
    """Correct the errors of one kind: a wrong class or box becomes right, once per object; others disappear."""
    rows: list[tuple[int, float, bool] | None] = list(base)
    for number, target in errors:
        if kind == "missed":
            counts[target["category_id"]] -= 1
            continue
        rows[number] = None
        is_convertible = kind in ("classification", "localization") and not target["taken"]
        if is_convertible and first[id(target)] == number:
            rows[number] = (target["category_id"], base[number][1], True)
    return [row for row in rows if row is not None], counts


def mean_ap(rows: list[tuple[int, float, bool]], counts: dict[int, int], categories: list[int]) -> float:
    """Return the mean AP over the categories, interpolated at 101 recalls."""
    values = []
    for category in categories:
        own = sorted((row for row in rows if row[0] == category), key=lambda row: -row[1])
        points, correct = [], 0
        for place, (_, _, is_correct) in enumerate(own, start=1):
            correct += is_correct
            points.append((correct / max(counts[category], 1), correct / place))
        precisions = [max((p for r, p in points if r >= wanted), default=0.0) for wanted in RECALLS]
        values.append(sum(precisions) / 101 if counts[category] else 0.0)
    return sum(values) / len(values) if values else 0.0


def iou(a: list[float], b: list[float]) -> float:
    """Return the IoU of two boxes xywh."""
    common = intersection(a, b)
    return common / (a[2] * a[3] + b[2] * b[3] - common) if common else 0.0


def on_crowd(result: dict[str, Any], crowd: dict[str, Any]) -> bool:
    """Return whether at least half of a detection is on a crowd of its class."""
    if (result["image_id"], result["category_id"]) != (crowd["image_id"], crowd["category_id"]):
        return False
    return intersection(result["bbox"], crowd["bbox"]) / (result["bbox"][2] * result["bbox"][3]) >= FOREGROUND


def intersection(a: list[float], b: list[float]) -> float:
    """Return the area that two boxes xywh share."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
