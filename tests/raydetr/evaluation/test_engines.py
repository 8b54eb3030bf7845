"""Both engines against pycocotools itself, on cases that are made to be difficult."""

from __future__ import annotations

import contextlib
import io
from typing import Any, Literal

import hotcoco
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydetr.evaluation.coco_metrics import NAMES, coco_ap
from raydetr.evaluation.results import Results

ENGINES: tuple[Literal["hotcoco", "pycocotools"], ...] = ("hotcoco", "pycocotools")

# Few values, so that boxes coincide, scores tie, and areas lie on the bounds of small, medium and large
SIDES = st.sampled_from([0.0, 1.0, 8.0, 31.999, 32.0, 32.001, 50.0, 96.0, 97.5, 200.0])
BOX = st.tuples(st.sampled_from([0.0, 5.0, 10.0, 33.3]), st.sampled_from([0.0, 7.5, 40.0]), SIDES, SIDES)
SCORE = st.sampled_from([0.0, 0.1, 0.5, 0.5000001, 0.9, 1.0])
IMAGE_IDS = (0, 3, 139, 2**31 + 7, 2**53 + 1, 2**62)  # the last two are not float64 numbers
CATEGORY_IDS = (1, 2, 17, 90)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draw a ground truth and results: images and classes without objects, crowds, areas unlike the boxes."""
    image_ids = draw(st.lists(st.sampled_from(IMAGE_IDS), min_size=1, unique=True))
    category_ids = draw(st.lists(st.sampled_from(CATEGORY_IDS), min_size=1, unique=True))
    in_image, in_category = st.sampled_from(image_ids), st.sampled_from(category_ids)
    annotations = []
    for number in range(draw(st.integers(0, 12))):
        box = draw(BOX)
        annotation = {
            "id": number, "image_id": draw(in_image), "category_id": draw(in_category), "bbox": list(box),
            "area": draw(st.sampled_from([box[2] * box[3], 0.5 * box[2] * box[3], 1024.0, 9216.0])),
            "iscrowd": int(draw(st.integers(0, 4)) == 0),
        }  # fmt: skip
        annotations.append(annotation)
    results = []
    for _ in range(draw(st.integers(0, 25))):
        near = draw(st.integers(0, len(annotations))) - 1
        box = draw(BOX) if near < 0 else tuple(annotations[near]["bbox"])
        same = near >= 0 and draw(st.booleans())
        result = {
            "image_id": annotations[near]["image_id"] if same else draw(in_image),
            "category_id": annotations[near]["category_id"] if same else draw(in_category),
            "bbox": [value + draw(st.sampled_from([0.0, 0.0, 1.0, 3.0])) for value in box],
            "score": draw(SCORE),
        }
        results.append(result)
    categories = [{"id": category_id, "name": f"class {category_id}"} for category_id in category_ids]
    images = [{"id": image_id, "file_name": f"{image_id}.jpg"} for image_id in image_ids]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def in_order(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort independently of `Results.sorted`."""
    return sorted(results, key=lambda r: (r["image_id"], -r["score"], r["category_id"], *r["bbox"]))


def plain(
    ground_truth: dict[str, Any], results: list[dict[str, Any]]
) -> tuple[list[float], list[float], list[float]]:
    """Return pycocotools' twelve numbers, and AP and AP50 by class. It needs ids of annotations from 1 on."""
    truth, found = COCO(), COCO()
    annotations = [{**a, "id": a["id"] + 1} for a in ground_truth["annotations"]]
    truth.dataset = {**ground_truth, "annotations": annotations}
    # Not by loadRes, which does not take an empty list; the same fields
    found.dataset = {
        **ground_truth,
        "annotations": [
            {**r, "area": r["bbox"][2] * r["bbox"][3], "id": number, "iscrowd": 0}
            for number, r in enumerate(in_order(results), 1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    by_class = np.moveaxis(evaluation.eval["precision"][..., 0, 2], 2, 0)
    means = [
        [np.mean(x[x > -1]) if (x > -1).any() else -1 for x in part] for part in (by_class, by_class[:, 0])
    ]
    return evaluation.stats.tolist(), *means


def case(annotations: int, results: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    box = {"image_id": 3, "category_id": 17, "bbox": [0.0, 0.0, 50.0, 50.0]}
    truth = {
        "images": [{"id": 3}],
        "annotations": [{**box, "id": number, "area": 2500.0, "iscrowd": 0} for number in range(annotations)],
        "categories": [{"id": 17, "name": "class 17"}],
    }
    return truth, [{**box, "score": 0.5} for _ in range(results)]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.randoms(use_true_random=False))
@example(case(0, 0), None)
@example(case(2, 0), None)
@example(case(0, 2), None)
@example(case(1, 101), None)
def test_all_numbers_equal_those_of_pycocotools(
    drawn: tuple[dict[str, Any], list[dict[str, Any]]], random: Any
) -> None:
    ground_truth, results = drawn
    numbers, ap, ap50 = plain(ground_truth, results)
    arrived = list(results)
    if random is not None:
        random.shuffle(arrived)
    for engine in ENGINES:
        table = coco_ap(ground_truth, Results.from_coco(arrived), engine)
        assert [table[name] for name in NAMES] == pytest.approx(numbers, abs=1e-12)
        assert [row.ap for row in table.classes] == pytest.approx(ap, abs=1e-12)
        assert [row.ap50 for row in table.classes] == pytest.approx(ap50, abs=1e-12)
        assert [row.category_id for row in table.classes] == sorted(
            c["id"] for c in ground_truth["categories"]
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_detections_of_unknown_categories_and_objects_of_unknown_images_do_not_count(
    engine: Literal["hotcoco", "pycocotools"],
) -> None:
    ground_truth, results = case(1, 1)
    expected = coco_ap(ground_truth, results, engine)
    assert expected["AP"] == pytest.approx(1.0)
    unknown = {**results[0], "category_id": 5, "score": 0.9}
    elsewhere = {**ground_truth["annotations"][0], "id": 9, "image_id": 4}
    more = {**ground_truth, "annotations": [*ground_truth["annotations"], elsewhere]}
    assert coco_ap(more, [unknown, *results], engine).numbers == expected.numbers


def test_what_the_engine_is_relied_upon_for() -> None:
    """Of hotcoco's columns and arrays: the same as dicts; float64 boxes and scores, not float32."""
    box = [0.1, 0.2, 33.3, 44.4]
    annotation = {"id": 1, "image_id": 2, "category_id": 3, "bbox": box, "area": 5.5, "iscrowd": 1}
    images, categories = [{"id": 2}], [{"id": 3, "name": "x"}]
    truth = hotcoco.COCO.from_arrays(
        images,
        categories,
        np.array([2]),
        np.array([3]),
        np.array([box]),
        area=np.array([5.5]),
        iscrowd=np.array([1]),
    )
    kept = truth.load_anns([1])[0]
    assert {name: kept[name] for name in annotation} == annotation
    score = 0.123456789012345
    found = truth.load_res(np.array([[2, *box, score, 3]]))
    loaded = found.load_anns(found.get_ann_ids())[0]
    assert (loaded["bbox"], loaded["score"], loaded["image_id"], loaded["category_id"]) == (box, score, 2, 3)
    assert loaded["area"] == box[2] * box[3]
