"""WebDataset shards of other programs, imported: the same samples and AP as from the COCO file."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from made_coco import write_json
from made_results import average_precision
from raydetr.shards.importers.webdataset import webdataset_source
from raydetr.shards.manifest import Manifest
from raydetr.shards.reader import Shards, open_shards
from raydetr.shards.verify import check_shards
from raydetr.shards.writer import write_source

Data = dict[str, Any]
Make = Callable[[Data, list[Data], dict[int, str]], Any]


def coco_record(image: Data, annotations: list[Data], names: dict[int, str]) -> Any:
    return {"image": image, "annotations": annotations}


def object_list(image: Data, annotations: list[Data], names: dict[int, str]) -> Any:
    """Return a common conversion of COCO: no size, category names, corners for boxes."""
    objects = [
        {
            "bbox": corners(annotation["bbox"]),
            "category": names[annotation["category_id"]],
            "iscrowd": annotation["iscrowd"],
            "area": annotation["area"],
        }
        for annotation in annotations
    ]
    return {"image_id": f"img-{image['id']}", "caption": "an image", "objects": objects}


def record_with_annotations(image: Data, annotations: list[Data], names: dict[int, str]) -> Any:
    kept = [{k: v for k, v in a.items() if k not in ("id", "image_id")} for a in annotations]
    return {"image_id": image["id"], "width": image["width"], "height": image["height"], "annotations": kept}


def arrays(image: Data, annotations: list[Data], names: dict[int, str]) -> Any:
    return {
        "boxes": [corners(annotation["bbox"]) for annotation in annotations],
        "labels": [annotation["category_id"] for annotation in annotations],
        "iscrowd": [annotation["iscrowd"] for annotation in annotations],
        "area": [annotation["area"] for annotation in annotations],
    }


def nested_arrays(image: Data, annotations: list[Data], names: dict[int, str]) -> Any:
    return {
        "image_id": image["id"],
        "objects": {
            "bbox": [annotation["bbox"] for annotation in annotations],
            "category": [names[annotation["category_id"]] for annotation in annotations],
            "iscrowd": [annotation["iscrowd"] for annotation in annotations],
            "area": [annotation["area"] for annotation in annotations],
        },
    }


def corners(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


CONVENTIONS: list[tuple[Make, Any]] = [
    (coco_record, None),
    (object_list, "xyxy"),
    (record_with_annotations, None),
    (arrays, "xyxy"),
    (nested_arrays, "xywh"),
]


def write_stock(coco: tuple[Path, Path], folder: Path, make: Make) -> Data:
    """Write shards with webdataset's ShardWriter, unusual keys and other members; return the COCO file."""
    data: Data = json.loads(coco[1].read_text())
    names = {record["id"]: record["name"] for record in data["categories"]}
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "part-%03d.tar"), maxcount=20, verbose=0) as writer:
        for number, image in enumerate(data["images"]):
            path = coco[0] / image["file_name"]
            own = [a for a in data["annotations"] if a["image_id"] == image["id"]]
            extension = "JPEG" if number % 3 == 0 and path.suffix == ".jpg" else path.suffix[1:]
            writer.write(
                {
                    "__key__": f"some.where/photo_{number:03d}x" if number % 2 else f"p{number}",
                    extension: path.read_bytes(),
                    "json": json.dumps(make(image, own, names)).encode(),
                    **({"cls": b"7"} if number % 5 == 0 else {}),
                    **({"txt": b"words"} if number % 4 == 0 else {}),
                }
            )
    return data


def import_tars(pattern: Path | str, out: Path, workers: int = 1, **options: Any) -> Manifest:
    return write_source(
        webdataset_source(str(pattern), **options), out, samples_per_shard=20, workers=workers
    )


