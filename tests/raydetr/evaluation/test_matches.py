"""What is computed from matches means what it says: constructed cases, and brute force on random ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from raydetr.evaluation.engines import hotcoco_evaluation
from raydetr.evaluation.matches import (
    TIDE_ERRORS,
    Matches,
    best_f1,
    calibration,
    confusion,
    match,
    tide,
)
from raydetr.evaluation.mistakes import MAX_PER_IMAGE, mistakes, most_confident
from raydetr.evaluation.results import Results
from tide_by_definition import intersection, iou, tide_by_definition

BOX = [0.0, 0.0, 100.0, 100.0]
FAR = [300.0, 300.0, 80.0, 80.0]


def box_at(x: float) -> list[float]:
    """BOX, moved to the right: its IoU with BOX is (100 - x) / (100 + x)."""
    return [x, 0.0, 100.0, 100.0]


def annotation(image_id: int, category_id: int, bbox: list[float], iscrowd: int = 0) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": iscrowd}


def detection(image_id: int, category_id: int, bbox: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


def dataset(annotations: list[dict[str, Any]], images: int = 2, categories: int = 2) -> dict[str, Any]:
    # Ids from 0 on, and not in order: a match must not depend on them
    numbered = [{**a, "id": number} for number, a in enumerate(annotations)]
    return {
        "images": [{"id": 7 * number} for number in reversed(range(images))],
        "categories": [{"id": 10 * (number + 1), "name": f"c{number}"} for number in range(categories)],
        "annotations": numbered,
    }


def matched(truth: dict[str, Any], detections: list[dict[str, Any]]) -> Matches:
    return match(truth, Results.from_coco(detections).sorted())


def random_case(
    seed: int, *, crowds: float = 0.0, images: int = 6, categories: int = 3
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Objects with detections that are shifted, doubled, of other classes or of nothing; every class has an object."""
    rng = np.random.default_rng(seed)
    annotations = [annotation(0, 10 * (k + 1), [120.0 * k, 200.0, 70.0, 60.0]) for k in range(categories)]
    detections = []
    for image in range(images):
        for _ in range(rng.integers(0, 5)):
            box = [float(v) for v in (*rng.integers(0, 120, 2), *rng.integers(20, 80, 2))]
            category = 10 * int(rng.integers(1, categories + 1))
            annotations.append(annotation(7 * image, category, box, int(rng.random() < crowds)))
            for _ in range(rng.integers(0, 4)):
                spread = rng.choice([0.02, 0.1, 0.3])
                shift = rng.normal(0, spread, 2)
                moved = [
                    box[0] + shift[0] * box[2],
                    box[1] + shift[1] * box[3],
                    box[2] * (1 + spread),
                    box[3],
                ]
                found = category if rng.random() < 0.7 else 10 * int(rng.integers(1, categories + 1))
                detections.append(detection(7 * image, found, [float(v) for v in moved], float(rng.random())))
        for _ in range(rng.integers(0, 3)):
            box = [float(v) for v in (*rng.integers(0, 120, 2), *rng.integers(20, 80, 2))]
            found = 10 * int(rng.integers(1, categories + 1))
            detections.append(detection(7 * image, found, box, float(rng.random())))
    return dataset(annotations, images, categories), detections


# --- TIDE, against the definitions of the paper ---

HALF = 51 / 101  # AP where precision is 1 up to recall 0.5, at 101 recalls
DUPLICATED = (51 + 50 * 2 / 3) / 101  # and 2/3 beyond it

