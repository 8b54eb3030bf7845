from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import goldens
from made_coco import write_json
from raydetr.shards.coco import check_records, load_coco, usable_boxes
from raydetr.shards.manifest import SAMPLE_DTYPE
from raydetr.shards.validation import parse_record

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
        r"named 'cat', with the ids 8 \(1 annotations\), 3 \(1 annotations\): give each its own name, or remove",
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
        r"is not JSON \(it holds NaN",
    ),
    (
        "inf",
        lambda d: d["annotations"][0].update(bbox=[1, 1, math.inf, 3]),
        r"is not JSON \(it holds Infinity",
    ),
    (
        "negative",
        lambda d: d["annotations"][0].update(bbox=[5, 1, -2, 3]),
        r"width and height must not be negative",
    ),
    ("no area", lambda d: d["annotations"][0].pop("area"), r"area is missing: COCO AP needs the area"),
    ("area NaN", lambda d: d["annotations"][0].update(area=math.nan), r"is not JSON \(it holds NaN"),
    ("area text", lambda d: d["annotations"][0].update(area="1"), r"area is '1': COCO AP needs the area"),
    *(
        (
            f"crowd {value!r}",
            lambda d, v=value: d["annotations"][0].update(iscrowd=v),
            r"iscrowd is .*: it must be 0 or 1",
        )
        for value in (2, -1, "0", "false", None, True, False, 1.0, [1])
    ),
    ("no categories", lambda d: d.update(categories=[]), r'"categories" is an empty list: name the classes'),
    (
        "control",
        lambda d: d["categories"][0].update(name="a\x07b"),
        r"is 'a\\x07b': remove its control characters",
    ),
    ("half", lambda d: d["categories"][0].update(name="a\ud800"), r"remove its control characters"),
    ("blank", lambda d: d["categories"][0].update(name=" \n"), r"name is ' \\n': it must be text"),
    ("NUL", lambda d: d["images"][0].update(file_name="a\0.jpg"), r"must not have control characters"),
    ("large", lambda d: d["annotations"][0].update(bbox=[1e300, 1, 1, 1]), r"four finite numbers of pixels"),
    (
        "digits",
        lambda d: d["annotations"][0].update(bbox=[10**400, 1, 1, 1]),
        r"four finite numbers of pixels",
    ),
    (
        "digits of an id",
        lambda d: d["annotations"][0].update(id=10**4000),
        r"id is 10+: it must be a whole number",
    ),
    ("width", lambda d: d["images"][0].update(width=10**400), r"width is 10+: it must be a positive"),
    (
        "normalized",
        lambda d: [annotation.update(bbox=[0.1, 0.2, 0.3, 0.4]) for annotation in d["annotations"]],
        r"boxes must be in pixels, not normalized",
    ),
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
        (b"[" * 100_000, "is not JSON .it is nested too deeply"),
        (b'{"images": [], "x": ' + b"9" * 5000 + b"}", "is not JSON .Exceeds the limit"),
        (b'{"images": [{"id": 1, "id": 2}]}', "is not JSON .the key 'id' occurs twice in an object"),
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
        "1 areas that are 0, above the box's, or under 1% of it: AP by size (APs, APm, APl) means nothing for them; "
        "without masks, the area is the width times the height of the box (annotations 0)",
    ]


def test_names_lose_the_spaces_around_them(tmp_path: Path) -> None:
    data = copy.deepcopy(VALID)
    data["categories"][0]["name"] = "\u2003big cat\r\n"
    dataset = load_coco(write_json(tmp_path / "a.json", data))
    assert "big cat" in [category["name"] for category in dataset.categories]
    assert "spaces around 1 class names are removed ('\\u2003big cat\\r\\n')" in dataset.notices


def test_boxes_that_look_like_corners_are_noticed(tmp_path: Path) -> None:
    data = copy.deepcopy(VALID)
    data["annotations"] = [
        {"id": i, "image_id": 5, "category_id": 8, "bbox": [30, 20, 35, 25], "area": 875} for i in range(1, 5)
    ]
    notices = " ".join(load_coco(write_json(tmp_path / "a.json", data)).notices)
    assert "4 of 4 boxes reach out of their image, as boxes [x1, y1, x2, y2] do" in notices


def test_files_of_several_images_and_ignore_are_noticed(tmp_path: Path) -> None:
    data = copy.deepcopy(VALID)
    for image in data["images"]:
        image["file_name"] = "same.jpg"
    data["annotations"][0]["ignore"] = 1
    notices = " ".join(load_coco(write_json(tmp_path / "a.json", data)).notices)
    assert "1 files are named by several images, such as same.jpg" in notices
    assert "give each file one image with all of its annotations" in notices
    assert '1 annotations with "ignore": 1: objects like all others, as in pycocotools' in notices


def test_pipes_are_refused(tmp_path: Path) -> None:
    """Reading one would wait for ever."""
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a.json: cannot be read \(not a regular file\)"):
        load_coco(tmp_path / "a.json")


NUMBERS: list[Any] = [
    0, 1, -1, 2, 0.5, -0.0, 1e9, 1e308, -1e308, 2**31, 2**63, 10**400, True, False, None, "0", [], {}, 1.0,
]  # fmt: skip


def test_the_reader_accepts_an_annotation_if_and_only_if_the_writer_does(tmp_path: Path) -> None:
    """Pack a record by hand, as a faulty writer would, and compare the two verdicts."""
    rng, outcomes = np.random.default_rng(0), []
    for _ in range(3000):
        record: dict[str, Any] = {
            "id": 1, "image_id": 5, "category_id": 8, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0,
        }  # fmt: skip
        for _ in range(rng.integers(1, 3)):
            field = list(record)[rng.integers(len(record))]
            value = NUMBERS[rng.integers(len(NUMBERS))]
            if field == "bbox" and rng.random() < 0.8:
                value = [*record["bbox"]][:4] if isinstance(record["bbox"], list) else [1, 2, 3, 4]
                value[rng.integers(len(value))] = NUMBERS[rng.integers(len(NUMBERS))]
            record[field] = value
        image = VALID["images"][0]
        data = {**VALID, "images": [image], "annotations": [record]}
        row = np.zeros(1, SAMPLE_DTYPE)
        row["image_id"], row["num_annotations"] = 5, 1
        row["width"], row["height"] = image["width"], image["height"]
        text = json.dumps({"image": image, "annotations": [record]}).encode()
        verdicts = [
            accepts(lambda data=data: check_records(data, "x", "")),
            accepts(lambda row=row, text=text: parse_record(row[0], text, {3, 8})),
        ]
        assert verdicts[0] == verdicts[1], record
        outcomes.append(verdicts[0])
    assert 0.1 < sum(outcomes) / len(outcomes) < 0.9


def accepts(check: Callable[[], object]) -> bool:
    try:
        check()
    except ValueError:
        return False
    return True


def test_boxes_for_training_equal_the_official_conversion() -> None:
    golden = json.loads((GOLDEN / "data.json").read_text())
    for image in golden["images"]:
        width, height = image["wh"]
        boxes, category_ids = usable_boxes(image["annotations"], width, height)
        np.testing.assert_allclose(boxes, np.reshape(image["converted"]["boxes"], (-1, 4)), atol=1e-4)
        assert category_ids == image["converted"]["labels"]
