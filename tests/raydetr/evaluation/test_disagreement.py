"""The images on which two sets of detections disagree, on constructed cases."""

from __future__ import annotations

from typing import Any

from raydetr.evaluation.disagreement import Disagreement, disagreements
from raydetr.evaluation.results import Results

BOXES = {1: [0.0, 0.0, 20.0, 20.0], 2: [50.0, 50.0, 30.0, 30.0], 3: [10.0, 60.0, 25.0, 25.0]}


def truth(*, crowd: bool = False) -> dict[str, Any]:
    """Three images with the same three objects of one class; with `crowd`, the third object of each is a crowd."""
    annotations = [
        {"id": 10 * image + number, "image_id": image, "category_id": 4, "bbox": box, "area": box[2] * box[3],
         "iscrowd": int(crowd and number == 3)}
        for image in (100, 200, 300) for number, box in BOXES.items()
    ]  # fmt: skip
    images = [{"id": image, "width": 100, "height": 100} for image in (100, 200, 300)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 4, "name": "cat"}]}


def detections(
    found: dict[int, list[int]], false: dict[int, int], score: float = 0.9
) -> list[dict[str, Any]]:
    rows = [{"image_id": image, "category_id": 4, "bbox": BOXES[number], "score": score}
            for image, numbers in found.items() for number in numbers]  # fmt: skip
    rows += [{"image_id": image, "category_id": 4, "bbox": [70.0 + number, 0.0, 9.0, 9.0], "score": score}
             for image, count in false.items() for number in range(count)]  # fmt: skip
    return rows


def test_the_image_with_most_differences_is_first() -> None:
    first = detections({100: [1, 2, 3], 200: [1, 2], 300: [1, 2, 3]}, {})
    second = detections({100: [1, 2, 3], 200: [2, 3], 300: [1]}, {300: 2})
    rows = disagreements(truth(), [Results.from_coco(each) for each in (first, second)], (0.5, 0.5))
    assert rows == [
        Disagreement(300, 3, num_found=(3, 1), num_false=(0, 2), num_only_one=2),
        Disagreement(
            200, 3, num_found=(2, 2), num_false=(0, 0), num_only_one=2
        ),  # each finds one that the other does not
    ]
    assert [row.size for row in rows] == [4, 2]


def test_scores_below_the_threshold_do_not_count() -> None:
    """A model whose scores are all lower does not disagree with one that finds the same objects."""
    first = detections({100: [1, 2, 3], 200: [1, 2, 3]}, {})
    second = detections({100: [1, 2, 3], 200: [1, 2, 3]}, {}, score=0.2) + detections({}, {100: 9}, score=0.1)
    sets = [Results.from_coco(each) for each in (first, second)]
    assert disagreements(truth(), sets, (0.9, 0.2)) == []
    assert [row.num_false for row in disagreements(truth(), sets, (0.9, 0.1))] == [(0, 9)]


def test_crowds_are_neither_found_nor_missed() -> None:
    first, second = detections({100: [1, 2, 3]}, {}), detections({100: [1, 2]}, {})
    sets = [Results.from_coco(each) for each in (first, second)]
    assert disagreements(truth(crowd=True), sets, (0.5, 0.5)) == []
