"""The paired bootstrap against brute force: an image that was drawn twice is evaluated as two images."""

from __future__ import annotations

from typing import Any

import hotcoco
import numpy as np
import pytest
from numpy.typing import NDArray

from raydetr.evaluation.bootstrap import Matches, compare
from raydetr.evaluation.coco_metrics import coco_ap
from raydetr.evaluation.engines import hotcoco_evaluation
from raydetr.evaluation.results import Results

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 5, "name": "never"}]
Rows = list[dict[str, Any]]


def make(seed: int, num_images: int, *, crowds: bool = True) -> tuple[dict[str, Any], Rows, Rows]:
    """Make ground truth, and detections of which the second set is more precise."""
    generator = np.random.default_rng(seed)
    images = [{"id": 10 * number, "width": 200, "height": 200} for number in range(1, num_images + 1)]
    annotations: Rows = []
    sets: tuple[Rows, Rows] = [], []
    for image in images:
        for _ in range(generator.integers(0, 5)):
            left, top = generator.uniform(0, 140, 2)
            width, height = generator.uniform(10, 60, 2)
            category = int(generator.choice([7, 3]))
            annotation = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category,
                          "bbox": [left, top, width, height], "area": width * height,
                          "iscrowd": int(crowds and generator.uniform() < 0.1)}  # fmt: skip
            annotations.append(annotation)
            for rows, noise, found in zip(sets, (6, 4), (0.7, 0.8), strict=True):
                if generator.uniform() < found:
                    x, y = generator.normal([left, top], noise)
                    rows.append({"image_id": image["id"], "category_id": category, "bbox": [x, y, width, height],
                                 "score": float(generator.uniform(0.3, 1))})  # fmt: skip
                if generator.uniform() < 0.4:
                    x, y = generator.uniform(0, 140, 2)
                    rows.append({"image_id": image["id"], "category_id": category, "bbox": [x, y, width, height],
                                 "score": float(generator.uniform(0, 0.8))})  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}, *sets


def drawn(truth: dict[str, Any], rows: Rows, weights: NDArray[np.int64]) -> tuple[dict[str, Any], Rows]:
    """Copy each image as often as it was drawn, with its annotations and detections."""
    images, annotations, copies = [], [], []
    for image, weight in zip(truth["images"], weights, strict=True):
        for _ in range(weight):
            new = len(images) + 1
            images.append({**image, "id": new})
            annotations += [
                {**a, "image_id": new} for a in truth["annotations"] if a["image_id"] == image["id"]
            ]
            copies += [{**row, "image_id": new} for row in rows if row["image_id"] == image["id"]]
    numbered = [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)]
    return {**truth, "images": images, "annotations": numbered}, copies


