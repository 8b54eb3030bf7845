"""Compute COCO average precision with pycocotools.

The numbers do not depend on the order of the results: these are sorted first, because pycocotools breaks ties between
equal scores by position.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import coco, cocoeval

from raydetr.console import table

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
AP_FILE = "evaluation/ap.json"  # artifact of a run: `ApTable.to_dict()` of its last evaluation

_MEANING = {
    "AP": "IoU 0.50:0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "area < 32²",
    "APm": "area 32² to 96²",
    "APl": "area > 96²",
    "AR1": "recall, 1 detection per image",
    "AR10": "recall, 10 detections",
    "AR100": "recall, 100 detections",
    "ARs": "recall, area < 32²",
    "ARm": "recall, area 32² to 96²",
    "ARl": "recall, area > 96²",
}

# pycocotools prints its progress. Its modules get a silent `print` of their own, because redirecting sys.stdout would
# affect every thread of the process, and Ray's workers replace the builtin.
for _module in (coco, cocoeval):
    vars(_module)["print"] = lambda *_values, **_options: None


@dataclass(frozen=True)
class ClassAp:
    """AP and AP50 of one category, in [0, 1]; -1 where the ground truth has no object of it."""

    category_id: int
    name: str
    num_objects: int
    ap: float
    ap50: float


@dataclass(frozen=True)
class ApTable:
    """The twelve COCO metrics by name, in [0, 1], and AP by class; -1 where there is nothing to measure."""

    numbers: Mapping[str, float]
    classes: tuple[ClassAp, ...]

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: the metrics by name, and `classes`, a list of dicts."""
        fields = ("category_id", "name", "num_objects", "AP", "AP50")
        rows = ((c.category_id, c.name, c.num_objects, c.ap, c.ap50) for c in self.classes)
        classes = [dict(zip(fields, row, strict=True)) for row in rows]
        return {**self.numbers, "classes": classes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ApTable:
        """Restore the table from the result of `to_dict`."""
        fields = ("category_id", "name", "num_objects", "AP", "AP50")
        classes = tuple(ClassAp(*(row[field] for field in fields)) for row in values["classes"])
        return cls({name: values[name] for name in NAMES}, classes)

    def to_text(self) -> str:
        """Return two plain-text tables: the twelve metrics, then the classes."""
        return f"{table(self._number_rows())}\n\n{table([_CLASS_HEADER, *self._class_rows()])}\n"

    def to_markdown(self) -> str:
        """Return the same two tables as Markdown."""
        numbers = _markdown(("", "value", "meaning"), self._number_rows())
        return f"{numbers}\n\n{_markdown(_CLASS_HEADER, self._class_rows())}\n"

    def _number_rows(self) -> list[tuple[str, ...]]:
        return [(name, _format(value), _MEANING[name]) for name, value in self.numbers.items()]

    def _class_rows(self) -> list[tuple[str, ...]]:
        return [(c.name, _format(c.ap), _format(c.ap50), str(c.num_objects)) for c in self.classes]


_CLASS_HEADER = ("class", "AP", "AP50", "objects")


def coco_ap(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> ApTable:
    """Compute the average precision of boxes against COCO ground truth.

    Args:
        ground_truth: a COCO dict (`images`, `annotations`, `categories`); it is not changed.
        results: COCO results ({"image_id", "category_id", "bbox": [x, y, width, height] in pixels, "score"}),
            in any order; may be empty.

    Raises:
        ValueError: a result names an image that the ground truth lacks, or holds a number that is not finite.
    """
    _check(ground_truth, results)
    evaluation = cocoeval.COCOeval(_truth_index(ground_truth), _result_index(ground_truth, results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    numbers = {name: float(value) for name, value in zip(NAMES, evaluation.stats, strict=True)}
    return ApTable(numbers, _class_table(ground_truth, evaluation))


def _check(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    known = {image["id"] for image in ground_truth["images"]}
    for result in results:
        if result["image_id"] not in known:
            raise ValueError(f"a result is for image {result['image_id']}, which is not in the ground truth")
        if not all(math.isfinite(number) for number in (result["score"], *result["bbox"])):
            raise ValueError(
                f"a result for image {result['image_id']} is not finite (score {result['score']}, "
                f"box {result['bbox']}): the model that predicted it has diverged"
            )


def _truth_index(ground_truth: Mapping[str, Any]) -> Any:
    annotations = [
        # pycocotools marks a match by the annotation's id: an object with id 0 would never count as matched
        {"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a, "id": number}
        for number, a in enumerate(ground_truth["annotations"], start=1)
    ]
    return _index(ground_truth, annotations)


def _result_index(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Any:
    ordered = sorted(results, key=lambda r: (r["image_id"], -r["score"], r["category_id"], *r["bbox"]))
    annotations = [
        {**result, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0, "id": number}
        for number, result in enumerate(ordered, start=1)
    ]
    return _index(ground_truth, annotations)


def _index(ground_truth: Mapping[str, Any], annotations: list[dict[str, Any]]) -> Any:
    index = coco.COCO()
    index.dataset = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": annotations,
    }
    index.createIndex()
    return index


def _class_table(ground_truth: Mapping[str, Any], evaluation: Any) -> tuple[ClassAp, ...]:
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    objects = Counter(a["category_id"] for a in ground_truth["annotations"] if not a.get("iscrowd", 0))
    # Objects of any area, 100 detections per image: [threshold, recall, category]
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return tuple(
        ClassAp(
            category_id=int(category_id),
            name=names[category_id],
            num_objects=objects[category_id],
            ap=_mean(precision[:, :, column]),
            ap50=_mean(precision[0, :, column]),
        )
        for column, category_id in enumerate(evaluation.params.catIds)
    )


def _mean(precision: Any) -> float:
    measured = precision[precision > -1]
    return float(np.mean(measured)) if measured.size else -1.0


def _format(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"


def _markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
