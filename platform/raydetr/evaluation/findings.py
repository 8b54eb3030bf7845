"""Say in sentences what an evaluation shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raydetr.evaluation.analysis import Report

NUM_LISTED = 3
MIN_CONFUSIONS = 3  # of a pair of classes that is worth a sentence


def findings(report: Report) -> list[str]:
    """Return sentences about a report, the most important ones first."""
    if not report.counts["objects"]:
        return ["There are no objects in the ground truth: AP cannot be measured."]
    if not report.counts["detections"]:
        return ["There are no detections: all objects were missed."]
    return [
        *_errors(report),
        *_sizes(report),
        *_weakest(report),
        *_confusions(report),
        *_threshold(report),
        *_scores(report),
        *_absent(report),
    ]


def most_confused(report: Report, number: int) -> list[tuple[str, str, int, float]]:
    """Return the pairs of classes that are confused most: object, detected as, how often, fraction of its objects."""
    assert report.confusion is not None
    between = report.confusion[:-1, :-1].copy()
    np.fill_diagonal(between, 0)
    rows, columns = np.nonzero(between)
    order = np.argsort(-between[rows, columns], kind="stable")[:number]
    pairs = zip(rows[order].tolist(), columns[order].tolist(), strict=True)
    return [
        (
            report.classes[row].name,
            report.classes[column].name,
            int(between[row, column]),
            between[row, column] / report.classes[row].num_objects,
        )
        for row, column in pairs
    ]


def _errors(report: Report) -> list[str]:
    if report.tide is None:
        return []
    gains = sorted(report.tide.delta_ap.items(), key=lambda pair: -pair[1])
    (first, gain), (second, next_gain) = gains[:2]
    if gain <= 0:
        return ["No single kind of error costs AP50."]
    text = f"Most AP50 is lost to {_errors_named(first)}: without them, it would be {report.tide.ap50 + gain:.3f} " \
        f"instead of {report.tide.ap50:.3f}."  # fmt: skip
    if next_gain > 0:
        text += f" Next: {_errors_named(second)} ({next_gain:.3f})."
    return [text]


def _errors_named(error: str) -> str:
    texts = {
        "missed": "missed objects",
        "background": "detections of background",
        "duplicate": "duplicate detections",
        "both": "detections with a wrong class and a wrong box",
    }
    return texts.get(error, f"{error} errors")


def _sizes(report: Report) -> list[str]:
    names = {"APs": "small", "APm": "medium", "APl": "large"}
    values = {text: report.table[name] for name, text in names.items() if report.table[name] >= 0}
    if len(values) < 2:
        return []
    return [
        f"AP by size of the objects: {', '.join(f'{name} {value:.3f}' for name, value in values.items())}."
    ]


def _weakest(report: Report) -> list[str]:
    measured = sorted((row.ap, row.category_id, row.name) for row in report.classes if row.ap is not None)
    if len(measured) <= NUM_LISTED:
        return []
    return [f"Lowest AP: {', '.join(f'{name} ({ap:.3f})' for ap, _, name in measured[:NUM_LISTED])}."]


def _confusions(report: Report) -> list[str]:
    if report.confusion is None:
        return []
    pairs = [pair for pair in most_confused(report, 1) if pair[2] >= MIN_CONFUSIONS]
    return [
        f"Confused most: {true} is detected as {predicted} {count:,} times ({share:.1%} of its objects)."
        for true, predicted, count, share in pairs
    ]


def _threshold(report: Report) -> list[str]:
    best = report.best_f1
    if best is None or best.threshold is None or best.precision is None:
        return ["No detection matches an object at IoU 0.5."]
    return [
        f"With one threshold for all classes, {best.threshold:.3f} is best: F1 {best.f1:.3f}, precision "
        f"{best.precision:.3f}, recall {best.recall:.3f} at IoU 0.5."
    ]


def _scores(report: Report) -> list[str]:
    found = report.calibration
    if found is None:
        return []
    number = sum(found.counts)
    score = sum(n * (s or 0.0) for n, s in zip(found.counts, found.scores, strict=True)) / number
    correct = sum(n * (a or 0.0) for n, a in zip(found.counts, found.accuracies, strict=True)) / number
    word = "high" if score > correct else "low"
    return [
        f"Scores are too {word} on average: their mean is {score:.3f}, and {correct:.1%} of the detections are correct "
        f"(expected calibration error {found.ece:.3f})."
    ]


def _absent(report: Report) -> list[str]:
    names = [row.name for row in report.classes if not row.num_objects]
    if not names:
        return []
    verb = "class has" if len(names) == 1 else "classes have"
    return [f"{len(names)} {verb} no objects, and no AP: {_listed(names)}."]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NUM_LISTED
    return ", ".join(names[:NUM_LISTED]) + (f" and {more} more" if more > 0 else "")
