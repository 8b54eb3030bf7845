"""The decoder against Pillow: the same pixels for healthy images; damaged ones, which Pillow takes, are refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import cbook
from PIL import Image

from made_coco import write_coco
from raydetr.config import TransformConfig
from raydetr.data.samples import load_sample
from raydetr.data.transforms.transform import Transform
from raydetr.shards.images import ImageError, decode_pixels, read_header
from raydetr.shards.reader import ShardError, open_shards
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source


def smooth(width: int = 61, height: int = 43) -> Image.Image:
    """Return an image with structure at several scales, so that chroma subsampling is visible."""
    rng = np.random.default_rng(3)
    layers = [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).resize((width, height)), int
        )
        for size in (3, 9, 31)
    ]
    return Image.fromarray((sum(layers) // 3).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(smooth(), "JPEG", exif=exif)


def wide_gray() -> Image.Image:
    return Image.fromarray(np.arange(61 * 43, dtype=np.uint16).reshape(43, 61) * 24)


KINDS = {
    "jpeg": lambda: encoded(smooth(), "JPEG"),
    "jpeg without subsampling": lambda: encoded(smooth(), "JPEG", subsampling=0, quality=97),
    "jpeg 4:2:2": lambda: encoded(smooth(), "JPEG", subsampling=1),
    "progressive jpeg": lambda: encoded(smooth(), "JPEG", progressive=True),
    "jpeg in RGB": lambda: encoded(smooth(), "JPEG", keep_rgb=True),
    "gray jpeg": lambda: encoded(smooth().convert("L"), "JPEG"),
    "cmyk jpeg": lambda: encoded(smooth().convert("CMYK"), "JPEG"),
    "jpeg with an orientation": rotated,
    "jpeg with bytes after its end": lambda: encoded(smooth(), "JPEG") + b"more",
    "jpeg of one pixel": lambda: encoded(smooth(1, 1), "JPEG"),
    "png": lambda: encoded(smooth(), "PNG"),
    "png with alpha": lambda: encoded(smooth().convert("RGBA"), "PNG"),
    "png with a palette": lambda: encoded(smooth().convert("P"), "PNG"),
    "gray png": lambda: encoded(smooth().convert("L"), "PNG"),
    "16-bit png": lambda: encoded(wide_gray(), "PNG"),
}


def by_pillow(content: bytes) -> np.ndarray:
    """Decode by the lenient decoder, with the conversions that `decode_pixels` documents."""
    image = Image.open(io.BytesIO(content))
    if image.mode.startswith("I"):
        return np.asarray(Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB"))
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_pillow_and_can_be_written_to(kind: str) -> None:
    content = KINDS[kind]()
    pixels = decode_pixels(content)
    np.testing.assert_array_equal(pixels, by_pillow(content))
    assert (pixels.dtype, pixels.flags.writeable, pixels.flags.c_contiguous) == (np.uint8, True, True)


JPEGS = [kind for kind in KINDS if "jpeg" in kind and "after its end" not in kind]


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_that_lacks_only_its_end_marker_is_complete(kind: str) -> None:
    content = KINDS[kind]()
    np.testing.assert_array_equal(decode_pixels(content[:-2]), decode_pixels(content))


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "gray jpeg", "cmyk jpeg", "png", "16-bit png"])
def test_a_truncated_image_is_rejected(kind: str) -> None:
    content = KINDS[kind]()
    for length in (
        0,
        1,
        3,
        20,
        len(content) // 2,
        len(content) - 30,
        len(content) - (5 if "png" in kind else 30),
    ):
        with pytest.raises(ImageError) as caught:
            decode_pixels(content[:length])
        assert "0x" not in str(caught.value)  # an address differs from run to run


def test_no_bit_of_a_png_can_change_unnoticed() -> None:
    content = KINDS["png with a palette"]()
    for place in range(len(content)):
        corrupt = bytearray(content)
        corrupt[place] ^= 4
        with pytest.raises(ImageError):
            decode_pixels(bytes(corrupt))


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "png"])
def test_what_is_accepted_is_decoded_as_by_pillow(kind: str) -> None:
    content, rng, outcomes = KINDS[kind](), np.random.default_rng(1), []
    for _ in range(400):
        corrupt = bytearray(content)
        for place in rng.integers(2, len(content), rng.integers(1, 4)).tolist():
            corrupt[place] ^= 1 << int(rng.integers(8))
        try:
            pixels = decode_pixels(bytes(corrupt))
        except ImageError:
            outcomes.append(False)
            continue
        end = b"" if kind == "png" else b"\xff\xd9"  # Pillow needs it, even if the flipped bit is in it
        np.testing.assert_array_equal(pixels, by_pillow(bytes(corrupt) + end))
        outcomes.append(True)
    assert sum(outcomes) < 395


def test_flat_images_have_long_runs_of_zeros_and_are_valid() -> None:
    """With optimized tables the shortest code is "end of block": zero bytes are image data."""
    image = Image.new("RGB", (1600, 1600), "white")
    content = encoded(image, "JPEG", optimize=True)
    assert bytes(64) in content
    assert decode_pixels(content).min() == 255
    for options in ({"progressive": True}, {"subsampling": 0, "optimize": True}, {"quality": 5}):
        for other in (image, image.convert("L"), image.convert("CMYK")):
            decode_pixels(encoded(other, "JPEG", **options))


# --- damaged photographs

BLOCK = 4096


def lost(content: bytes, at: int) -> bytes:
    return content[:at] + content[at + BLOCK :]


def zeroed(content: bytes, at: int) -> bytes:
    return content[:at] + bytes(BLOCK) + content[at + BLOCK :]


def half_missing(content: bytes, at: int) -> bytes:
    return content[: len(content) // 2] + content[-2:]


def truncated(content: bytes, at: int) -> bytes:
    return content[:at]


def repeated(content: bytes, at: int) -> bytes:
    return content[: at + BLOCK] + content[at:]


DAMAGES = [lost, zeroed, half_missing, truncated, repeated]


def damaged(photographs: list[bytes], rng: np.random.Generator) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield the kind of damage, the healthy and the damaged content; damages lie behind the metadata."""
    for content in photographs:
        start = content.rfind(b"\xff\xda") + 20
        for damage in DAMAGES:
            yield (
                damage.__name__,
                content,
                damage(content, int(rng.integers(start, len(content) - BLOCK - 50))),
            )


