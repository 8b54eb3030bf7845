"""Test whether one set of detections has a higher AP than another by more than the choice of images explains.

Paired bootstrap (Efron and Tibshirani 1993, chapter 16): images are drawn with replacement, as many as there are, and
the AP of both is computed on the same draw. hotcoco's own `compare` counts an image that was drawn several times once,
and so returns intervals that are about a fifth too narrow (tests/raydetr/evaluation/test_bootstrap.py shows it). Here,
only its matches are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydetr.evaluation.engines import hotcoco_evaluation
from raydetr.evaluation.results import Results

RECALLS = np.linspace(0.0, 1.0, 101)
NUM_DRAWS = 1000
CONFIDENCE = 0.95
MAX_DETECTIONS = 100  # per image
AP50, AP75 = 0, 5  # numbers of IoU thresholds


@dataclass(frozen=True)
class Interval:
    """A difference of AP, and where it lies with CONFIDENCE."""

    difference: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Differences of AP to the first of several sets of detections."""

    numbers: Mapping[str, Interval]  # "AP", "AP50", "AP75"; empty without an object
    classes: Mapping[int, Interval]  # AP by category id; of those that have an object in every draw
    num_images: int
    num_draws: int


class Matches:
    """The matches of detections with objects of any area: what AP on a draw of images is computed from.

    Args:
        ground_truth: a COCO dict.
        results: detections of its images, sorted (`Results.sorted`).
    """

    def __init__(self, ground_truth: Mapping[str, Any], results: Results) -> None:
        self.category_ids = sorted({int(category["id"]) for category in ground_truth["categories"]})
        self.image_ids = sorted({int(image["id"]) for image in ground_truth["images"]})
        cells = match_images(ground_truth, results)
        shape = len(self.category_ids), len(self.image_ids)
        self._objects = np.zeros(shape, np.int64)  # that count
        columns: list[list[tuple[NDArray[Any], ...]]] = [[] for _ in self.category_ids]
        for cell in cells:
            category, image = cell["category_id"] - 1, cell["image_id"] - 1
            self._objects[category, image] = np.sum(~np.array(cell["gtIgnore"], bool))
            scores = np.array(cell["dtScores"], np.float64)
            counted = ~np.array(cell["dtIgnore"], bool).reshape(10, len(scores))
            found = np.array(cell["dtMatched"], bool).reshape(10, len(scores)) & counted
            columns[category].append((scores, np.full(len(scores), image), counted, found))
        self._ranked = [_rank(cells_of) for cells_of in columns]

    def average_precisions(self, weights: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the AP of each category at each IoU threshold, [K, T]; NaN for a category without an object.

        Args:
            weights: how often each image counts, [images], in the order of their ids.
        """
        values = np.full((len(self.category_ids), 10), np.nan)
        num_objects = self._objects @ weights
        for number, ranked in enumerate(self._ranked):
            if num_objects[number]:
                values[number] = _average_precision(ranked, weights, int(num_objects[number]))
        return values


def compare(
    ground_truth: Mapping[str, Any],
    results: Sequence[Results],
    *,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Comparison]:
    """Compare sets of detections with the first of them.

    Args:
        ground_truth: a COCO dict.
        results: detections of its images; the draws are the same for all.
        num_draws: number of draws.
        seed: of the draws.
        progress: is called with (done, total) draws.

    Returns:
        One comparison for each set but the first.
    """
    matches = [Matches(ground_truth, one.sorted()) for one in results]
    num_images = len(matches[0].image_ids)
    generator = np.random.default_rng(seed)
    everything = np.ones(num_images, np.int64)
    observed = np.array([one.average_precisions(everything) for one in matches])
    draws = np.empty((num_draws, *observed.shape))
    for number in range(num_draws):
        drawn = generator.integers(0, num_images, num_images)
        weights = np.bincount(drawn, minlength=num_images)
        draws[number] = [one.average_precisions(weights) for one in matches]
        progress(number + 1, num_draws)
    return [
        _comparison(matches[0], observed[[0, other]], draws[:, [0, other]])
        for other in range(1, len(matches))
    ]


def _comparison(matches: Matches, observed: NDArray[np.float64], draws: NDArray[np.float64]) -> Comparison:
    """Return the differences between two sets; `observed` is [2, K, T], `draws` [draws, 2, K, T]."""
    numbers = {}
    for name, thresholds in (("AP", slice(None)), ("AP50", [AP50]), ("AP75", [AP75])):
        # Of the categories that have an object in the draw: the same for both
        value, drawn = _mean(observed[..., thresholds]), _mean(draws[..., thresholds])
        measured = drawn[~np.isnan(drawn).any(1)]
        if len(measured):
            numbers[name] = _interval(value[1] - value[0], measured[:, 1] - measured[:, 0])
    by_class, drawn = observed.mean(-1), draws.mean(-1)
    classes = {
        category_id: _interval(
            by_class[1, number] - by_class[0, number], drawn[:, 1, number] - drawn[:, 0, number]
        )
        for number, category_id in enumerate(matches.category_ids)
        if not np.isnan(drawn[:, :, number]).any()
    }
    return Comparison(numbers, classes, len(matches.image_ids), len(draws))


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over the last two dimensions of what is measured; NaN where nothing is."""
    count = np.sum(~np.isnan(values), axis=(-2, -1))
    return np.where(count > 0, np.nansum(values, axis=(-2, -1)) / np.maximum(count, 1), np.nan)


def _interval(difference: float, drawn: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(difference), float(low), float(high))


@dataclass(frozen=True)
class _Ranked:
    """The detections of a category, best first."""

    images: NDArray[np.int64]  # [n]
    counted: NDArray[np.bool_]  # [T, n]: neither ignored nor matched with an object that is
    found: NDArray[np.bool_]  # [T, n]: matched with an object


def _rank(cells: Sequence[tuple[NDArray[Any], ...]]) -> _Ranked:
    if not cells:
        return _Ranked(np.zeros(0, np.int64), np.zeros((10, 0), bool), np.zeros((10, 0), bool))
    scores, images, counted, found = (np.concatenate(parts, axis=-1) for parts in zip(*cells, strict=True))
    order = np.argsort(-scores, kind="stable")
    # What is ranked after the last match at any threshold has no effect
    matched = np.flatnonzero(found[:, order].any(0))
    order = order[: matched[-1] + 1 if len(matched) else 0]
    return _Ranked(images[order], counted[:, order], found[:, order])


def _average_precision(ranked: _Ranked, weights: NDArray[np.int64], num_objects: int) -> NDArray[np.float64]:
    """Return the AP at each IoU threshold, as pycocotools computes it: [T].

    A detection of an image with weight w stands for w detections of the same rank. Precision within such a group is
    highest after its last one, if they are matches, and plays no role otherwise.
    """
    values = np.zeros(len(ranked.found))
    weight = weights[ranked.images]
    for threshold, (counted, found) in enumerate(zip(ranked.counted, ranked.found, strict=True)):
        places = np.flatnonzero(found)
        if not len(places):
            continue
        total = np.cumsum(weight * counted)[places]
        true = np.cumsum(weight[places])
        precision = np.divide(true, total, out=np.zeros(len(places)), where=total > 0)
        highest = np.maximum.accumulate(precision[::-1])[::-1]
        reached = np.searchsorted(true / num_objects, RECALLS, side="left")
        values[threshold] = np.append(highest, 0.0)[reached].mean()
    return values


def match_images(ground_truth: Mapping[str, Any], results: Results) -> list[dict[str, Any]]:
    """Return hotcoco's matches of each category and image that has an object or a detection, for objects of any area.

    Images and categories are numbered from 1, in the ascending order of their ids.
    """
    evaluation = hotcoco_evaluation(ground_truth, results)
    settings = evaluation.params
    settings.area_rng, settings.area_rng_lbl = settings.area_rng[:1], settings.area_rng_lbl[:1]
    settings.max_dets = [MAX_DETECTIONS]
    evaluation.params = settings
    evaluation.evaluate()
    return [cell for cell in evaluation.eval_imgs if cell is not None]