@pytest.mark.parametrize(("make", "box_format"), CONVENTIONS)
def test_stock_shards_give_equal_samples_and_average_precision(
    coco: tuple[Path, Path], tmp_path: Path, make: Make, box_format: Any
) -> None:
    data = write_stock(coco, tmp_path / "tars", make)
    manifest = import_tars(
        tmp_path / "tars",
        tmp_path / "out",
        categories=coco[1],
        box_format=box_format,
        workers=2 if make is arrays else 1,
    )
    shards = open_shards(tmp_path / "out")
    assert [shard.num_samples for shard in manifest.shards] == [20, 20, 13]
    for index, image in enumerate(data["images"]):
        sample = shards.read(index)
        key = f"some.where/photo_{index:03d}x" if index % 2 else f"p{index}"
        assert sample.record["file_name"] == (image["file_name"] if make is coco_record else key)
        assert sample.image == (coco[0] / image["file_name"]).read_bytes()
        size = (sample.record["width"], sample.record["height"])
        assert size == (image["width"], image["height"])
        own = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        assert len(sample.annotations) == len(own)
        for found, annotation in zip(sample.annotations, own, strict=True):
            assert found["bbox"] == pytest.approx(annotation["bbox"])
            for name in ("category_id", "area", "iscrowd"):
                assert found[name] == annotation[name]
            assert found["image_id"] == sample.record["id"]
    ids = [sample["id"] for sample in shards.coco()["images"]]
    has_ids = make in (coco_record, record_with_annotations, nested_arrays)
    assert ids == ([image["id"] for image in data["images"]] if has_ids else list(range(1, 54)))
    expected = average_precision(
        renumbered(data, dict(zip([i["id"] for i in data["images"]], ids, strict=True)))
    )
    assert 0.2 < expected[0] < 0.9
    assert average_precision(shards.coco()) == pytest.approx(expected, abs=1e-9)
    assert "11 members .cls are ignored" in manifest.notices
    check_shards(tmp_path / "out")


def renumbered(data: Data, image_ids: dict[int, int]) -> Data:
    """Return the COCO file with other image ids, and annotations numbered in the order of the images."""
    order = {image_id: number for number, image_id in enumerate(image_ids)}
    annotations = sorted(data["annotations"], key=lambda annotation: order[annotation["image_id"]])
    return {
        **data,
        "images": [{**image, "id": image_ids[image["id"]]} for image in data["images"]],
        "annotations": [
            {**annotation, "id": number, "image_id": image_ids[annotation["image_id"]]}
            for number, annotation in enumerate(annotations, 1)
        ],
    }


def test_our_own_records_are_imported_unchanged(
    coco: tuple[Path, Path], shards: Shards, tmp_path: Path
) -> None:
    write_stock(coco, tmp_path / "tars", coco_record)
    imported = import_tars(tmp_path / "tars", tmp_path / "out", categories=coco[1])
    assert open_shards(tmp_path / "out").coco()["annotations"] == shards.coco()["annotations"]
    again = import_tars(shards.path, tmp_path / "again", categories=coco[1])
    assert [shard.sha256 for shard in again.shards] == [shard.sha256 for shard in imported.shards]


