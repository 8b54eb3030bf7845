"""Third-party shards, indexed and read as they are."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from made_coco import folder_bytes, write_json
from made_results import average_precision
from raydetr.config import TransformConfig
from raydetr.data.stream import train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.shards.reader import ShardError, Shards, open_shards
from raydetr.shards.third_party.index import index_folder
from raydetr.shards.verify import check_shards

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


@pytest.mark.parametrize(("make", "box_format"), CONVENTIONS)
def test_stock_shards_give_equal_samples_and_average_precision(
    coco: tuple[Path, Path], tmp_path: Path, make: Make, box_format: Any
) -> None:
    folder = tmp_path / "third_party"
    data = write_stock(coco, folder, make)
    before = folder_bytes(folder)
    manifest = index_folder(
        folder, categories=coco[1], box_format=box_format, workers=2 if make is arrays else 1
    )
    assert {name: content for name, content in folder_bytes(folder).items() if name in before} == before
    shards = open_shards(folder)
    assert [shard.num_samples for shard in manifest.shards] == [20, 20, 13]
    for index, image in enumerate(data["images"]):
        sample = shards.read(index)
        assert sample.key == (f"some.where/photo_{index:03d}x" if index % 2 else f"p{index}")
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
    check_shards(folder)


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


def test_stock_shards_are_streamed_like_our_own(
    coco: tuple[Path, Path], shards: Shards, tmp_path: Path
) -> None:
    write_stock(coco, tmp_path / "third_party", coco_record)
    index_folder(tmp_path / "third_party", categories=coco[1])
    third_party = open_shards(tmp_path / "third_party")
    assert third_party.coco() == shards.coco()
    stream = train_batches(
        third_party,
        seed=0,
        position=0,
        rank=0,
        world_size=1,
        batch_size=1,
        transform=Transform(TransformConfig()),
    )
    ours = {int(image["id"]): image for image in shards.coco()["images"]}
    seen = []
    for _ in range(53):
        batch = next(stream)
        (image_id,) = batch.image_ids.tolist()
        seen.append(image_id)
        with Image.open(coco[0] / ours[image_id]["file_name"]) as image:
            np.testing.assert_array_equal(batch.pixels[0].permute(1, 2, 0), np.asarray(image.convert("RGB")))
    assert sorted(seen) == sorted(ours)


def test_head_and_errors_use_the_third_party_key(coco: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "third_party"
    write_stock(coco, folder, arrays)
    index_folder(folder, categories=coco[1], box_format="xyxy")
    original = open_shards(folder)
    assert original.head(9).read(8) == original.read(8)
    path = folder / "part-001.tar"
    content = bytearray(path.read_bytes())
    content[int(original.samples["offset"][25]) + 700] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"part-001.tar: sample some.where/photo_025x at byte .* crc32"):
        open_shards(folder).read(25)
    with pytest.raises(ValueError, match=r"part-001.tar: sample some.where/photo_025x at byte .* crc32"):
        check_shards(folder)


def test_categories_without_a_file(coco: tuple[Path, Path], tmp_path: Path) -> None:
    write_stock(coco, tmp_path / "names", nested_arrays)
    manifest = index_folder(tmp_path / "names", box_format="xywh")
    assert manifest.categories == [
        {"id": 1, "name": "cat"},
        {"id": 2, "name": "dog"},
        {"id": 3, "name": "toothbrush"},
    ]
    write_stock(coco, tmp_path / "numbers", arrays)
    manifest = index_folder(tmp_path / "numbers", box_format="xyxy")
    assert manifest.categories == [{"id": number, "name": str(number)} for number in (3, 7, 90)]
    assert manifest.notices[-1].startswith("the categories have no names but their numbers")


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
    ("no image", [*PAIR, ("y.jpg", b"no"), ("y.json", GOOD)], "sample y: its image: is not a JPEG or PNG"),
    ("cut image", [*PAIR, ("y.jpg", jpeg()[:300]), ("y.json", GOOD)], "sample y: its image: "),
    ("no JSON", [*PAIR, ("y.jpg", jpeg()), ("y.json", b"{")], "sample y: its record is not JSON"),
    (
        "size",
        [*PAIR, ("y.jpg", jpeg()), ("y.json", {**GOOD, "width": 31, "height": 20})],
        "sample y: its image: the file holds 30x20 pixels, the annotations specify 31x20",
    ),
    (
        "other",
        [*PAIR, ("y.jpg", jpeg()), ("y.json", {"boxes": []})],
        r"has no 'objects'; its fields are 'boxes'",
    ),
    (
        "box",
        [*PAIR, ("y.jpg", jpeg()), ("y.json", {"objects": [{"bbox": [1, 2], "category": "a"}]})],
        r"sample y: object 0: bbox is \[1, 2\], not four finite numbers",
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
        "long name",
        [*PAIR, ("y" * 120 + ".jpg", jpeg()), ("y" * 120 + ".json", GOOD)],
        "its name needs an extended tar header: give it at most 100 characters",
    ),
    (
        "parts",
        [("x.jpg", jpeg()), ("x.json", {"objects": [{"bbox": [0.1, 0.2, 0.3, 0.4], "category": "a"}]})],
        "no coordinate in 'bbox' exceeds 1: boxes must be in pixels",
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
        index_folder(tmp_path / "tars")
    assert str(tmp_path / "tars") in str(caught.value)
    assert [path.name for path in (tmp_path / "tars").iterdir()] == ["a.tar"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_programs(tmp_path: Path, form: int) -> None:
    """JSON first, folders, names with a dot before the folder, extended headers, a long folder."""
    folder = tmp_path / "tars"
    long = "d" * 90 if form == tarfile.USTAR_FORMAT else "d"
    members = [
        ("./a/x.json", GOOD),
        ("./a/x.jpg", jpeg()),
        ("README", b"text"),
        (f"{long}/{'k' * 20}.png", jpeg()),
    ]
    write_tar(folder, [*members, (f"{long}/{'k' * 20}.json", {"objects": []})], format=form)
    manifest = index_folder(folder)
    shards = open_shards(folder)
    assert manifest.third_party is not None
    assert manifest.third_party.keys == ["./a/x", f"{long}/{'k' * 20}"]
    assert shards.read(0).annotations == [
        {"area": 12, "iscrowd": 0, "bbox": [1, 2, 3, 4], "image_id": 1, "category_id": 1, "id": 1}
    ]
    assert shards.read(1).record == {"file_name": f"{long}/{'k' * 20}", "id": 2, "width": 30, "height": 20}
    check_shards(folder)


def test_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        index_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no \*.tar$"):
        index_folder(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no \*.tar \(a.tar.gz: unpack it to a plain tar"):
        index_folder(tmp_path)
    write_tar(tmp_path, PAIR, format=tarfile.USTAR_FORMAT)
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(content[:1000])
    with pytest.raises(ValueError, match=r"b.tar: is not a plain tar, or corrupt"):
        index_folder(tmp_path)
    (tmp_path / "b.tar").write_bytes(content.rstrip(b"\0") + b"\0" * 100)
    with pytest.raises(ValueError, match=r"b.tar: (it is truncated|is not a plain tar)"):
        index_folder(tmp_path)
    corrupt = bytearray(content)
    corrupt[content.index(b"x.json")] ^= 1  # a header in the middle, where tarfile stops silently
    (tmp_path / "b.tar").write_bytes(corrupt)
    with pytest.raises(ValueError, match=r"b.tar: the tar header at byte \d+ is corrupt"):
        index_folder(tmp_path)
    (tmp_path / "b.tar").unlink()
    index_folder(tmp_path)
    with pytest.raises(ValueError, match=r"has a manifest.json, so it is indexed: to index it again, remove"):
        index_folder(tmp_path)


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
        index_folder(tmp_path / "tars", categories=write_json(tmp_path / "c.json", content))


def test_third_party_shards_have_their_own_format_version(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars", PAIR)
    index_folder(tmp_path / "tars", categories=write_json(tmp_path / "c.json", ["cat"]))
    path = tmp_path / "tars" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["format_version"] == 2
    for change in (
        {"keys": ["x", "y"]},
        {"keys": "x"},
        {"records": {**manifest["foreign"]["records"], "kind": "z"}},
    ):
        path.write_text(json.dumps({**manifest, "foreign": {**manifest["foreign"], **change}}))
        with pytest.raises(ValueError, match=r"manifest.json: .*(keys|kind)"):
            open_shards(tmp_path / "tars")
