"""Match detections with objects at IoU 0.5, and compute from the matches what AP does not show.

hotcoco matches, and computes TIDE's errors, the confusion matrix and the calibration. It gets only the detections that
count, and no crowds: a detection on a crowd does not count in AP, but hotcoco 1.3 counts it as one of background in the
confusion matrix, and one that overlaps a crowd in part as a localization error, although a crowd is no object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray

from raydetr.evaluation.engines import hotcoco_evaluation
from raydetr.evaluation.results import Results

IOU = 0.5  # from which a detection matches an object
BACKGROUND_IOU = 0.1  # TIDE: below it, a detection is one of background
NUM_BINS = 10  # of the calibration

# hotcoco's names of TIDE's errors
TIDE_ERRORS = {
    "Cls": "classification",
    "Loc": "localization",
    "Both": "both",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}


@dataclass(frozen=True)
class Matches:
    """The detections that count, those that match an object, and hotcoco's evaluation of them at IoU 0.5.

    A detection counts unless it is on a crowd, or after the first 100 of its class in its image.
    """

    truth: dict[str, Any]  # COCO dict without crowds
    results: Results  # [n]
    is_correct: NDArray[np.bool_]  # [n]
    evaluation: hotcoco.COCOeval
    category_ids: NDArray[np.int64]  # [k], ascending

    @property
    def num_objects(self) -> NDArray[np.int64]:
        """Number of objects of each category, [k]."""
        of_objects = [a["category_id"] for a in self.truth["annotations"]]
        return np.bincount(np.searchsorted(self.category_ids, of_objects), minlength=len(self.category_ids))


def match(truth: Mapping[str, Any], results: Results) -> Matches:
    """Match detections with objects.

    Args:
        truth: a COCO dict whose annotations are all of its images and categories.
        results: of images and categories of the ground truth.
    """
    evaluation = _evaluated(truth, results)
    found = evaluation.image_diagnostics(iou_thr=IOU, score_thr=float("inf"))
    status = found.pop("dt_status")
    ids = np.fromiter(status, np.int64, len(status))
    is_correct = np.fromiter((each == "tp" for each in status.values()), np.bool_, len(status))
    del found, status  # of a million detections, they have a gigabyte
    order = np.argsort(ids)
    objects = [a for a in truth["annotations"] if not a.get("iscrowd", 0)]
    without_crowds = {**truth, "annotations": objects}
    counted = results
    if len(ids) < len(results) or len(objects) < len(truth["annotations"]):
        del evaluation
        counted = results[ids[order] - 1]
        evaluation = _evaluated(without_crowds, counted)
    category_ids = np.unique([category["id"] for category in truth["categories"]])
    return Matches(without_crowds, counted, is_correct[order], evaluation, category_ids)


def _evaluated(truth: Mapping[str, Any], results: Results) -> hotcoco.COCOeval:
    """Return hotcoco's evaluation at IoU 0.5, for objects of any size."""
    evaluation = hotcoco_evaluation(truth, results)
    parameters = evaluation.params
    parameters.iou_thrs, parameters.area_rng, parameters.area_rng_lbl = [IOU], [[0, 1e10]], ["all"]
    evaluation.evaluate()
    return evaluation


# --- F1 ---


@dataclass(frozen=True)
class BestF1:
    """The largest F1 over all score thresholds, and precision and recall there; None if nothing is matched."""

    f1: float
    threshold: float | None  # detections with at least this score are kept
    precision: float | None
    recall: float


def best_f1(scores: NDArray[np.float64], is_correct: NDArray[np.bool_], num_objects: int) -> BestF1 | None:
    """Return the best F1 of detections of one class, or of all; None without objects.

    hotcoco's F scores are means over classes on a grid of 101 recalls, and have no thresholds.
    """
    if not num_objects:
        return None
    order = np.argsort(-scores, kind="stable")
    scores, num_correct = scores[order], np.cumsum(is_correct[order])
    # A threshold keeps all detections with the same score
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, int)
    f1 = 2 * num_correct[ends] / (ends + 1 + num_objects)
    if not len(f1) or f1.max() == 0:
        return BestF1(0.0, None, None, 0.0)
    best = int(f1.argmax())
    end, correct = ends[best], int(num_correct[ends[best]])
    return BestF1(float(f1[best]), float(scores[end]), correct / int(end + 1), correct / num_objects)


# --- TIDE, confusions, calibration ---


@dataclass(frozen=True)
class Tide:
    """TIDE's errors (Bolya et al., ECCV 2020): how many, and by how much AP50 would rise without them.

    Means are over the classes with objects, as those of AP. Of several detections about one object, only the one with
    the highest score is corrected, as in the authors' code. A class whose objects were all missed has AP 0 also without
    the missed ones, where that code leaves out the class.
    """

    ap50: float
    counts: dict[str, int]  # by the names of TIDE_ERRORS
    delta_ap: dict[str, float]


def tide(matches: Matches) -> Tide:
    """Compute TIDE's errors."""
    found = matches.evaluation.tide_errors(pos_thr=IOU, bg_thr=BACKGROUND_IOU)
    counts = {name: int(found["counts"][key]) for key, name in TIDE_ERRORS.items()}
    deltas = {name: float(found["delta_ap"][key]) for key, name in TIDE_ERRORS.items()}
    return Tide(float(found["ap_base"]), counts, deltas)


def confusion(matches: Matches, min_score: float) -> NDArray[np.int64]:
    """Count which class was predicted for which object, [k + 1, k + 1]: rows are the objects', columns the detections'.

    The last row and column are background: detections without an object, and missed objects. Classes do not matter for
    a match: the detection with the highest score takes the object with which its IoU is largest, from 0.5.
    """
    # The limit of detections is one per image here; all that count have a place
    found = matches.evaluation.confusion_matrix(
        iou_thr=IOU, max_det=len(matches.results) + 1, min_score=min_score
    )
    return np.asarray(found["matrix"], np.int64)


@dataclass(frozen=True)
class Calibration:
    """How scores agree with the fraction of detections that are correct (Guo et al., ICML 2017)."""

    ece: float  # mean difference over the detections
    mce: float  # largest difference of a bin
    edges: list[float]  # of the bins
    counts: list[int]
    scores: list[float | None]  # means; None for empty bins
    accuracies: list[float | None]
    by_class: dict[int, float]  # ECE by category_id, of those with detections


def calibration(matches: Matches) -> Calibration | None:
    """Compute the calibration; None without detections, and for scores that are no probabilities, outside of [0, 1]."""
    scores = matches.results.scores
    if not len(scores) or scores.min() < 0 or scores.max() > 1:
        return None
    found = matches.evaluation.calibration(n_bins=NUM_BINS, iou_threshold=IOU)
    bins = found["bins"]
    return Calibration(
        ece=float(found["ece"]),
        mce=float(found["mce"]),
        edges=[0.0, *(float(each["bin_upper"]) for each in bins)],
        counts=[int(each["count"]) for each in bins],
        scores=[float(each["avg_confidence"]) if each["count"] else None for each in bins],
        accuracies=[float(each["avg_accuracy"]) if each["count"] else None for each in bins],
        by_class={
            int(matches.category_ids[int(number) - 1]): float(value)
            for number, value in found["per_category"].items()
        },
    )