def draws(number: int, num_images: int, seed: int) -> list[NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    return [
        np.bincount(generator.integers(0, num_images, num_images), minlength=num_images)
        for _ in range(number)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_ap_of_a_draw_is_that_of_copied_images(seed: int) -> None:
    """To the last digits, with pycocotools, crowds and a class that has no object."""
    truth, rows, _ = make(seed, 12)
    matches = Matches(truth, Results.from_coco(rows).sorted())
    for weights in [np.ones(12, np.int64), *draws(20, 12, seed)]:
        values = matches.average_precisions(weights)
        table = coco_ap(*drawn(truth, rows, weights), "pycocotools")
        expected = [one.ap for one in sorted(table.classes, key=lambda one: one.category_id)]
        measured = np.nan_to_num(values.mean(1), nan=-1.0)
        np.testing.assert_allclose(measured, expected, atol=1e-12)
        np.testing.assert_allclose(np.nanmean(values), table["AP"], atol=1e-12)
        np.testing.assert_allclose(np.nanmean(values[:, 0]), table["AP50"], atol=1e-12)


def test_the_interval_is_that_of_brute_force() -> None:
    truth, first, second = make(5, 30)
    differences = []
    for weights in draws(300, 30, 1):
        a, b = (coco_ap(*drawn(truth, rows, weights))["AP"] for rows in (first, second))
        differences.append(b - a)
    (found,) = compare(truth, [Results.from_coco(first), Results.from_coco(second)], num_draws=300, seed=1)
    interval = found.numbers["AP"]
    np.testing.assert_allclose(
        [interval.low, interval.high], np.quantile(differences, [0.025, 0.975]), atol=1e-12
    )
    assert interval.difference == pytest.approx(
        coco_ap(truth, second)["AP"] - coco_ap(truth, first)["AP"], abs=1e-12
    )
    assert set(found.classes) == {3, 7}


def test_hotcoco_counts_an_image_once_however_often_it_was_drawn() -> None:
    """Why `compare` does not use hotcoco's own bootstrap. If this fails, hotcoco was mended, and can be used."""
    truth, first, second = make(0, 30, crowds=False)
    exact, unique = [], []
    for weights in draws(300, 30, 1):
        for values, counts in ((exact, weights), (unique, np.minimum(weights, 1))):
            a, b = (coco_ap(*drawn(truth, rows, counts))["AP"] for rows in (first, second))
            values.append(b - a)
    evaluations = [hotcoco_evaluation(truth, Results.from_coco(rows).sorted()) for rows in (first, second)]
    for evaluation in evaluations:
        evaluation.evaluate()
    spread = hotcoco.compare(*evaluations, n_bootstrap=2000, seed=1)["ci"]["AP"]["std_err"]
    assert spread < 0.9 * np.std(exact)
    assert spread == pytest.approx(np.std(unique), rel=0.1)


def test_equal_detections_do_not_differ_and_better_ones_do() -> None:
    truth, first, _ = make(2, 40, crowds=False)
    perfect = [{**a, "score": 1.0} for a in truth["annotations"]]
    same, better = compare(
        truth, [Results.from_coco(rows) for rows in (first, first, perfect)], num_draws=100
    )
    assert (same.numbers["AP"].difference, same.numbers["AP"].low, same.numbers["AP"].high) == (0, 0, 0)
    assert not same.numbers["AP"].is_significant
    assert better.numbers["AP"].is_significant
    assert better.numbers["AP"].difference == pytest.approx(1 - coco_ap(truth, first)["AP"])


def test_of_two_equally_good_models_few_are_called_different() -> None:
    """The confidence holds: 95% of the intervals of two models that differ by chance only include 0."""
    false_alarms = 0
    for seed in range(60):
        truth, first, _ = make(seed, 60, crowds=False)
        generator = np.random.default_rng(seed)
        noisy = [
            [
                {**row, "bbox": [*(np.array(row["bbox"][:2]) + generator.normal(0, 3, 2)), *row["bbox"][2:]]}
                for row in first
            ]
            for _ in range(2)
        ]
        (found,) = compare(truth, [Results.from_coco(rows) for rows in noisy], num_draws=200, seed=seed)
        false_alarms += found.numbers["AP"].is_significant
    assert false_alarms <= 8  # of 60; 3 are expected, and more than 8 have a probability of 0.4%


def test_detections_of_nothing_and_of_an_image_without_objects() -> None:
    truth, first, _ = make(3, 8)
    (found,) = compare(truth, [Results.from_coco(first), Results.from_coco([])], num_draws=20)
    assert found.numbers["AP"].difference == pytest.approx(-coco_ap(truth, first)["AP"])


def test_without_an_object_there_is_nothing_to_compare() -> None:
    truth, first, second = make(3, 8)
    results = [Results.from_coco(rows) for rows in (first, second)]
    (found,) = compare({**truth, "annotations": []}, results, num_draws=20)
    assert (found.numbers, found.classes) == ({}, {})
    # One object, which two of three draws lack
    (found,) = compare({**truth, "annotations": truth["annotations"][:1]}, results, num_draws=100)
    assert np.isfinite(found.numbers["AP"].low)
    assert found.classes == {}
