"""Compute COCO average precision, with hotcoco or with pycocotools.

Both give the same numbers, which do not depend on the order of the results: these are sorted first, because equal
scores are ranked by their order. This module loads neither torch nor Ray: a scoring process imports it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raydetr.console import table
from raydetr.evaluation.engines import Accumulated, accumulate
from raydetr.evaluation.results import Results

if TYPE_CHECKING:
    from raydetr.config import Engine

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
AP_FILE = "evaluation/ap.json"  # artifact of a run: `ApTable.to_dict()` of its last evaluation

MEANING = {
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
        return [(name, _format(value), MEANING[name]) for name, value in self.numbers.items()]

    def _class_rows(self) -> list[tuple[str, ...]]:
        return [(c.name, _format(c.ap), _format(c.ap50), str(c.num_objects)) for c in self.classes]


_CLASS_HEADER = ("class", "AP", "AP50", "objects")


def coco_ap(
    ground_truth: Mapping[str, Any],
    results: Results | Sequence[Mapping[str, Any]],
    engine: Engine = "hotcoco",
) -> ApTable:
    """Compute the average precision of boxes against COCO ground truth.

    Args:
        ground_truth: a COCO dict (`images`, `annotations`, `categories`); it is not changed.
        results: detections in any order, also as COCO results ({"image_id", "category_id", "bbox": [x, y, width,
            height] in pixels, "score"}); may be empty. Those of categories that the ground truth lacks do not count.
        engine: what computes it; the numbers are the same.

    Raises:
        ValueError: a result names an image that the ground truth lacks, or holds a number that is not finite.
    """
    if not isinstance(results, Results):
        results = Results.from_coco(results)
    check_results(ground_truth, results)
    return ap_table(ground_truth, accumulate(ground_truth, results.sorted(), engine))


def ap_table(ground_truth: Mapping[str, Any], accumulated: Accumulated) -> ApTable:
    """Take the means of precision and recall that pycocotools' `summarize` takes, and those of each class."""
    return ApTable(_numbers(accumulated), _class_table(ground_truth, accumulated))


def check_results(ground_truth: Mapping[str, Any], results: Results) -> None:
    """Check that results can be scored.

    Raises:
        ValueError: one names an image that the ground truth lacks, or holds a number that is not finite.
    """
    known = np.array([image["id"] for image in ground_truth["images"]], np.int64)
    unknown = ~np.isin(results.image_ids, known)
    if unknown.any():
        image_id = results.image_ids[unknown.argmax()]
        raise ValueError(f"a result is for image {image_id}, which is not in the ground truth")
    broken = ~(np.isfinite(results.scores) & np.isfinite(results.boxes_xywh).all(1))
    if broken.any():
        row = broken.argmax()
        raise ValueError(
            f"a result for image {results.image_ids[row]} is not finite (score {results.scores[row]}, "
            f"box {results.boxes_xywh[row].tolist()}): the model that predicted it has diverged"
        )


def _numbers(accumulated: Accumulated) -> dict[str, float]:
    """Return what pycocotools' `summarize` returns, in the order of NAMES."""
    ap, ar = accumulated.precision, accumulated.recall
    return dict(
        zip(
            NAMES,
            (
                mean_of_measured(ap[..., 0, -1]),
                mean_of_measured(ap[0, ..., 0, -1]),
                mean_of_measured(ap[5, ..., 0, -1]),
                *(mean_of_measured(ap[..., area, -1]) for area in (1, 2, 3)),
                *(mean_of_measured(ar[..., 0, limit]) for limit in (0, 1, 2)),
                *(mean_of_measured(ar[..., area, -1]) for area in (1, 2, 3)),
            ),
            strict=True,
        )
    )


def _class_table(ground_truth: Mapping[str, Any], accumulated: Accumulated) -> tuple[ClassAp, ...]:
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    objects = Counter(a["category_id"] for a in ground_truth["annotations"] if not a.get("iscrowd", 0))
    # Objects of any area, 100 detections per image: [threshold, recall, category]
    precision = accumulated.precision[..., 0, -1]
    return tuple(
        ClassAp(
            category_id=category_id,
            name=names[category_id],
            num_objects=objects[category_id],
            ap=mean_of_measured(precision[:, :, column]),
            ap50=mean_of_measured(precision[0, :, column]),
        )
        for column, category_id in enumerate(accumulated.category_ids)
    )


def mean_of_measured(values: NDArray[np.float64]) -> float:
    """Return the mean of the values that are not -1; -1 if all are."""
    measured = values[values > -1]
    return float(np.mean(measured)) if measured.size else -1.0


def _format(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"


def _markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
