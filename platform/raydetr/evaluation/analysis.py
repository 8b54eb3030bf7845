"""Compute what explains an evaluation, from ground truth and detections.

This module loads neither torch nor Ray: a scoring process imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydetr.evaluation.class_numbers import ClassNumbers, Curves, class_numbers, curves, measured
from raydetr.evaluation.coco_metrics import ApTable, ap_table, check_results
from raydetr.evaluation.engines import Accumulated, accumulated_by, hotcoco_evaluation
from raydetr.evaluation.matches import (
    BestF1,
    Calibration,
    Matches,
    Tide,
    best_f1,
    calibration,
    confusion,
    match,
    tide,
)
from raydetr.evaluation.mistakes import Mistake, most_confident
from raydetr.evaluation.results import Results

FORMAT_VERSION = 1
NUM_MISTAKES = 12
NUM_LOSSES = 12  # images
SPEED = ("latency_ms", "latency_p95_ms", "images_per_second")  # what is known of `speed`
DIGITS = 6  # of curves, in report.json


@dataclass(frozen=True)
class Report:
    """What an evaluation shows."""

    table: ApTable
    counts: dict[str, int]
    classes: tuple[ClassNumbers, ...]  # by category_id
    curves: Curves
    best_f1: BestF1 | None  # over all classes, with one threshold
    tide: Tide | None  # None: there are no images or no classes
    confusion: (
        NDArray[np.int64] | None
    )  # see `matches.confusion`; detections with at least the score of best_f1
    calibration: Calibration | None
    mistakes: tuple[Mistake, ...]
    losses: tuple[tuple[int, float], ...]  # image_id and loss, the largest first
    speed: dict[str, float]
    ground_truth: Mapping[str, Any]
    results: Results

    @property
    def names(self) -> dict[int, str]:
        """Names of the categories."""
        return {row.category_id: row.name for row in self.classes}

    @property
    def shown_images(self) -> list[int]:
        """Ids of the images with the most confident mistakes and the largest losses."""
        mistakes, losses = (
            (each.image_id for each in self.mistakes),
            (image_id for image_id, _ in self.losses),
        )
        return sorted({*mistakes, *losses})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; docs/evaluation.md describes the fields. What is not measured is None."""
        files = {image["id"]: image.get("file_name") for image in self.ground_truth["images"]}
        return {
            "format_version": FORMAT_VERSION,
            "metrics": {name: measured(value) for name, value in self.table.numbers.items()},
            "counts": self.counts,
            "speed": self.speed,
            "best_f1": _plain(self.best_f1),
            "classes": [asdict(row) for row in self.classes],
            "precision_recall": {
                "recall": _rounded(self.curves.recalls),
                "means": {name: _rounded(values) for name, values in self.curves.means.items()},
                "classes": {str(name): _rounded(values) for name, values in self.curves.classes.items()},
            },
            "tide": _plain(self.tide),
            "confusion": self._confusion(),
            "calibration": _plain(self.calibration),
            "mistakes": [{**asdict(each), "file_name": files[each.image_id]} for each in self.mistakes],
            "losses": [
                {"image_id": image_id, "file_name": files[image_id], "loss": loss}
                for image_id, loss in self.losses
            ],
        }

    def _confusion(self) -> dict[str, Any] | None:
        if self.confusion is None:
            return None
        ids = [*self.names, None]  # of hundreds of classes, most pairs are 0
        pairs = [
            [ids[true], ids[predicted], int(self.confusion[true, predicted])]
            for true, predicted in np.argwhere(self.confusion).tolist()
        ]
        return {
            "min_score": self.min_score,
            "columns": ["category_id", "predicted_category_id", "count"],
            "rows": pairs,
        }

    @property
    def min_score(self) -> float:
        """Score of the detections in the confusion matrix: where F1 over all classes is best; 0 if there is none."""
        return 0.0 if self.best_f1 is None or self.best_f1.threshold is None else self.best_f1.threshold


