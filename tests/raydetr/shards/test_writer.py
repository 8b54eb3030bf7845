from __future__ import annotations

import gc
import hashlib
import io
import json
import struct
import tarfile
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image, ImageOps

from made_coco import folder_bytes, write_coco, write_json
from raydetr.shards.images import decode_image
from raydetr.shards.reader import Shards, open_shards
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source


def records_of(annotations: Path) -> list[dict[str, Any]]:
    """Return the expected records of the samples, taken directly from the JSON."""
    data = json.loads(annotations.read_text())
    return [
        {"image": image, "annotations": [a for a in data["annotations"] if a["image_id"] == image["id"]]}
        for image in data["images"]
    ]


def test_stock_webdataset_reads_the_shards(coco: tuple[Path, Path], shards: Shards) -> None:
    urls = [str(path) for path in sorted(shards.path.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves files to the garbage collector
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    assert len(urls) == 4
    assert [json.loads(sample["json"]) for sample in samples] == records_of(coco[1])
    for sample, expected in zip(samples, records_of(coco[1]), strict=True):
        file = coco[0] / expected["image"]["file_name"]
        assert sample["__key__"] == f"{expected['image']['id']:012d}"
        assert sample[file.suffix[1:]] == file.read_bytes()


def test_our_reader_gives_the_same_samples(coco: tuple[Path, Path], shards: Shards) -> None:
    expected = records_of(coco[1])
    assert shards.num_samples == len(expected) == 53
    for index, pair in enumerate(expected):
        sample = shards.read(index)
        assert {"image": sample.record, "annotations": sample.annotations} == pair
        assert sample.image == (coco[0] / pair["image"]["file_name"]).read_bytes()


def test_same_input_same_bytes(coco: tuple[Path, Path], shards: Shards, tmp_path: Path) -> None:
    time.sleep(0.01)  # another modification time
    manifest = write_source(coco_source(*coco), tmp_path / "again", samples_per_shard=15)
    assert folder_bytes(tmp_path / "again") == folder_bytes(shards.path)
    assert manifest == shards.manifest


def test_manifest_describes_the_shards(coco: tuple[Path, Path], shards: Shards) -> None:
    manifest = shards.manifest
    assert [shard.num_samples for shard in manifest.shards] == [15, 15, 15, 8]
    for shard in manifest.shards:
        content = (shards.path / shard.name).read_bytes()
        assert (shard.size, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest.num_annotations == sum(len(pair["annotations"]) for pair in records_of(coco[1]))
    assert manifest.label_maps["contiguous"] == {"3": 0, "7": 1, "90": 2}
    assert manifest.label_maps["category_id"] == {"3": 3, "7": 7, "90": 90}
    assert manifest.source["name"] == "annotations.json"
    assert (shards.path / "index.npz").stat().st_size < 53 * 60 + 500


def test_progress_and_one_shard_for_all(coco: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_source(coco_source(*coco), tmp_path / "out", progress=lambda *counts: seen.append(counts))
    assert seen == [(count, 53) for count in range(1, 54)]
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["shard-00000.tar"]


def test_progress_of_several_processes_rises_to_the_total(coco: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = write_source(
        coco_source(*coco),
        tmp_path / "out",
        samples_per_shard=10,
        workers=2,
        progress=lambda *counts: seen.append(counts),
    )
    assert [shard.num_samples for shard in manifest.shards] == [10, 10, 10, 10, 10, 3]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (53, 53)


@pytest.mark.parametrize("workers", [2, 3])
def test_same_bytes_with_any_number_of_processes(
    coco: tuple[Path, Path], shards: Shards, tmp_path: Path, workers: int
) -> None:
    write_source(coco_source(*coco), tmp_path / "out", samples_per_shard=15, workers=workers)
    assert folder_bytes(tmp_path / "out") == folder_bytes(shards.path)


def test_fingerprint_changes_with_data_and_categories_only(coco: tuple[Path, Path], tmp_path: Path) -> None:
    data = json.loads(coco[1].read_text())
    base = write_source(coco_source(*coco), tmp_path / "base").fingerprint
    renamed = write_json(tmp_path / "renamed.json", data)
    assert write_source(coco_source(coco[0], renamed), tmp_path / "b").fingerprint == base
    data["annotations"][0]["area"] += 1
    changed = write_json(tmp_path / "changed.json", data)
    assert write_source(coco_source(coco[0], changed), tmp_path / "c").fingerprint != base


# --- invalid images


def one_image(folder: Path, content: bytes | None, width: int = 30, height: int = 20) -> tuple[Path, Path]:
    (folder / "images").mkdir()
    if content is not None:
        (folder / "images" / "a.jpg").write_bytes(content)
    data = {
        "images": [{"id": 41, "file_name": "a.jpg", "width": width, "height": height}],
        "annotations": [],
        "categories": [{"id": 1, "name": "thing"}],
    }
    return folder / "images", write_json(folder / "a.json", data)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 30, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise(), exif=exif)


BAD_IMAGES: list[tuple[str, bytes | None, tuple[int, int], str]] = [
    ("missing", None, (30, 20), r"cannot be read \(No such file or directory\): add the file or remove"),
    ("empty", b"", (30, 20), r"the file is empty: replace it or remove the record"),
    ("no image", b"<html>404</html>" * 50, (30, 20), r"is not a JPEG or PNG image: convert or replace it"),
    ("gif", encoded(noise(), "GIF"), (30, 20), r"is not a JPEG or PNG image: convert or replace it"),
    ("truncated", encoded(noise())[:600], (30, 20), r"cannot be decoded \(.*\): replace the file"),
    ("truncated png", encoded(noise(), "PNG")[:600], (30, 20), r"cannot be decoded \(.*\): replace the file"),
    ("header only", encoded(noise())[:30], (30, 20), r"is not a JPEG|cannot be decoded"),
    (
        "size",
        encoded(noise()),
        (31, 20),
        r"the file holds 30x20 pixels, the annotations specify 31x20: correct",
    ),
    (
        "rotated",
        with_orientation(6),
        (20, 30),
        r"30x20.*20x30, the size after applying its EXIF orientation 6.*store",
    ),
    ("swapped size", encoded(noise()), (20, 30), r"the annotations specify 20x30: correct width and height"),
]


@pytest.mark.parametrize(
    ("content", "size", "message"), [bad[1:] for bad in BAD_IMAGES], ids=[bad[0] for bad in BAD_IMAGES]
)
def test_bad_images_are_named(
    tmp_path: Path, content: bytes | None, size: tuple[int, int], message: str
) -> None:
    source = one_image(tmp_path, content, *size)
    with pytest.raises(ValueError, match=message) as caught:
        write_source(coco_source(*source), tmp_path / "out")
    assert f"{source[0]}/a.jpg (image id 41): " in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_many_bad_images_are_listed_together_in_order(tmp_path: Path, workers: int) -> None:
    images, annotations = write_coco(tmp_path, 30)
    names = [record["file_name"] for record in json.loads(annotations.read_text())["images"]]
    bad = [name for number, name in enumerate(names) if number not in (1, 8, 20)]
    for name in bad:
        (images / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"annotations.json: 27 invalid images\n") as caught:
        write_source(coco_source(images, annotations), tmp_path / "out", samples_per_shard=8, workers=workers)
    listed = str(caught.value).splitlines()[1:]
    assert [line.partition(" (image id")[0] for line in listed] == [f"  {images}/{name}" for name in bad]
    assert not (tmp_path / "out").exists()


def test_exif_orientation_is_ignored_where_the_stored_size_fits(tmp_path: Path) -> None:
    manifest = write_source(coco_source(*one_image(tmp_path, with_orientation(6))), tmp_path / "out")
    image = Image.open(io.BytesIO(open_shards(tmp_path / "out").read(0).image))
    assert image.size == (30, 20)
    assert ImageOps.exif_transpose(image).size == (20, 30)
    assert "1 images have an EXIF orientation, which is not applied" in " ".join(manifest.notices)


def png16(pixels: np.ndarray) -> bytes:
    """Encode a PNG with 16 bits per channel [h, w, 3], which Pillow reads but does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


RGB16 = np.random.default_rng(0).integers(0, 2**16, (20, 30, 3), np.uint16)
GRAY16 = (np.arange(600).reshape(20, 30) * 109).astype(np.uint16)
UNUSUAL_IMAGES: dict[str, bytes] = {
    "gray": encoded(noise().convert("L")),
    "cmyk": encoded(noise().convert("CMYK")),
    "rgba": encoded(noise().convert("RGBA"), "PNG"),
    "gray with alpha": encoded(noise().convert("LA"), "PNG"),
    "palette": encoded(noise().quantize(16), "PNG"),
    "palette with transparency": encoded(noise().quantize(16), "PNG", transparency=bytes(range(16))),
    "1 bit": encoded(noise().convert("1"), "PNG"),
    "16 bit": encoded(Image.fromarray(GRAY16), "PNG"),
    "16 bit color": png16(RGB16),
    "png named jpg": encoded(noise(), "PNG"),
}


@pytest.mark.parametrize("name", UNUSUAL_IMAGES)
def test_other_color_modes_become_rgb(tmp_path: Path, name: str) -> None:
    write_source(coco_source(*one_image(tmp_path, UNUSUAL_IMAGES[name])), tmp_path / "out")
    shards = open_shards(tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-00000.tar") as tar:
        extension = "jpg" if name in ("gray", "cmyk") else "png"
        assert set(tar.getnames()) == {f"000000000041.{extension}", "000000000041.json"}
    assert shards.read(0).image == UNUSUAL_IMAGES[name]
    image = decode_image(shards.read(0).image)
    assert (image.mode, image.size) == ("RGB", (30, 20))
    if name == "16 bit":
        np.testing.assert_array_equal(np.asarray(image)[..., 0], np.round(GRAY16 / 257))
    elif name == "16 bit color":
        np.testing.assert_allclose(np.asarray(image), RGB16 / 257, atol=1)
    elif name in ("rgba", "png named jpg"):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(noise()))


# --- output that cannot be written


def test_folder_that_is_not_empty_is_rejected_and_kept(coco: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"is not empty \(it holds note.txt\): name another output folder, or remove it"
    ):
        write_source(coco_source(*coco), tmp_path)
    assert folder_bytes(tmp_path) == {"note.txt": b"mine"}


def test_other_unusable_arguments(coco: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"annotations\.json is a file, not a folder"):
        write_source(coco_source(*coco), coco[1])
    with pytest.raises(ValueError, match="there is no such folder of images"):
        write_source(coco_source(tmp_path / "none", coco[1]), tmp_path / "out")
    with pytest.raises(ValueError, match="samples_per_shard is 0: it must be at least 1"):
        write_source(coco_source(*coco), tmp_path / "out", samples_per_shard=0)
    assert not (tmp_path / "out").exists()


def test_writing_into_an_existing_empty_folder(coco: tuple[Path, Path], tmp_path: Path) -> None:
    out: Callable[[], list[str]] = lambda: sorted(path.name for path in tmp_path.iterdir())  # noqa: E731
    write_source(coco_source(*coco), tmp_path)
    assert out() == ["index.npz", "manifest.json", "shard-00000.tar"]


@pytest.mark.parametrize(
    ("content", "is_noticed"),
    [
        (encoded(Image.fromarray(GRAY16 // 16), "PNG"), True),
        (png16(RGB16 // 16), True),
        (encoded(Image.fromarray(GRAY16), "PNG"), False),
        (encoded(Image.new("L", (30, 20)), "PNG"), False),
    ],
)
def test_twelve_bits_in_sixteen_are_noticed(tmp_path: Path, content: bytes, is_noticed: bool) -> None:
    manifest = write_source(coco_source(*one_image(tmp_path, content)), tmp_path / "out")
    assert any("nearly black, at most 16 of 255" in notice for notice in manifest.notices) == is_noticed
