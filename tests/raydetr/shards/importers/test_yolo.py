from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from made_coco import write_coco
from made_results import average_precision
from raydetr.shards.importers.yolo import yolo_source
from raydetr.shards.reader import open_shards
from raydetr.shards.writer import write_source

NAMES = "names: [cat, dog, bird]\n"


def write_data(
    root: Path, labels: dict[str, str | None], settings: str = f"train: images/train\n{NAMES}"
) -> Path:
    """Write images of 200x100 pixels with these label files, and data.yaml."""
    for name, text in labels.items():
        image = root / "images" / "train" / f"{name}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100), "gray").save(image)
        label = root / "labels" / "train" / f"{name}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            label.write_text(text)
    (root / "data.yaml").write_text(settings)
    return root / "data.yaml"


def test_boxes_and_polygons_equal_hand_computed_numbers(tmp_path: Path) -> None:
    box = "2 0.5 0.5 0.25 0.5\n\n0 0.1 0.2 0.2 0.4\n"
    polygon = "1 0.1 0.1 0.5 0.1 0.5 0.6 0.5 0.6\n"
    path = write_data(tmp_path, {"b": polygon, "a": box, "c": None, "d": ""})
    source = yolo_source(path, "train")
    size = {"width": 200, "height": 100}
    assert source.dataset.images == [
        {"id": number, "file_name": f"images/train/{name}.jpg", **size}
        for number, name in enumerate("abcd", 1)
    ]
    first, second = source.dataset.annotations[1]
    assert first == {
        "id": 1,
        "image_id": 1,
        "category_id": 2,
        "bbox": [75, 25, 50, 50],
        "area": 2500,
        "iscrowd": 0,
    }
    assert second["bbox"] == pytest.approx([0, 0, 40, 40])
    (third,) = source.dataset.annotations[2]
    assert third["bbox"] == pytest.approx([20, 10, 80, 50])
    assert third["area"] == pytest.approx(80 * 50 / 2)
    assert third["segmentation"] == [pytest.approx([20, 10, 100, 10, 100, 60, 100, 60])]
    assert source.dataset.categories == [
        {"id": 0, "name": "cat"},
        {"id": 1, "name": "dog"},
        {"id": 2, "name": "bird"},
    ]
    assert source.dataset.notices == [
        "2 images without annotations: kept, training sees them as background (images 3, 4)"
    ]