CASES = {
    # The box is right, the class is not: with the right class, class 2 has AP 1
    "classification": (
        [annotation(0, 10, FAR), annotation(0, 20, BOX)],
        [detection(0, 10, FAR, 0.9), detection(0, 10, box_at(10), 0.8)],
        (0.5, 0.5),
    ),
    # IoU 1/3 with an object of the class
    "localization": ([annotation(0, 10, BOX)], [detection(0, 10, box_at(50), 0.9)], (0.0, 1.0)),
    # IoU 1/3 with an object of the other class, before the right detection of its own class
    "both": (
        [annotation(0, 10, FAR), annotation(0, 20, BOX)],
        [
            detection(0, 20, BOX, 0.9),
            detection(0, 10, box_at(50), 0.8),
            detection(0, 10, FAR, 0.5),
        ],
        (0.75, 0.25),
    ),
    # The second detection of an object, before the detection of another one
    "duplicate": (
        [annotation(0, 10, BOX), annotation(7, 10, BOX)],
        [detection(0, 10, BOX, 0.9), detection(0, 10, box_at(10), 0.8), detection(7, 10, BOX, 0.7)],
        (DUPLICATED, 1 - DUPLICATED),
    ),
    # IoU 10/190 with the only object there
    "background": (
        [annotation(0, 10, BOX), annotation(7, 10, BOX)],
        [detection(0, 10, BOX, 0.9), detection(0, 10, box_at(90), 0.8), detection(7, 10, BOX, 0.7)],
        (DUPLICATED, 1 - DUPLICATED),
    ),
    "missed": (
        [annotation(0, 10, BOX), annotation(7, 10, BOX)],
        [detection(0, 10, BOX, 0.9)],
        (HALF, 1 - HALF),
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_error_of_tide_is_what_the_paper_calls_it(kind: str) -> None:
    annotations, detections, (ap50, gain) = CASES[kind]
    found = tide(matched(dataset(annotations), detections))
    assert found.counts == {name: int(name == kind) for name in CASES}
    assert found.ap50 == pytest.approx(ap50, abs=1e-12)
    assert found.delta_ap == pytest.approx({name: gain if name == kind else 0.0 for name in CASES}, abs=1e-12)
    assert tide_by_definition(dataset(annotations), detections)[1] == found.counts


def test_of_two_errors_about_one_object_only_the_first_is_corrected() -> None:
    annotations = [annotation(0, 10, BOX), annotation(7, 10, BOX)]
    detections = [
        detection(0, 10, box_at(50), 0.9),
        detection(0, 10, box_at(60), 0.8),
        detection(7, 10, BOX, 0.7),
    ]
    found = tide(matched(dataset(annotations), detections))
    assert found.counts["localization"] == 2
    assert found.ap50 + found.delta_ap["localization"] == pytest.approx(1.0)  # The second one disappears


@pytest.mark.parametrize("crowds", [0.0, 0.3])
def test_tide_is_that_of_the_paper_on_random_cases(crowds: float) -> None:
    seen: Counter[str] = Counter()
    for seed in range(60):
        truth, detections = random_case(seed, crowds=crowds)
        ap50, counts, deltas = tide_by_definition(truth, detections)
        found = tide(matched(truth, detections))
        assert found.counts == counts, seed
        assert found.ap50 == pytest.approx(ap50, abs=1e-9), seed
        assert found.delta_ap == pytest.approx(deltas, abs=1e-9), seed
        seen.update(counts)
    assert set(seen) == set(TIDE_ERRORS.values())
    assert min(seen.values()) > 10


def test_a_detection_that_overlaps_a_crowd_in_part_is_one_of_background() -> None:
    """hotcoco 1.3 alone calls it a localization error, although a crowd is no object: see matches.py."""
    annotations = [annotation(0, 10, BOX, 1), annotation(7, 10, BOX)]
    detections = [detection(0, 10, box_at(70), 0.9), detection(7, 10, BOX, 0.8)]
    found = tide(matched(dataset(annotations), detections))
    assert found.counts == {name: int(name == "background") for name in TIDE_ERRORS.values()}
    plain = hotcoco_evaluation(dataset(annotations), Results.from_coco(detections))
    plain.evaluate()
    assert plain.tide_errors()["counts"]["Loc"] == 1  # If this fails, matches.py can do without its own


@pytest.mark.parametrize("seed", range(8))
def test_every_mistake_is_the_error_that_tide_counts(seed: int) -> None:
    truth, detections = random_case(seed, crowds=0.2, images=12)
    matches = matched(truth, detections)
    listed = list(mistakes(matches))
    counts = tide(matches).counts
    assert Counter(each.error for each in listed) == Counter(
        {name: count for name, count in counts.items() if name != "missed" and count}
    )
    assert [each.score for each in listed] == sorted((each.score for each in listed), reverse=True)
    best = most_confident(matches, 5)
    assert max(Counter(each.image_id for each in best).values()) <= MAX_PER_IMAGE
    assert best[0] == listed[0]


# --- Confusion matrix ---


def confusion_by_hand(
    truth: dict[str, Any], detections: list[dict[str, Any]], min_score: float
) -> np.ndarray:
    """Match whatever the classes are, the highest score first; detections on crowds do not count."""
    ids = sorted(category["id"] for category in truth["categories"])
    matrix = np.zeros((len(ids) + 1, len(ids) + 1), int)
    free = [a for a in truth["annotations"] if not a["iscrowd"]]
    crowds = [a for a in truth["annotations"] if a["iscrowd"]]
    counted = {id(d) for d in counting(truth, detections)}
    for found in sorted(detections, key=lambda d: -d["score"]):
        if id(found) not in counted or found["score"] < min_score:
            continue
        near = [o for o in free if o["image_id"] == found["image_id"]]
        best = max(near, key=lambda o: iou(found["bbox"], o["bbox"]), default=None)
        column = ids.index(found["category_id"])
        if best is not None and iou(found["bbox"], best["bbox"]) >= 0.5:
            free = [o for o in free if o is not best]
            matrix[ids.index(best["category_id"]), column] += 1
        else:
            matrix[-1, column] += 1
    for left in free:
        matrix[ids.index(left["category_id"]), -1] += 1
    assert crowds or not any(a["iscrowd"] for a in truth["annotations"])
    return matrix


def counting(truth: dict[str, Any], detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The detections that COCO counts: those that match an object, and those that are on no crowd of their class."""
    taken: set[int] = set()
    counted = []
    for found in sorted(detections, key=lambda d: -d["score"]):
        own = [
            a
            for a in truth["annotations"]
            if (a["image_id"], a["category_id"]) == (found["image_id"], found["category_id"])
        ]
        free = [a for a in own if not a["iscrowd"] and a["id"] not in taken]
        best = max(free, key=lambda a: iou(found["bbox"], a["bbox"]), default=None)
        if best is not None and iou(found["bbox"], best["bbox"]) >= 0.5:
            taken.add(best["id"])
            counted.append(found)
            continue
        area = found["bbox"][2] * found["bbox"][3]
        if not any(a["iscrowd"] and intersection(found["bbox"], a["bbox"]) / area >= 0.5 for a in own):
            counted.append(found)
    return counted


@pytest.mark.parametrize("crowds", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(12))
def test_the_confusion_matrix_is_that_of_brute_force(seed: int, crowds: float) -> None:
    truth, detections = random_case(seed, crowds=crowds)
    for min_score in (0.0, 0.4):
        found = confusion(matched(truth, detections), min_score)
        assert found.tolist() == confusion_by_hand(truth, detections, min_score).tolist()
    num_objects = sum(not a["iscrowd"] for a in truth["annotations"])
    assert found[:-1].sum() == num_objects  # Each object is in its row, once


def test_a_detection_on_a_crowd_is_not_one_of_background() -> None:
    annotations = [annotation(0, 10, BOX, 1), annotation(7, 20, BOX)]
    matches = matched(dataset(annotations), [detection(0, 10, [10.0, 10.0, 40.0, 40.0], 0.9)])
    assert len(matches.results) == 0
    assert confusion(matches, 0.0).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_many_detections_of_many_classes_in_one_image_all_count() -> None:
    """COCO's limit of 100 is one for each class."""
    detections = [
        detection(0, 10 * (k + 1), [5.0 * i, 10.0, 4.0, 4.0], 0.5) for k in range(3) for i in range(60)
    ]
    matches = matched(dataset([annotation(0, 10, FAR)], 1, 3), detections)
    assert confusion(matches, 0.0)[-1].tolist() == [60, 60, 60, 0]
    more = [*detections, *(detection(0, 10, [0.0, 20.0 + i, 4.0, 4.0], 0.4) for i in range(60))]
    assert confusion(matched(dataset([annotation(0, 10, FAR)], 1, 3), more), 0.0)[-1].tolist() == [
        100,
        60,
        60,
        0,
    ]


# --- Calibration ---


@pytest.mark.parametrize("seed", range(6))
def test_the_calibration_is_that_of_brute_force(seed: int) -> None:
    truth, detections = random_case(seed, crowds=0.2, images=20)
    detections[0]["score"], detections[1]["score"], detections[2]["score"] = 1.0, 0.0, 0.3
    matches = matched(truth, detections)
    found = calibration(matches)
    assert found is not None
    rows = list(zip(matches.results.scores, matches.is_correct, matches.results.category_ids, strict=True))
    assert len(rows) == len(counting(truth, detections))

    def errors(own: list[Any]) -> list[tuple[int, float]]:
        bins = [[(s, c) for s, c, _ in own if min(int(s * 10), 9) == place] for place in range(10)]
        return [
            (len(b), abs(sum(s for s, _ in b) / len(b) - sum(c for _, c in b) / len(b))) for b in bins if b
        ]

    gaps = errors(rows)
    assert found.ece == pytest.approx(sum(n * gap for n, gap in gaps) / len(rows), abs=1e-12)
    assert found.mce == pytest.approx(max(gap for _, gap in gaps), abs=1e-12)
    assert sum(found.counts) == len(rows)
    assert found.edges == pytest.approx([k / 10 for k in range(11)])
    for category in {int(row[2]) for row in rows}:
        own = [row for row in rows if row[2] == category]
        assert found.by_class[category] == pytest.approx(
            sum(n * gap for n, gap in errors(own)) / len(own), abs=1e-12
        )


@pytest.mark.parametrize("score", [-0.1, 1.5])
def test_scores_that_are_no_probabilities_have_no_calibration(score: float) -> None:
    matches = matched(dataset([annotation(0, 10, BOX)]), [detection(0, 10, BOX, score)])
    assert calibration(matches) is None
    assert tide(matches).ap50 == pytest.approx(1.0)


# --- F1 ---


@pytest.mark.parametrize("seed", range(20))
def test_the_best_f1_is_that_of_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, 30) / 8  # With equal ones, which a threshold cannot divide
    is_correct = rng.random(30) < scores
    num_objects = int(is_correct.sum()) + int(rng.integers(0, 5))
    found = best_f1(scores, is_correct, num_objects)
    assert found is not None
    candidates = []
    for threshold in set(scores):
        kept = is_correct[scores >= threshold]
        precision, recall = kept.mean(), kept.sum() / num_objects
        f1 = 2 * precision * recall / (precision + recall) if kept.any() else 0.0
        candidates.append((f1, threshold, precision, recall))
    f1, threshold, precision, recall = max(candidates)
    assert (found.f1, found.precision, found.recall) == pytest.approx((f1, precision, recall))
    assert found.threshold == threshold


def test_the_best_f1_of_nothing() -> None:
    nothing = np.zeros(0), np.zeros(0, bool)
    assert best_f1(*nothing, 0) is None
    found = best_f1(*nothing, 4)
    assert found is not None
    assert (found.f1, found.threshold, found.recall) == (0.0, None, 0.0)
    wrong = best_f1(np.array([0.9]), np.array([False]), 4)
    assert wrong is not None
    assert (wrong.f1, wrong.threshold) == (0.0, None)
