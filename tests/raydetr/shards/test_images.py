"""The fast decoder against Pillow: the same pixels for readable images, the same rejections."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from made_coco import write_coco
from raydetr.config import TransformConfig
from raydetr.data.samples import load_sample, make_sample
from raydetr.data.transforms.transform import Transform
from raydetr.shards.images import UNREADABLE, decode_pixels, decode_rgb
from raydetr.shards.reader import ShardError, open_shards
from raydetr.shards.writer import write_shards


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


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_pillow_and_can_be_written_to(kind: str) -> None:
    content = KINDS[kind]()
    pixels = decode_pixels(content)
    np.testing.assert_array_equal(pixels, np.asarray(decode_rgb(content)))
    assert (pixels.dtype, pixels.flags.writeable, pixels.flags.c_contiguous) == (np.uint8, True, True)


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "gray jpeg", "cmyk jpeg", "png", "16-bit png"])
def test_a_truncated_image_is_rejected(kind: str) -> None:
    content = KINDS[kind]()
    for length in (0, 1, 3, 20, len(content) // 2, len(content) - 30):
        with pytest.raises(UNREADABLE):
            decode_pixels(content[:length])


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "png"])
def test_corrupt_images_are_treated_like_in_pillow(kind: str) -> None:
    """Flipped bits either fail in both decoders or give the same pixels."""
    content, rng, outcomes = KINDS[kind](), np.random.default_rng(1), []
    for _ in range(400):
        corrupt = bytearray(content)
        for place in rng.integers(2, len(content), rng.integers(1, 4)).tolist():
            corrupt[place] ^= 1 << int(rng.integers(8))
        found, expected = attempt(decode_pixels, bytes(corrupt)), attempt(decode_rgb, bytes(corrupt))
        assert (found is None) == (expected is None)
        if found is not None:
            np.testing.assert_array_equal(found, expected)
        outcomes.append(found is None)
    assert sum(outcomes) > 5


def attempt(decode: Any, content: bytes) -> np.ndarray | None:
    try:
        return np.array(decode(content))
    except UNREADABLE:
        return None


def test_an_image_size_that_differs_from_the_index_is_an_error(tmp_path: Path) -> None:
    """If index and bytes contradict each other, neither is trusted."""
    images, annotations = write_coco(tmp_path, 3)
    write_shards(images, annotations, tmp_path / "shards")
    shards = open_shards(tmp_path / "shards")
    raw = shards.read(1)
    width, height = decode_rgb(raw.image).size
    shards.samples["width"][1] += 1
    message = rf"its image has {width}x{height} pixels instead of the index's {width + 1}x{height}"
    with pytest.raises(ShardError, match=message):
        make_sample(shards, 1, raw, Transform(TransformConfig()), seed=0, position=0, short_side=None)
    assert load_sample(
        shards, 0, Transform(TransformConfig()), seed=0, position=0
    ).image.size == size_in_index(shards, 0)


def size_in_index(shards: Any, index: int) -> tuple[int, int]:
    return int(shards.samples["width"][index]), int(shards.samples["height"][index])
