"""Take the numbers and curves of single classes out of precision, recall and matches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raydetr.evaluation.coco_metrics import ApTable, mean_of_measured
from raydetr.evaluation.engines import Accumulated
from raydetr.evaluation.matches import BestF1, Calibration, Matches, best_f1


@dataclass(frozen=True)
class ClassNumbers:
    """Numbers of one class; None where there is nothing to measure. AP and AR are over IoU 0.50:0.95."""

    category_id: int
    name: str
    num_objects: int  # without crowds
    num_detections: int  # that count
    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar100: float | None
    best_f1: BestF1 | None  # at IoU 0.5
    ece: float | None


@dataclass(frozen=True)
class Curves:
    """COCO's precision at 101 recalls, [101]; None without objects."""

    recalls: NDArray[np.float64]
    means: dict[str, NDArray[np.float64]]  # over the classes, by IoU: "0.50", "0.75", "0.50:0.95"
    classes: dict[int, NDArray[np.float64]]  # at IoU 0.5, by category_id


def class_numbers(
    table: ApTable, accumulated: Accumulated, matches: Matches | None, calibrated: Calibration | None
) -> tuple[ClassNumbers, ...]:
    """Return the numbers of each class, in the order of the table."""
    rows = []
    for column, each in enumerate(table.classes):
        ap, ar = accumulated.precision[:, :, column, :, -1], accumulated.recall[:, column, 0, -1]
        of_class = None if matches is None else matches.results.category_ids == each.category_id
        sizes = [measured(mean_of_measured(ap[:, :, area])) for area in (1, 2, 3)]
        rows.append(
            ClassNumbers(
                category_id=each.category_id,
                name=each.name,
                num_objects=each.num_objects,
                num_detections=0 if of_class is None else int(of_class.sum()),
                ap=measured(each.ap),
                ap50=measured(each.ap50),
                ap75=measured(mean_of_measured(ap[5, :, 0])),
                ap_small=sizes[0],
                ap_medium=sizes[1],
                ap_large=sizes[2],
                ar100=measured(mean_of_measured(ar)),
                best_f1=None
                if matches is None or of_class is None
                else best_f1(
                    matches.results.scores[of_class], matches.is_correct[of_class], each.num_objects
                ),
                ece=None if calibrated is None else calibrated.by_class.get(each.category_id),
            )
        )
    return tuple(rows)


def curves(accumulated: Accumulated) -> Curves:
    """Return the curves for objects of any size, 100 detections per image."""
    precision = accumulated.precision[..., 0, -1]  # [threshold, recall, class]
    with_objects = np.flatnonzero((precision > -1).any((0, 1)))
    precision = precision[:, :, with_objects]
    chosen = {"0.50": precision[0], "0.75": precision[5], "0.50:0.95": precision.mean(0)}
    return Curves(
        recalls=np.linspace(0, 1, precision.shape[1]),
        means={name: values.mean(1) for name, values in chosen.items()} if len(with_objects) else {},
        classes={
            accumulated.category_ids[column]: precision[0, :, number]
            for number, column in enumerate(with_objects.tolist())
        },
    )


def measured(value: float) -> float | None:
    """Return a value of COCO's, None for -1."""
    return None if value < 0 else float(value)
