"""Faulty data sets of every format: each is refused in one sentence, or everything can read what was written.

What is written passes `check`, `info` and `doctor`, decodes as training decodes it, and pycocotools evaluates it.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from matplotlib import cbook
from PIL import Image

from command_line import CommandLine
from corruptions import CORRUPTIONS, fresh_copy
from made_results import average_precision
from raydetr.shards.images import decode_pixels
from raydetr.shards.reader import open_shards

NUM_CORRUPT_SHARDS = 60
NAMES = ["cat", "dog"]
TOKENS = [
    "NaN", "-Infinity", "1e999", "-1", "0", "0.5", "true", "null", '"x"', '"\\ud800"', '"\\u0000"', "[]", "{}", "[[[[",
    "9" * 20, "9" * 310, "9" * 4000, "9" * 5000, "-0.0", "1e308", '"../../x"', '"' + "y" * 300 + '"',
]  # fmt: skip

Fault = Callable[[Path, np.random.Generator], object]


# --- healthy data sets of four formats


def photographs(coco_tiny: str | None) -> list[bytes]:
    """Return JPEGs and PNGs of photographs: one that comes with matplotlib, and some of COCO where they are."""
    image = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    contents = []
    for number, kind in enumerate(("JPEG", "PNG", "JPEG")):
        buffer = io.BytesIO()
        image.crop((100 * number, 80, 100 * number + 160, 200)).save(buffer, kind)
        contents.append(buffer.getvalue())
    if coco_tiny:
        contents += [path.read_bytes() for path in sorted(Path(coco_tiny).glob("val2017/*.jpg"))[:2]]
    return contents


def write_images(folder: Path, contents: list[bytes]) -> list[dict[str, Any]]:
    folder.mkdir(parents=True)
    records = []
    for number, content in enumerate(contents, 1):
        image = Image.open(io.BytesIO(content))
        name = f"photo{number}.{'png' if image.format == 'PNG' else 'jpg'}"
        (folder / name).write_bytes(content)
        records.append({"id": number, "file_name": name, "width": image.width, "height": image.height})
    return records


def objects_of(image: dict[str, Any]) -> list[dict[str, Any]]:
    """Return two objects of an image, as COCO's annotations without category ids."""
    boxes = [[10, 12, 40, 30], [20.5, 30.25, 60, 50.5]]
    return [
        {
            "id": 2 * image["id"] + i,
            "image_id": image["id"],
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for i, box in enumerate(boxes)
    ]


def make_coco(root: Path, contents: list[bytes]) -> list[object]:
    images = write_images(root / "images", contents)
    annotations = [
        {**item, "category_id": 1 + i} for image in images for i, item in enumerate(objects_of(image))
    ]
    categories = [{"id": 1 + i, "name": name} for i, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "ann.json").write_text(json.dumps(content))
    return ["--images", root / "images", "--annotations", root / "ann.json"]


def make_yolo(root: Path, contents: list[bytes]) -> list[object]:
    (root / "labels").mkdir(parents=True)
    for image in write_images(root / "images", contents):
        lines = []
        for i, item in enumerate(objects_of(image)):
            x, y, w, h = item["bbox"]
            width, height = image["width"], image["height"]
            lines.append(f"{i} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}")
        (root / "labels" / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text("train: images\nnc: 2\nnames:\n  0: cat\n  1: dog\n")
    return ["--yolo", root / "data.yaml", "--split", "train"]


def make_voc(root: Path, contents: list[bytes]) -> list[object]:
    images = write_images(root / "JPEGImages", contents)
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    stems = [Path(image["file_name"]).stem for image in images]
    (root / "ImageSets/Main/train.txt").write_text("\n".join(stems))
    for image, stem in zip(images, stems, strict=True):
        objects = "".join(
            f"<object><name>{NAMES[i]}</name><difficult>0</difficult><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
            f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for i, (x, y, w, h) in enumerate(item["bbox"] for item in objects_of(image))
        )
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        head = '<?xml version="1.0" encoding="utf-8"?>'
        (root / "Annotations" / f"{stem}.xml").write_text(f"{head}<annotation>{size}{objects}</annotation>")
    return ["--voc", root, "--split", "train"]


def make_tars(root: Path, contents: list[bytes]) -> list[object]:
    images = write_images(root / "images", contents)
    with webdataset.ShardWriter(str(root / "part-%03d.tar"), maxcount=2, verbose=0) as writer:
        for image, content in zip(images, contents, strict=True):
            items = [
                {"bbox": item["bbox"], "category": NAMES[i], "iscrowd": 0}
                for i, item in enumerate(objects_of(image))
            ]
            extension = Path(image["file_name"]).suffix[1:]
            record = json.dumps({"objects": items}).encode()
            writer.write({"__key__": f"key{image['id']}", extension: content, "json": record})
    shutil.rmtree(root / "images")
    return ["--webdataset", root]


FORMATS = {"coco": make_coco, "yolo": make_yolo, "voc": make_voc, "webdataset": make_tars}

# --- faults


def some_file(root: Path, rng: np.random.Generator, images: bool) -> Path:
    """Return an image, or a file of annotations; a tar is both."""
    kinds = (".jpg", ".png", ".tar") if images else (".json", ".txt", ".xml", ".yaml", ".tar")
    files = sorted(path for path in root.rglob("*") if path.suffix in kinds)
    return files[rng.integers(len(files))]


def flip_bits(root: Path, rng: np.random.Generator) -> None:
    path = some_file(root, rng, images=bool(rng.random() < 0.5))
    content = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 9)):
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def truncate(root: Path, rng: np.random.Generator) -> None:
    path = some_file(root, rng, images=bool(rng.random() < 0.5))
    content = path.read_bytes()
    path.write_bytes(content[: rng.integers(len(content))])