def test_another_reading_of_the_boxes_is_another_fingerprint(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars", [("x.jpg", jpeg()), ("x.json", {"boxes": [[1, 2, 3, 4]], "labels": [1]})])
    fingerprints = {
        import_tars(tmp_path / "tars", tmp_path / form, box_format=form).fingerprint
        for form in ("xywh", "xyxy")
    }
    assert len(fingerprints) == 2


def test_patterns(tmp_path: Path) -> None:
    for number in range(3):
        record = {**GOOD, "number": number}
        write_tar(tmp_path / "tars", [("x.jpg", jpeg()), ("x.json", record)], name=f"a-{number:03d}.tar")
    for pattern, numbers in (
        ("a-{000..002}.tar", [0, 1, 2]),
        ("a-{002,001}.tar", [2, 1]),
        ("a-*.tar", [0, 1, 2]),
        ("a-001.tar", [1]),
    ):
        dataset = webdataset_source(str(tmp_path / "tars" / pattern)).dataset
        assert [image["number"] for image in dataset.images] == numbers
    with pytest.raises(ValueError, match=r"a-003.tar: there is no such file"):
        webdataset_source(str(tmp_path / "tars/a-{000..003}.tar"))


def test_categories_without_a_file(coco: tuple[Path, Path], tmp_path: Path) -> None:
    write_stock(coco, tmp_path / "names", nested_arrays)
    manifest = import_tars(tmp_path / "names", tmp_path / "out1", box_format="xywh")
    assert manifest.categories == [
        {"id": 1, "name": "cat"},
        {"id": 2, "name": "dog"},
        {"id": 3, "name": "toothbrush"},
    ]
    write_stock(coco, tmp_path / "numbers", arrays)
    manifest = import_tars(tmp_path / "numbers", tmp_path / "out2", box_format="xyxy")
    assert manifest.categories == [{"id": number, "name": str(number)} for number in (3, 7, 90)]
    assert any("the categories have no names but their numbers" in notice for notice in manifest.notices)


# --- invalid shards


def jpeg(width: int = 30, height: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


GOOD = {"objects": [{"bbox": [1, 2, 3, 4], "category": "cat"}]}


def write_tar(
    folder: Path, members: list[tuple[str, bytes | Any]], name: str = "a.tar", **options: Any
) -> None:
    """Write a tar with Python's tarfile; contents that are not bytes become JSON."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w", **options) as tar:
        for member_name, content in members:
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(member_name)
            member.size, member.mtime = len(content), 1.5  # which needs an extended header in pax
            tar.addfile(member, io.BytesIO(content))


PAIR = [("x.jpg", jpeg()), ("x.json", GOOD)]
INVALID_TARS: list[tuple[str, list[tuple[str, Any]], str]] = [
    (
        "no json",
        [*PAIR, ("y.jpg", jpeg()), ("y.txt", b"")],
        r"sample y: its members are .jpg, .txt: one image",
    ),
    (
        "two images",
        [*PAIR, ("y.jpg", jpeg()), ("y.png", b""), ("y.json", GOOD)],
        "members are .jpg, .png, .json",
    ),
    (
        "apart",
        [*PAIR, ("y.jpg", jpeg()), ("y.json", GOOD), ("x.txt", b"")],
        "sample x: its members are not consecutive",
    ),
    ("twice", [*PAIR, ("x.jpg", jpeg())], "sample x has two members .jpg"),
    ("no image", [*PAIR, ("y.jpg", b"no"), ("y.json", GOOD)], "sample y: is not a JPEG or PNG"),
    ("cut image", [*PAIR, ("y.jpg", jpeg()[:300]), ("y.json", GOOD)], "sample y: cannot be decoded"),
    ("no JSON", [*PAIR, ("y.jpg", jpeg()), ("y.json", b"{")], "sample y: its record is not JSON"),
    (
        "size",
        [*PAIR, ("y.jpg", jpeg()), ("y.json", {**GOOD, "width": 31, "height": 20})],
        r"sample y \(image id 2\): the file holds 30x20 pixels, the annotations specify 31x20",
    ),
    (
        "other",
        [*PAIR, ("y.jpg", jpeg()), ("y.json", {"boxes": []})],
        r"has no 'objects'; its fields are 'boxes'",
    ),
    (
        "box",
        [*PAIR, ("y.jpg", jpeg()), ("y.json", {"objects": [{"bbox": [1, 2], "category": "a"}]})],
        r"sample y: object 0: bbox is \[1, 2\], not four numbers of pixels",
    ),
    (
        "negative",
        [*PAIR, ("y.jpg", jpeg()), ("y.json", {"objects": [{"bbox": [9, 9, -1, 4], "category": "a"}]})],
        "object 0: bbox, read as xywh, has a negative size",
    ),
    (
        "label",
        [*PAIR, ("y.jpg", jpeg()), ("y.json", {"objects": [{"bbox": [1, 2, 3, 4], "category": None}]})],
        "object 0: category is None, neither a whole number nor a name",
    ),
    (
        "mixed labels",
        [*PAIR, ("y.jpg", jpeg()), ("y.json", {"objects": [{"bbox": [1, 2, 3, 4], "category": 4}]})],
        r"labels are numbers \(4, ...\) and names \('cat', ...\): list all categories with --categories",
    ),
    (
        "parts",
        [("x.jpg", jpeg()), ("x.json", {"objects": [{"bbox": [0.1, 0.2, 0.3, 0.4], "category": "a"}]})],
        "no box reaches beyond the first pixel: boxes must be in pixels",
    ),
    (
        "unknown",
        [("x.jpg", jpeg()), ("x.json", {"faces": 1})],
        "the record has no boxes; its fields are 'faces'",
    ),
    (
        "no labels",
        [("x.jpg", jpeg()), ("x.json", {"boxes": [[1, 2, 3, 4]]})],
        "the record has no labels; its fields are 'boxes', and known are category_id",
    ),
    (
        "which boxes",
        [("x.jpg", jpeg()), ("x.json", {"boxes": [[1, 2, 3, 4]], "labels": [1]})],
        r"the boxes are in 'boxes', and may be .*: specify --boxes xywh or --boxes xyxy",
    ),
    ("nothing", [("x.jpg", jpeg()), ("x.json", {"objects": []})], "no record has any object"),
]


@pytest.mark.parametrize(
    ("members", "message"), [case[1:] for case in INVALID_TARS], ids=[case[0] for case in INVALID_TARS]
)
def test_problems_name_shard_sample_and_remedy(
    tmp_path: Path, members: list[tuple[str, Any]], message: str
) -> None:
    write_tar(tmp_path / "tars", members)
    with pytest.raises(ValueError, match=message) as caught:
        import_tars(tmp_path / "tars", tmp_path / "out")
    assert str(tmp_path / "tars") in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_programs(tmp_path: Path, form: int) -> None:
    """JSON first, folders, names with a dot before the folder, extended headers, a long folder."""
    folder = tmp_path / "tars"
    long = "d" * 90 if form == tarfile.USTAR_FORMAT else "d" * 200
    members = [
        ("./a/x.json", GOOD),
        ("./a/x.jpg", jpeg()),
        ("README", b"text"),
        (f"{long}/{'k' * 20}.png", jpeg()),
    ]
    write_tar(folder, [*members, (f"{long}/{'k' * 20}.json", {"objects": []})], format=form)
    import_tars(folder, tmp_path / "out")
    shards = open_shards(tmp_path / "out")
    assert shards.read(0).annotations == [
        {"area": 12, "iscrowd": 0, "bbox": [1, 2, 3, 4], "image_id": 1, "category_id": 1, "id": 1}
    ]
    assert [shards.read(index).record for index in range(2)] == [
        {"file_name": name, "id": number, "width": 30, "height": 20}
        for number, name in ((1, "./a/x"), (2, f"{long}/{'k' * 20}"))
    ]
    check_shards(tmp_path / "out")


def test_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none: there is no such file"):
        webdataset_source(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"holds no \*.tar$"):
        webdataset_source(str(tmp_path))
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no \*.tar \(a.tar.gz: unpack it to a plain tar"):
        webdataset_source(str(tmp_path))
    write_tar(tmp_path, PAIR, format=tarfile.USTAR_FORMAT)
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(content[:1000])
    with pytest.raises(ValueError, match=r"b.tar: is not a plain tar, or corrupt"):
        webdataset_source(str(tmp_path))
    (tmp_path / "b.tar").write_bytes(content.rstrip(b"\0") + b"\0" * 100)
    with pytest.raises(ValueError, match=r"b.tar: (it is truncated|is not a plain tar)"):
        webdataset_source(str(tmp_path))
    corrupt = bytearray(content)
    corrupt[content.index(b"x.json")] ^= 1  # a header in the middle, where tarfile stops silently
    (tmp_path / "b.tar").write_bytes(corrupt)
    with pytest.raises(ValueError, match=r"b.tar: the tar header at byte \d+ is corrupt"):
        webdataset_source(str(tmp_path))


CATEGORY_FILES: list[tuple[Any, str]] = [
    ({"images": []}, "holds no categories"),
    ([], "holds no categories"),
    (["cat", "cat"], "holds no categories"),
    ([{"id": "1", "name": "cat"}], "holds no categories"),
    (["dog"], r"the label 'cat' \(1 objects\) is not in the file of categories: add it"),
]


@pytest.mark.parametrize(("content", "message"), CATEGORY_FILES)
def test_unusable_categories(tmp_path: Path, content: Any, message: str) -> None:
    write_tar(tmp_path / "tars", PAIR)
    with pytest.raises(ValueError, match=message):
        webdataset_source(str(tmp_path / "tars"), categories=write_json(tmp_path / "c.json", content))
