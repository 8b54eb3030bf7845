from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from made_coco import write_coco
from made_results import average_precision
from raydetr.shards.importers.voc import voc_source
from raydetr.shards.reader import open_shards
from raydetr.shards.writer import write_source

OBJECT = """<object><name>{name}</name><pose>Left</pose><truncated>1</truncated><difficult>{difficult}</difficult>
<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""


def an_object(name: str, box: tuple[object, ...], difficult: object = 0) -> str:
    names = ("xmin", "ymin", "xmax", "ymax")
    return OBJECT.format(name=name, difficult=difficult, **dict(zip(names, box, strict=True)))


def write_voc(root: Path, objects: dict[str, str], size: tuple[object, object] = (50, 40)) -> Path:
    """Write images of 50x40 pixels with these objects, all in the split train."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for name, text in objects.items():
        Image.new("RGB", (50, 40), "gray").save(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>elsewhere.jpg</filename><size><width>{size[0]}</width><height>{size[1]}</height>"
            f"<depth>3</depth></size>{text}</annotation>"
        )
    (root / "ImageSets/Main/train.txt").write_text("\n".join(objects) + "\n")
    return root


def test_boxes_equal_hand_computed_numbers(tmp_path: Path) -> None:
    text = an_object("dog", (1, 1, 50, 40)) + an_object("cat", (11, 6, 11, 25), difficult=1)
    root = write_voc(tmp_path / "VOC2007", {"b": text, "a": an_object("person", ("45.7", 2, "48.7", 3))})
    (root / "Annotations/other.xml").write_text("<annotation><object><name>bird</name></object></annotation>")
    source = voc_source(root, "train")
    assert [record["file_name"] for record in source.dataset.images] == ["a.jpg", "b.jpg"]
    names = ["bird", "cat", "dog", "person"]  # of all splits; parts of objects are not categories
    assert source.dataset.categories == [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    (first,) = source.dataset.annotations[1]
    assert first["bbox"] == pytest.approx([44.7, 1, 4, 2])
    assert source.dataset.annotations[2] == [
        {  # the complete image
            "id": 2,
            "image_id": 2,
            "category_id": 3,
            "bbox": [0, 0, 50, 40],
            "area": 2000,
            "iscrowd": 0,
        },
        {  # a column of pixels
            "id": 3,
            "image_id": 2,
            "category_id": 2,
            "bbox": [10, 5, 1, 20],
            "area": 20,
            "iscrowd": 1,
        },
    ]
    assert source.dataset.notices[-1] == (
        "1 crowd annotations are objects that Pascal VOC marks as difficult"
    )


def test_boxes_that_count_from_zero(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": an_object("dog", (0, 0, 50, 40)) + an_object("dog", (10, 5, 11, 25))})
    with pytest.raises(ValueError, match=r"a.xml: dog: the box begins at 0, 0, but .* use --zero-based"):
        voc_source(root, "train")
    boxes = [a["bbox"] for a in voc_source(root, "train", zero_based=True).dataset.annotations[1]]
    assert boxes == [[0, 0, 50, 40], [10, 5, 1, 20]]


def test_average_precision_from_the_shards_equals_that_of_a_coco_file(tmp_path: Path) -> None:
    images, annotations = write_coco(tmp_path, 40)
    data = json.loads(annotations.read_text())
    data["images"].sort(key=lambda record: Path(record["file_name"]).stem)
    root = tmp_path / "voc"
    for part in ("Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    (root / "JPEGImages").symlink_to(images)
    names = {record["id"]: record["name"] for record in data["categories"]}
    expected: dict[str, Any] = {"images": [], "annotations": [], "categories": data["categories"]}
    for number, record in enumerate(data["images"], 1):
        objects = ""
        for annotation in data["annotations"]:
            if annotation["image_id"] == record["id"]:
                x, y, w, h = (round(value) for value in annotation["bbox"])
                box = (x + 1, y + 1, x + w, y + h)
                objects += an_object(names[annotation["category_id"]], box, annotation["iscrowd"])
                changes = {"image_id": number, "bbox": [x, y, w, h], "area": w * h}
                expected["annotations"].append(
                    {**annotation, **changes, "id": len(expected["annotations"]) + 1}
                )
        expected["images"].append({**record, "id": number})
        stem = Path(record["file_name"]).stem
        (root / f"Annotations/{stem}.xml").write_text(
            f"<annotation><size><width>{record['width']}</width><height>{record['height']}</height></size>"
            f"{objects}</annotation>"
        )
    stems = [Path(record["file_name"]).stem.replace(" ", "_") for record in data["images"]]
    for path in [*images.iterdir(), *(root / "Annotations").iterdir()]:
        path.rename(path.with_name(path.name.replace(" ", "_")))  # a line of a split has no spaces
    (root / "ImageSets/Main/val.txt").write_text("\n".join(stems))
    write_source(voc_source(root, "val"), tmp_path / "out")
    wanted = average_precision(expected)
    assert 0.2 < wanted[0] < 0.9
    found = open_shards(tmp_path / "out").coco()
    for annotation in found["annotations"]:
        annotation["category_id"] = {1: 3, 2: 7, 3: 90}[annotation["category_id"]]
    assert average_precision({**found, "categories": data["categories"]}) == wanted


INVALID_OBJECTS = [
    (an_object("dog", (5, 5, 3, 9)), "dog: the box ends before it begins: 5, 5, 3, 9"),
    (an_object("dog", ("", 5, 3, 9)), "dog: bndbox/xmin is '': it must be a number of pixels"),
    (an_object("dog", ("inf", 5, 3, 9)), "dog: bndbox/xmin is 'inf': it must be a number of pixels"),
    (an_object("dog", (1, 2, 3, 4), "maybe"), "dog: difficult is 'maybe': it must be 0 or 1"),
    (an_object(" ", (1, 2, 3, 4)), "an object has no name: add it"),
    ("<object>", "is not XML"),
]


@pytest.mark.parametrize(("text", "message"), INVALID_OBJECTS)
def test_problems_name_file_field_value_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    root = write_voc(tmp_path, {"a": text})
    with pytest.raises(ValueError, match=message) as caught:
        voc_source(root, "train")
    assert f"{tmp_path}/Annotations/a.xml: " in str(caught.value)


def test_a_name_of_several_images_is_noticed(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": an_object("dog", (1, 2, 3, 4)), "b": an_object("dog", (1, 2, 3, 4))})
    Image.new("RGB", (50, 40), "gray").save(root / "JPEGImages" / "a.png")
    (notice,) = [notice for notice in voc_source(root, "train").dataset.notices if "several images" in notice]
    assert "1 names belong to several images (a.jpg, a.png)" in notice


def test_other_problems(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no folder Annotations: name a folder in Pascal VOC's layout"):
        voc_source(tmp_path, "train")
    root = write_voc(tmp_path, {"a": "", "b": ""}, (50, 0))
    with pytest.raises(ValueError, match="size/height is '0': it must be a positive whole number"):
        voc_source(root, "train")
    root = write_voc(tmp_path, {"a": an_object("dog", (1, 2, 3, 4)), "b": ""})
    with pytest.raises(ValueError, match=r"val.txt: there is no such split; there are train"):
        voc_source(root, "val")
    (root / "ImageSets/Main/dog_train.txt").write_text("a  1\nb -1\n")
    with pytest.raises(ValueError, match=r"dog_train.txt, line 1: is 'a  1': a split has one name per line"):
        voc_source(root, "dog_train")
    (root / "ImageSets/Main/train.txt").write_text("a\na\n")
    with pytest.raises(ValueError, match=r"train.txt: names 1 images twice: remove them"):
        voc_source(root, "train")
    (root / "ImageSets/Main/train.txt").write_text("a\nb\nc\n")
    (root / "Annotations/b.xml").unlink()
    with pytest.raises(ValueError, match="2 problems") as caught:
        voc_source(root, "train")
    assert "Annotations/b.xml: there is no such file: add it, or remove the image from" in str(caught.value)
    assert "JPEGImages/c.jpg: there is no such image" in str(caught.value)