def lose_a_block(root: Path, rng: np.random.Generator) -> None:
    path = some_file(root, rng, images=True)
    content = path.read_bytes()
    start = int(rng.integers(len(content)))
    path.write_bytes(content[:start] + content[start + int(rng.integers(1, 4096)) :])


def zero_a_block(root: Path, rng: np.random.Generator) -> None:
    path = some_file(root, rng, images=True)
    content = path.read_bytes()
    start = int(rng.integers(len(content)))
    length = min(int(rng.integers(512, 4096)), len(content) - start)
    path.write_bytes(content[:start] + bytes(length) + content[start + length :])


def replace_a_token(root: Path, rng: np.random.Generator) -> None:
    """Replace a number or a word of the annotations; in a tar, one of the same length."""
    path = some_file(root, rng, images=False)
    content = path.read_bytes()
    places = list(re.finditer(rb'"[^"{}\n]*"|-?\d+\.?\d*|(?<=>)[^<>]+(?=<)|[a-z]+', content))
    place = places[rng.integers(len(places))]
    token = TOKENS[rng.integers(len(TOKENS))].encode()
    if path.suffix == ".tar":
        token = token[: len(place[0])].ljust(len(place[0]))
    path.write_bytes(content[: place.start()] + token + content[place.end() :])


def repeat_a_line(root: Path, rng: np.random.Generator) -> None:
    """Repeat a key of an object or mapping, a row or an element."""
    path = some_file(root, rng, images=False)
    content = path.read_bytes()
    places = list(re.finditer(rb'"\w+": [^,{}\[\]]+, |[^\n]+\n|<\w+>[^<>]*</\w+>', content))
    if places and path.suffix != ".tar":
        place = places[rng.integers(len(places))]
        path.write_bytes(content[: place.end()] + place[0] + content[place.end() :])


def insert_junk(root: Path, rng: np.random.Generator) -> None:
    path = some_file(root, rng, images=bool(rng.random() < 0.5))
    content = path.read_bytes()
    start = int(rng.integers(len(content)))
    junk = [b"\xff\xfe", b"\0" * 3, b"[" * 5000, "é".encode("latin-1"), rng.bytes(100), b"\n1 2 3 4 5 6 7\n"]
    path.write_bytes(content[:start] + junk[rng.integers(len(junk))] + content[start:])


def replace_a_file(root: Path, rng: np.random.Generator) -> None:
    path = some_file(root, rng, images=bool(rng.random() < 0.5))
    path.unlink()
    match rng.integers(5):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(path)
        case 3:
            path.write_bytes(b"")


def claim_another_encoding(root: Path, rng: np.random.Generator) -> None:
    path = some_file(root, rng, images=False)
    text = path.read_bytes().replace(b'encoding="utf-8"', b'encoding="no-such-one"')
    path.write_bytes(text if rng.random() < 0.5 else b"\xff\xfe" + text)


FAULTS: list[Fault] = [
    flip_bits, truncate, lose_a_block, zero_a_block, replace_a_token, replace_a_token, repeat_a_line, insert_junk,
    replace_a_file, claim_another_encoding,
]  # fmt: skip

# --- outcomes


