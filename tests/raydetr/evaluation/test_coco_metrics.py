from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydetr.evaluation.coco_metrics import NAMES, ApTable, coco_ap

CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 7, "name": "a rather long ring"}]


def truth(*annotations: dict[str, Any], num_images: int = 2) -> dict[str, Any]:
    images = [
        {"id": i + 1, "file_name": f"{i + 1}.jpg", "width": 200, "height": 200} for i in range(num_images)
    ]
    return {"images": images, "annotations": list(annotations), "categories": CATEGORIES}


def box(number: int, image_id: int, category_id: int, xywh: list[float], **more: Any) -> dict[str, Any]:
    area = xywh[2] * xywh[3]
    fields = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": xywh}
    return {**fields, "area": area, "iscrowd": 0, **more}


def result(image_id: int, category_id: int, xywh: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": xywh, "score": score}


def random_results(ground_truth: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """Make results: shifted true boxes, some of another class, with scores that tie often, and false positives."""
    draw = random.Random(seed)
    classes = [c["id"] for c in ground_truth["categories"]]
    results = []
    for annotation in ground_truth["annotations"]:
        for _ in range(draw.randint(0, 2)):
            left, top, width, height = annotation["bbox"]
            shift = [draw.uniform(-0.15, 0.15) for _ in range(4)]
            shifted = [
                left + shift[0] * width,
                top + shift[1] * height,
                width * (1 + shift[2]),
                height * (1 + shift[3]),
            ]
            category_id = annotation["category_id"] if draw.random() < 0.8 else draw.choice(classes)
            results.append(result(annotation["image_id"], category_id, shifted, round(draw.random(), 1)))
    return results


def plain_pycocotools(
    ground_truth: dict[str, Any], results: list[dict[str, Any]], tmp_path: Path
) -> COCOeval:
    (tmp_path / "truth.json").write_text(json.dumps(ground_truth))
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(tmp_path / "truth.json"))
        evaluation = COCOeval(known, known.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def test_hand_computed_case() -> None:
    ground_truth = truth(
        box(1, 1, 3, [10, 10, 20, 20]), box(2, 1, 3, [100, 100, 50, 50]), box(3, 2, 7, [0, 0, 100, 100])
    )
    results = [
        result(1, 3, [10, 10, 20, 20], 0.9),  # exact
        result(1, 3, [0, 100, 20, 20], 0.8),  # false positive
        # IoU 0.8: matched at thresholds 0.50 to 0.80, which are 7 of 10
        result(2, 7, [0, 0, 80, 100], 0.7),
    ]
    table = coco_ap(ground_truth, results)
    # disc: recall 1/2 at precision 1, then nothing: 51 of the 101 recall points (0.00 to 0.50)
    disc = 51 / 101
    assert table["AP"] == pytest.approx((disc + 0.7) / 2, abs=1e-12)
    assert table["AP50"] == pytest.approx((disc + 1.0) / 2, abs=1e-12)
    assert table["APs"] == pytest.approx(1.0)  # the one small object was found
    assert table["APm"] == pytest.approx(0.0)
    assert table["APl"] == pytest.approx(0.7)
    assert table["AR1"] == pytest.approx((0.5 + 0.7) / 2)
    assert [(c.name, c.num_objects) for c in table.classes] == [("disc", 2), ("a rather long ring", 1)]
    assert table.classes[0].ap == pytest.approx(disc)
    assert (table.classes[1].ap, table.classes[1].ap50) == pytest.approx((0.7, 1.0))


def test_equals_plain_pycocotools_on_photographs(tmp_path: Path) -> None:
    folder = os.environ.get("RAYDETR_COCO_TINY")
    if folder is None:
        pytest.skip("RAYDETR_COCO_TINY is not set: it names a folder with annotations/ train2017/ val2017/")
    ground_truth = json.loads((Path(folder) / "annotations/instances_val2017.json").read_text())
    results = random_results(ground_truth)
    results.sort(key=lambda r: (r["image_id"], -r["score"], r["category_id"], *r["bbox"]))
    before = copy.deepcopy(ground_truth)
    table = coco_ap(ground_truth, results)
    plain = plain_pycocotools(ground_truth, results, tmp_path)
    assert [table[name] for name in NAMES] == plain.stats.tolist()
    assert 0.1 < table["AP"] < table["AP50"] < 1
    assert ground_truth == before
    by_class = plain.eval["precision"][:, :, :, 0, 2]
    for column, row in enumerate(table.classes):
        seen = by_class[:, :, column]
        assert row.ap == (np.mean(seen[seen > -1]) if (seen > -1).any() else -1)
    crowds = [a for a in ground_truth["annotations"] if a["iscrowd"]]
    assert sum(row.num_objects for row in table.classes) == len(ground_truth["annotations"]) - len(crowds)


def test_order_of_arrival_does_not_matter() -> None:
    draw = random.Random(1)
    boxes = [
        box(i, 1 + i % 8, draw.choice([3, 7]), [draw.uniform(0, 100), draw.uniform(0, 100), 30 + i, 40])
        for i in range(1, 40)
    ]
    ground_truth = truth(*boxes, num_images=8)
    results = random_results(ground_truth)
    once = coco_ap(ground_truth, results).to_dict()
    for seed in range(5):
        random.Random(seed).shuffle(results)
        assert coco_ap(ground_truth, results).to_dict() == once


def test_equals_plain_pycocotools_on_random_boxes(tmp_path: Path) -> None:
    draw = random.Random(2)
    boxes = [box(i, 1 + i % 3, 3, [draw.uniform(0, 90), 5.0, 20 + i, 40]) for i in range(1, 20)]
    ground_truth = truth(*boxes, num_images=3)
    results = random_results(ground_truth)
    results.sort(key=lambda r: (r["image_id"], -r["score"], r["category_id"], *r["bbox"]))
    assert (
        list(coco_ap(ground_truth, results).numbers.values())
        == plain_pycocotools(ground_truth, results, tmp_path).stats.tolist()
    )


def test_no_results_is_zero() -> None:
    table = coco_ap(truth(box(1, 1, 3, [10, 10, 20, 20])), [])
    assert (table["AP"], table["AP50"], table["APs"], table["APl"], table["AR100"]) == (0, 0, 0, -1, 0)
    assert [c.ap for c in table.classes] == [0, -1]


@pytest.mark.parametrize("num_images", [0, 2])
def test_nothing_to_find_is_minus_one(num_images: int) -> None:
    results = [result(1, 3, [0, 0, 10, 10], 0.5)] if num_images else []
    table = coco_ap(truth(num_images=num_images), results)
    assert set(table.numbers.values()) == {-1}
    assert "AP50" in table.to_text()


def test_an_object_with_annotation_id_zero_counts() -> None:
    found = coco_ap(truth(box(0, 1, 3, [10, 10, 20, 20])), [result(1, 3, [10, 10, 20, 20], 0.9)])
    assert found["AP"] == pytest.approx(1.0)


def test_crowds_and_missing_optional_fields() -> None:
    bare = {"id": 5, "image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20]}
    crowd = box(6, 1, 3, [100, 100, 80, 80], iscrowd=1)
    inside_crowd = result(1, 3, [120, 120, 20, 20], 0.95)
    table = coco_ap(truth(bare, crowd), [result(1, 3, [10, 10, 20, 20], 0.9), inside_crowd])
    assert (table["AP"], table["APs"]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert table.classes[0].num_objects == 1


def test_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    coco_ap(truth(box(1, 1, 3, [10, 10, 20, 20])), [result(1, 3, [10, 10, 20, 20], 0.9)])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (result(99, 3, [0, 0, 1, 1], 0.5), "image 99"),
        (result(1, 3, [0, 0, 1, 1], float("nan")), "diverged"),
        (result(1, 3, [0, float("inf"), 1, 1], 0.5), "inf"),
    ],
)
def test_invalid_results_are_rejected(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coco_ap(truth(), [bad])


def test_tables_and_plain_values() -> None:
    ground_truth = truth(box(1, 1, 3, [10, 10, 20, 20]))
    table = coco_ap(ground_truth, [result(1, 3, [10, 10, 20, 20], 0.9)])
    assert ApTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    text = table.to_text().splitlines()
    assert text[0].split()[:2] == ["AP", "1.000"]
    assert ["disc", "1.000", "1.000", "1"] in [line.split() for line in text]
    assert ["a", "rather", "long", "ring", "-", "-", "0"] in [line.split() for line in text]
    markdown = table.to_markdown().splitlines()
    assert "| AP50 | 1.000 | IoU 0.50 |" in markdown
    assert "| disc | 1.000 | 1.000 | 1 |" in markdown
