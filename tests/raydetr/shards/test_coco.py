from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import goldens
from made_coco import write_json
from raydetr.shards.coco import load_coco, usable_boxes

GOLDEN = goldens.FOLDER

VALID: dict[str, Any] = {
    "info": {"year": 2017},
    "images": [
        {"id": 5, "file_name": "a.jpg", "width": 60, "height": 40},
        {"id": 2, "file_name": "b.jpg", "width": 60, "height": 40},
    ],
    "annotations": [
        {"id": 11, "image_id": 2, "category_id": 8, "bbox": [1, 2, 10, 9.5], "area": 50.5, "iscrowd": 0},
        {"id": 12, "image_id": 2, "category_id": 3, "bbox": [1, 2, 10, 9.5], "area": 50.5},
    ],
    "categories": [{"id": 8, "name": "dog"}, {"id": 3, "name": "cat"}],
}


def test_valid_file_is_kept_as_it_is(tmp_path: Path) -> None:
    dataset = load_coco(write_json(tmp_path / "a.json", VALID))
    assert dataset.images == VALID["images"]
    assert dataset.annotations == {2: VALID["annotations"]}
    assert [category["id"] for category in dataset.categories] == [3, 8]
    assert dataset.header == {"info": {"year": 2017}}
    assert dataset.notices == [
        "1 images without annotations: kept, training sees them as background (images 5)"
    ]


Change = Callable[[dict[str, Any]], object]

PROBLEMS: list[tuple[str, Change, str]] = [
    ("no images", lambda d: d.pop("images"), r'"images" is missing: it must be a list'),
    ("annotations no list", lambda d: d.update(annotations={}), r'"annotations" is \{\}: it must be a list'),
    ("nothing", lambda d: d.update(images=[], annotations=[]), r'"images" is an empty list'),
    ("image no dict", lambda d: d["images"].append(3), r"images\[2\] is 3: it must be an object"),
    (
        "id missing",
        lambda d: d["images"][0].pop("id"),
        r"images\[0\]: id is missing: it must be a whole number",
    ),
    (
        "id text",
        lambda d: d["images"][0].update(id="5"),
        r"images\[0\]: id is '5': it must be a whole number",
    ),
    ("image twice", lambda d: d["images"][1].update(id=5), r"images\[1\]: id 5 is used before: give each"),
    (
        "no width",
        lambda d: d["images"][0].pop("width"),
        r"images\[0\] \(id 5\): width is missing: it must be",
    ),
    ("width 0", lambda d: d["images"][0].update(width=0), r"width is 0: it must be a positive whole number"),
    ("width true", lambda d: d["images"][0].update(width=True), r"width is True: it must be a positive"),
    ("height text", lambda d: d["images"][0].update(height="40"), r"height is '40': it must be a positive"),
    ("no name", lambda d: d["images"][0].update(file_name=None), r"file_name is None: it must be the path"),
    ("category twice", lambda d: d["categories"][1].update(id=8), r"categories\[1\]: id 8 is used before"),
    (
        "category name",
        lambda d: d["categories"][0].update(name=1),
        r"categories\[0\] \(id 8\): name is 1: it must",
    ),
    (
        "names equal",
        lambda d: d["categories"][0].update(name="cat"),
        r"categories: 2 are named 'cat': give each",
    ),
    ("category id", lambda d: d["categories"][0].update(id=-8), r"the id must not be negative: number the"),
    (
        "unknown image",
        lambda d: d["annotations"][0].update(image_id=77),
        r"annotations \(id 11\): image_id 77 is not in images",
    ),
    (
        "unknown category",
        lambda d: d["annotations"][0].update(category_id=1),
        r"category_id 1 is not in categories: add",
    ),
    (
        "annotation twice",
        lambda d: d["annotations"][1].update(id=11),
        r"annotations\[1\]: id 11 is used before",
    ),
    (
        "no bbox",
        lambda d: d["annotations"][0].pop("bbox"),
        r"\(id 11\): bbox is missing: it must be \[x, y, width",
    ),
    ("bbox of 3", lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), r"bbox is \[1, 2, 3\]: it must be"),
    (
        "NaN",
        lambda d: d["annotations"][0].update(bbox=[math.nan, 1, 2, 3]),
        r"bbox is \[nan, 1, 2, 3\]: it must be",
    ),
    (
        "inf",
        lambda d: d["annotations"][0].update(bbox=[1, 1, math.inf, 3]),
        r"bbox is \[1, 1, inf, 3\].*finite",
    ),
    (
        "negative",
        lambda d: d["annotations"][0].update(bbox=[5, 1, -2, 3]),
        r"width and height must not be negative",
    ),
    ("no area", lambda d: d["annotations"][0].pop("area"), r"area is missing: COCO AP needs the area"),
    ("area NaN", lambda d: d["annotations"][0].update(area=math.nan), r"area is nan: COCO AP needs the area"),
    ("crowd", lambda d: d["annotations"][0].update(iscrowd=2), r"iscrowd is 2: it must be 0 or 1"),
]


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in PROBLEMS], ids=[case[0] for case in PROBLEMS]
)
def test_problems_name_file_field_value_and_remedy(tmp_path: Path, change: Change, message: str) -> None:
    data = copy.deepcopy(VALID)
    change(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_coco(write_json(tmp_path / "a.json", data))
    assert str(caught.value).startswith(f"{tmp_path}/a.json: ")


def test_ten_problems_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    data = copy.deepcopy(VALID)
    data["annotations"] = [{"id": i, "image_id": 2, "category_id": 8, "area": 1} for i in range(25)]
    with pytest.raises(ValueError, match="25 problems") as caught:
        load_coco(write_json(tmp_path / "a.json", data))
    assert str(caught.value).count("bbox is missing") == 10
    assert str(caught.value).endswith("and 15 more")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xd8 an image", "is not JSON"),
        (b'{"images": [', "is not JSON"),
        (b"[1, 2]", "holds a list, not an object with images, annotations and categories"),
        (None, "cannot be read.*name a COCO annotation file"),
    ],
)
def test_files_that_are_not_coco(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_coco(path)


def test_unusual_annotations_are_counted_in_notices(tmp_path: Path) -> None:
    data = copy.deepcopy(VALID)
    boxes = {0: [50, 5, 30, 5], 13: [70, 5, 5, 5], 14: [5, 5, 0, 5], 15: [-0.2, 5, 20, 5], 16: [5, 5, 5, 5]}
    data["annotations"] += [
        {"id": i, "image_id": 5, "category_id": 8, "bbox": box, "area": 1, "iscrowd": int(i == 16)}
        for i, box in boxes.items()
    ]
    assert load_coco(write_json(tmp_path / "a.json", data)).notices == [
        "1 crowd annotations: not trained on, ignored regions in evaluation (annotations 16)",
        "2 boxes without any area inside their image: not trained on (annotations 13, 14)",
        "1 boxes that reach out of their image: clamped in training (annotations 0)",
        "1 annotation with id 0, which pycocotools takes for `no match`: number from 1 (annotations 0)",
    ]


def test_boxes_for_training_equal_the_official_conversion() -> None:
    golden = json.loads((GOLDEN / "data.json").read_text())
    for image in golden["images"]:
        width, height = image["wh"]
        boxes, category_ids = usable_boxes(image["annotations"], width, height)
        np.testing.assert_allclose(boxes, np.reshape(image["converted"]["boxes"], (-1, 4)), atol=1e-4)
        assert category_ids == image["converted"]["labels"]