def faults(numbers: range) -> Iterator[tuple[Fault, np.random.Generator]]:
    for number in numbers:
        yield FAULTS[number % len(FAULTS)], np.random.default_rng(number)


def outcome(raydetr: CommandLine, source: list[object], out: Path, options: list[str]) -> str:
    """Write the data set; return whether it is refused. What is written must be usable everywhere."""
    written = raydetr("shards", "write", *source, "--out", out, "--workers", 1, *options)
    if written.code:
        assert "error: " in written.err
        assert not re.search("0x[0-9a-f]{6}", written.err), written.err  # an address differs from run to run
        return "refused"
    check_everything(raydetr, out)
    return "written"


def check_everything(raydetr: CommandLine, folder: Path) -> None:
    checked = raydetr("shards", "check", folder, "--workers", 1)
    assert checked.code == 0, checked.err
    info = raydetr("shards", "info", folder, "--json")
    assert info.code == 0, info.err
    assert json.loads(info.out)["images"] > 0
    doctor = raydetr("doctor", folder, "--workers", 1)
    assert doctor.code in (0, 1), doctor.err
    assert "corrupt-samples" not in doctor.out, doctor.out
    shards = open_shards(folder)
    for index in range(shards.num_samples):
        decode_pixels(shards.read(index).image)
    truth = shards.coco()
    for annotation in truth["annotations"]:
        annotation.setdefault("iscrowd", 0)  # as the evaluation does; pycocotools needs it
    if truth["annotations"]:
        average_precision(truth)


@pytest.fixture
def raydetr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


# Of the quicker formats, the first cases run always, and the others with the slow tests
CASES = [
    ("coco", range(60)),
    ("webdataset", range(60)),
    pytest.param("coco", range(60, 130), marks=pytest.mark.slow),
    pytest.param("webdataset", range(60, 130), marks=pytest.mark.slow),
    pytest.param("yolo", range(130), marks=pytest.mark.slow),
    pytest.param("voc", range(130), marks=pytest.mark.slow),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "cases"), CASES)
def test_faulty_data_sets_are_refused_or_usable(
    raydetr: CommandLine, tmp_path: Path, kind: str, cases: range
) -> None:
    contents = photographs(os.environ.get("RAYDETR_COCO_TINY"))
    source = FORMATS[kind](tmp_path / "healthy", contents)
    assert outcome(raydetr, source, tmp_path / "out", []) == "written"
    seen: dict[str, Counter[str]] = {}
    for number, (fault, rng) in zip(cases, faults(cases), strict=True):
        for folder in ("data", "out"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
        shutil.copytree(tmp_path / "healthy", tmp_path / "data")
        fault(tmp_path / "data", rng)
        options = ["--on-corrupt", "skip"] if rng.random() < 0.3 else []
        moved = [
            Path(str(word).replace(str(tmp_path / "healthy"), str(tmp_path / "data")))
            if isinstance(word, Path)
            else word
            for word in source
        ]
        try:
            found = outcome(raydetr, moved, tmp_path / "out", options)
        except BaseException as error:
            error.add_note(f"case {number} of {kind}: {fault.__name__}")
            raise
        seen.setdefault(fault.__name__, Counter())[found] += 1
    total = sum(seen.values(), Counter[str]())
    assert total["refused"] > len(cases) / 3, seen
    assert total["written"] > len(cases) / 20, seen


@pytest.mark.filterwarnings("ignore:Reading .*Python 2:UserWarning")  # a bit in the version of an npz
def test_commands_describe_corrupt_shards(raydetr: CommandLine, tmp_path: Path) -> None:
    source = make_coco(tmp_path / "healthy", 3 * photographs(os.environ.get("RAYDETR_COCO_TINY")))
    assert outcome(raydetr, source, tmp_path / "shards", ["--samples-per-shard", "3"]) == "written"
    ends = Counter[int]()
    for number in range(NUM_CORRUPT_SHARDS):
        folder = fresh_copy(tmp_path / "shards", tmp_path / "copy")
        CORRUPTIONS[number % len(CORRUPTIONS)](folder, np.random.default_rng(number))
        for command in (["shards", "check"], ["shards", "info"], ["doctor"]):
            options = [] if command[-1] == "info" else ["--workers", 1]
            result = raydetr(*command, folder, *options)
            assert result.code in (0, 1), result.err
            assert not re.search("0x[0-9a-f]{9}", result.err + result.out)
            assert str(folder) in result.err or result.out, result.err
            ends[result.code] += 1
    assert min(ends[0], ends[1]) > NUM_CORRUPT_SHARDS / 4