def test_average_precision_from_the_shards_equals_that_of_a_coco_file(tmp_path: Path) -> None:
    _, annotations = write_coco(tmp_path, 40)
    data = json.loads(annotations.read_text())
    data["images"].sort(key=lambda record: record["file_name"])
    classes = {3: 0, 7: 1, 90: 2}
    numbers = {record["id"]: number for number, record in enumerate(data["images"], 1)}
    (tmp_path / "labels").mkdir()
    for record in data["images"]:
        lines = []
        for annotation in data["annotations"]:
            if annotation["image_id"] == record["id"]:
                x, y, w, h = annotation["bbox"]
                cx, cy = (x + w / 2) / record["width"], (y + h / 2) / record["height"]
                label = classes[annotation["category_id"]]
                lines.append(f"{label} {cx!r} {cy!r} {w / record['width']!r} {h / record['height']!r}")
        (tmp_path / "labels" / record["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text("train: images\nnc: 3\nnames: {0: cat, 1: dog, 2: toothbrush}\n")
    manifest = write_source(yolo_source(tmp_path / "data.yaml", "train"), tmp_path / "out")
    expected = average_precision(coco_of(data, numbers, classes))
    assert 0.2 < expected[0] < 0.9
    assert average_precision(open_shards(tmp_path / "out").coco()) == pytest.approx(expected, abs=1e-9)
    assert manifest.source["name"] == "data.yaml [train]"


def coco_of(data: dict[str, Any], numbers: dict[int, int], classes: dict[int, int]) -> dict[str, Any]:
    """Return the same data set as a COCO file without crowds and masks."""
    order = {image_id: number for number, image_id in enumerate(numbers)}
    annotations = sorted(data["annotations"], key=lambda a: order[a["image_id"]])
    return {
        "images": [{**record, "id": numbers[record["id"]]} for record in data["images"]],
        "categories": [{"id": i, "name": str(i)} for i in range(3)],
        "annotations": [
            {
                **annotation,
                "id": number,
                "image_id": numbers[annotation["image_id"]],
                "category_id": classes[annotation["category_id"]],
                "iscrowd": 0,
                "area": annotation["bbox"][2] * annotation["bbox"][3],
            }
            for number, annotation in enumerate(annotations, 1)
        ],
    }


def test_images_can_be_named_by_folders_and_lists(tmp_path: Path) -> None:
    labels: dict[str, str | None] = {"a": "0 0.5 0.5 0.2 0.2", "b": None}
    (tmp_path / "outside").mkdir()

    def names(settings: str) -> list[str]:
        path = write_data(tmp_path / "set", labels, settings + NAMES)
        return [record["file_name"] for record in yolo_source(path, "train").dataset.images]

    both = ["images/train/a.jpg", "images/train/b.jpg"]
    assert names("train: images\n") == both
    assert names("train: ../images/train\n") == both  # as Roboflow writes it
    assert names(f"path: {tmp_path}/set\ntrain: [images/train]\n") == both
    listing = tmp_path / "set" / "train.txt"
    listing.write_text("./images/train/b.jpg\nimages/train/a.jpg\n\n")
    assert names("train: train.txt\n") == both
    listing.write_text(f"{tmp_path}/set/images/train/a.jpg\n")
    assert names("train: train.txt\n") == both[:1]


INVALID_LABELS = [
    ("0 0.5 0.5 0.2", r"a.txt, line 1: holds 4 numbers: there must be 5 \(class cx cy w h\), or the class"),
    ("0 0.5 0.5 0.2 0.2 0.9", "line 1: holds 6 numbers"),
    ("0 0.5 0.5 0.2 0.2 0.9 1", "line 1: holds 7 numbers, a triangle or a box with its confidence and track"),
    ("0 .5 .5 .2 .2\n3 .5 .5 .2 .2", "line 2: the class is 3: it must be a whole number from 0 to 2"),
    ("0.5 .5 .5 .2 .2", "the class is 0.5: it must be a whole number"),
    ("0 120 40 30 20", "120 is not between 0 and 1: positions and sizes are normalized"),
    ("0 nan .5 .2 .2", "nan is not between 0 and 1"),
    ("0 .5 .5 -.001 .2", "the box is -.001 wide and .2 high: neither must be negative"),
    ("0 .5 .5 .2 wide", "'0 .5 .5 .2 wide' holds something that is not a number: correct it"),
]


@pytest.mark.parametrize(("text", "message"), INVALID_LABELS)
def test_label_problems_name_file_line_value_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    path = write_data(tmp_path, {"a": text})
    with pytest.raises(ValueError, match=message) as caught:
        yolo_source(path, "train")
    assert f"{tmp_path}/labels/train/a.txt, line " in str(caught.value)


INVALID_SETTINGS = [
    ("train: images\nnames: []\n", r"names is \[\]: it must be the list of class names"),
    ("train: images\nnames: {1: a, 2: b}\n", "it must be the list of class names, or numbers from 0"),
    (f"train: images\nnc: 4\n{NAMES}", "nc is 4, but there are 3 names: correct one of them"),
    (f"val: images\n{NAMES}", r"train is None: it must be a folder, .* \(the file has val\)"),
    (f"path: nowhere\ntrain: images\n{NAMES}", "path is 'nowhere', and there is no folder"),
    (f"train: photos\n{NAMES}", "there is no .*/photos: correct `path` or the split's entry 'photos'"),
    (f"train: labels\n{NAMES}", "there are no images in labels"),
    (f"train: images\nkpt_shape: [17, 3]\n{NAMES}", "kpt_shape is set, so the labels hold key points"),
    ("- a\n", "holds no settings: name a YOLO data.yaml"),
    ("a: [", "is not YAML"),
]


@pytest.mark.parametrize(("settings", "message"), INVALID_SETTINGS)
def test_settings_problems_name_the_file(tmp_path: Path, settings: str, message: str) -> None:
    path = write_data(tmp_path, {"a": "0 .5 .5 .2 .2"}, settings)
    with pytest.raises(ValueError, match=message) as caught:
        yolo_source(path, "train")
    assert str(path) in str(caught.value)


def test_other_problems(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none/data.yaml: cannot be read \(No such file"):
        yolo_source(tmp_path / "none" / "data.yaml", "train")
    path = write_data(tmp_path, {"a": None, "b": None})
    with pytest.raises(ValueError, match=r"none of its 2 images of 'train' has labels .*labels/train/a.txt"):
        yolo_source(path, "train")
    (tmp_path / "labels/train/a.txt").write_text("0 .5 .5 .2 .2")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (200, 100)).save(tmp_path / "images/train/b.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"b.jpg: has the EXIF orientation 6, and its labels refer to"):
        yolo_source(path, "train")
    (tmp_path / "images/train/b.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b.jpg: is not a JPEG or PNG image"):
        yolo_source(path, "train")
    (tmp_path / "list.txt").write_text("images/train/a.jpg\nimages/train/z.jpg")
    path.write_text(f"train: list.txt\n{NAMES}")
    with pytest.raises(ValueError, match=r"list.txt, line 2: there is no file 'images/train/z.jpg'"):
        yolo_source(path, "train")


def test_unusual_label_files_give_notices(tmp_path: Path) -> None:
    path = write_data(tmp_path, {"a": "0 .5 .5 .2 .2\n1 .1 .1 .2 .1 .2 .3 .1 .1", "b": "0 .5 .5 .2 .2"})
    (tmp_path / "labels/train/gone.txt").write_text("0 .5 .5 .2 .2")
    notices = yolo_source(path, "train").dataset.notices
    assert notices[0] == "1 label files hold boxes and polygons: lines of 5 numbers are read as boxes"
    assert notices[1].startswith("1 label files match no image of the split (")