def analyze(
    ground_truth: Mapping[str, Any],
    results: Results,
    *,
    losses: Mapping[int, float] | None = None,
    speed: Mapping[str, float] | None = None,
) -> Report:
    """Compute everything that the report shows.

    Args:
        ground_truth: a COCO dict (`images`, `annotations`, `categories`); it is not changed.
        results: detections in any order. Those of categories that the ground truth lacks do not count.
        losses: of images, by image id, where the caller has them.
        speed: any of `latency_ms`, `latency_p95_ms` and `images_per_second`; see `score.speed`.

    Raises:
        ValueError: results, losses or speed name something unknown, or hold a number that is not finite.
    """
    check_results(ground_truth, results)
    _check_extras(ground_truth, losses or {}, speed or {})
    truth, results = _known(ground_truth, results.sorted())
    category_ids = tuple(sorted(category["id"] for category in truth["categories"]))
    matches = None
    if truth["images"] and category_ids:
        evaluation = hotcoco_evaluation(truth, results)
        evaluation.evaluate()
        accumulated = accumulated_by(evaluation, category_ids)
        del evaluation  # and its memory, before the next one
        matches = match(truth, results)
    else:
        accumulated = Accumulated.empty(category_ids)
    best = None if matches is None else _best_of_all(matches)
    threshold = 0.0 if best is None or best.threshold is None else best.threshold
    calibrated = None if matches is None else calibration(matches)
    table = ap_table(truth, accumulated)
    largest = sorted((losses or {}).items(), key=lambda pair: (-pair[1], pair[0]))[:NUM_LOSSES]
    return Report(
        table=table,
        counts=_counts(truth, results, matches),
        classes=class_numbers(table, accumulated, matches, calibrated),
        curves=curves(accumulated),
        best_f1=best,
        tide=None if matches is None else tide(matches),
        confusion=None if matches is None else confusion(matches, threshold),
        calibration=calibrated,
        mistakes=() if matches is None else tuple(most_confident(matches, NUM_MISTAKES)),
        losses=tuple((int(image_id), float(loss)) for image_id, loss in largest),
        speed={name: float(value) for name, value in (speed or {}).items()},
        ground_truth=truth,
        results=results,
    )


def _check_extras(
    ground_truth: Mapping[str, Any], losses: Mapping[int, float], speed: Mapping[str, float]
) -> None:
    unknown = sorted(set(losses) - {image["id"] for image in ground_truth["images"]})
    if unknown:
        raise ValueError(f"a loss is for image {unknown[0]}, which is not in the ground truth")
    for name in speed:
        if name not in SPEED:
            raise ValueError(f"speed has {name!r}: it can have {', '.join(SPEED)}")
    values = {f"the loss of image {image_id}": loss for image_id, loss in losses.items()}
    for name, value in (values | dict(speed)).items():
        if not np.isfinite(value):
            raise ValueError(f"{name} is {value}: it must be finite")


def _known(ground_truth: Mapping[str, Any], results: Results) -> tuple[dict[str, Any], Results]:
    """Leave out annotations of unknown images and categories, and detections of unknown categories."""
    images = {image["id"] for image in ground_truth["images"]}
    categories = {category["id"] for category in ground_truth["categories"]}
    annotations = [
        a for a in ground_truth["annotations"] if a["image_id"] in images and a["category_id"] in categories
    ]
    known = np.isin(results.category_ids, np.array(sorted(categories), np.int64))
    return {**ground_truth, "annotations": annotations}, results[known]


def _counts(truth: Mapping[str, Any], results: Results, matches: Matches | None) -> dict[str, int]:
    is_crowd = [bool(a.get("iscrowd", 0)) for a in truth["annotations"]]
    return {
        "images": len(truth["images"]),
        "images_without_objects": len(truth["images"])
        - len({a["image_id"] for a in truth["annotations"] if not a.get("iscrowd", 0)}),
        "images_without_detections": len(truth["images"]) - len(np.unique(results.image_ids)),
        "classes": len(truth["categories"]),
        "objects": len(is_crowd) - sum(is_crowd),
        "crowds": sum(is_crowd),
        "detections": len(results),
        "detections_that_count": 0 if matches is None else len(matches.results),
        "correct_detections": 0 if matches is None else int(matches.is_correct.sum()),
    }


def _best_of_all(matches: Matches) -> BestF1 | None:
    # Detections of classes without objects are mistakes too
    return best_f1(matches.results.scores, matches.is_correct, int(matches.num_objects.sum()))


def _plain(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _rounded(values: NDArray[np.float64]) -> list[float]:
    rounded: list[float] = np.round(values, DIGITS).tolist()
    return rounded