def is_refused(content: bytes) -> bool:
    try:
        decode_pixels(content)
    except ImageError:
        return True
    return False


def check_damages(photographs: list[bytes], repeats: int) -> int:
    rng, number = np.random.default_rng(0), 0
    for _ in range(repeats):
        for kind, content, corrupt in damaged(photographs, rng):
            if corrupt == content:
                continue
            assert is_refused(corrupt), kind
            number += 1
    return number


def test_damaged_photographs_are_refused() -> None:
    """A photograph that comes with matplotlib, and noise, in several encodings."""
    photograph = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    rough = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    contents = [
        encoded(image, "JPEG", **options)
        for image in (photograph, rough)
        for options in ({"quality": 90}, {"quality": 85, "optimize": True}, {"quality": 90, "subsampling": 0})
    ]
    for content in contents:
        np.testing.assert_array_equal(decode_pixels(content), by_pillow(content))
    assert check_damages(contents, repeats=12) > 300


def test_damaged_photographs_of_coco_are_refused_and_healthy_ones_accepted(coco_tiny: Path) -> None:
    paths = sorted(coco_tiny.glob("*2017/*.jpg"))
    assert len(paths) == 160
    contents = [path.read_bytes() for path in paths]
    for content in contents:
        np.testing.assert_array_equal(decode_pixels(content), by_pillow(content))
    assert check_damages([content for content in contents if len(content) > 4 * BLOCK], repeats=1) > 700


def test_an_image_size_that_differs_from_the_index_is_an_error(tmp_path: Path) -> None:
    """If index and bytes contradict each other, neither is trusted."""
    images, annotations = write_coco(tmp_path, 3)
    write_source(coco_source(images, annotations), tmp_path / "shards")
    shards = open_shards(tmp_path / "shards")
    raw = shards.read(1)
    height, width, _ = decode_pixels(raw.image).shape
    shards.samples["width"][1] += 1
    message = rf"its image has {width}x{height} pixels instead of the index's {width + 1}x{height}"
    with pytest.raises(ShardError, match=message):
        load_sample(shards, 1, Transform(TransformConfig()), seed=0, position=0, raw=raw)
    assert load_sample(
        shards, 0, Transform(TransformConfig()), seed=0, position=0
    ).image.size == size_in_index(shards, 0)


def size_in_index(shards: Any, index: int) -> tuple[int, int]:
    return int(shards.samples["width"][index]), int(shards.samples["height"][index])


@pytest.mark.parametrize(("orientation", "is_rotated"), [(0, False), (1, False), (3, True), (6, True)])
def test_an_orientation_of_0_is_none(orientation: int, is_rotated: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    header = read_header(io.BytesIO(encoded(smooth(), "JPEG", exif=exif)))
    assert (header.orientation, header.is_rotated) == (orientation, is_rotated)


def test_an_image_above_the_limit_is_refused_by_its_header() -> None:
    """Without decoding it; the limit is Pillow's, and the message says what to do."""
    small = encoded(smooth(), "PNG")
    end = 8 + 4 + 4 + 13  # of the chunk with the size, without its checksum
    size = small[12:16] + struct.pack(">II", 20_000, 9_000) + small[24:end]
    content = small[:12] + size + struct.pack(">I", zlib.crc32(size)) + small[end + 4 :]
    with pytest.raises(
        ImageError, match="has more than 178,956,970 pixels: scale it down or cut it into tiles"
    ):
        read_header(io.BytesIO(content))
