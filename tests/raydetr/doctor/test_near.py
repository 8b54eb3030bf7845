"""Near duplicates: the search against brute force, the signature against copies and other photographs."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from planted_shards import encoded, random_image
from raydetr.doctor.duplicates import (
    MAX_DIFFERENT_BITS,
    MIN_CORRELATION,
    correlation,
    groups_of,
    near_pairs,
)
from raydetr.doctor.scan import image_signature

Variant = Callable[[Image.Image], bytes]


def darker(image: Image.Image) -> bytes:
    return encoded(ImageEnhance.Brightness(image).enhance(0.85))


def brighter(image: Image.Image) -> bytes:
    return encoded(ImageEnhance.Brightness(image).enhance(1.15))


def scaled(factor: float) -> Variant:
    def make(image: Image.Image) -> bytes:
        size = (round(image.width * factor), round(image.height * factor))
        return encoded(image.resize(size, Image.Resampling.BICUBIC), quality=85)

    return make


VARIANTS: dict[str, Variant] = {
    "recompressed": lambda image: encoded(image, quality=30),
    "png": lambda image: encoded(image, format="PNG", compress_level=1),
    "half": scaled(0.5),
    "third": scaled(1 / 3),
    "enlarged": scaled(1.3),
    "squeezed": lambda image: encoded(image.resize((image.width, round(image.height * 0.9)))),
    "brighter": brighter,
    "darker": darker,
    "contrast": lambda image: encoded(ImageEnhance.Contrast(image).enhance(1.2)),
    "gray": lambda image: encoded(image.convert("L")),
}


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    folder = os.environ.get("RAYDETR_COCO_TINY")
    if not folder:
        pytest.skip("RAYDETR_COCO_TINY does not name a folder with annotations/, train2017/ and val2017/")
    files = sorted(Path(folder).glob("*2017/*.jpg"))
    assert len(files) > 100
    return [Image.open(file).convert("RGB") for file in files]


def signatures(contents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    found = [image_signature(content) for content in contents]
    return np.array([found_hash for _, _, found_hash, _ in found], np.uint64), np.stack(
        [t for *_, t in found]
    )


def brute_force(gradients: np.ndarray, thumbnails: np.ndarray) -> set[tuple[int, int]]:
    found = set()
    for i in range(len(gradients)):
        for j in range(i + 1, len(gradients)):
            if (int(gradients[i]) ^ int(gradients[j])).bit_count() <= MAX_DIFFERENT_BITS:
                a, b = thumbnails[i].astype(float), thumbnails[j].astype(float)
                if min(a.std(), b.std()) > 3 and np.corrcoef(a, b)[0, 1] >= MIN_CORRELATION:
                    found.add((i, j))
    return found


def test_the_search_finds_what_brute_force_finds() -> None:
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 2**64, 60, np.uint64)
    pattern = rng.integers(0, 256, (60, 256))
    hashes, thumbnails = [], []
    for _ in range(600):  # Flip up to 10 bits of an original, and add more or less noise to its thumbnail
        which = rng.integers(60)
        flipped = rng.choice(64, rng.integers(0, 11), replace=False)
        hashes.append(originals[which] ^ np.uint64(sum(1 << int(bit) for bit in flipped)))
        noise = rng.normal(0, rng.choice([5, 40, 90]), 256)
        thumbnails.append(np.clip(pattern[which] + noise, 0, 255))
    gradients, grays = np.array(hashes, np.uint64), np.array(thumbnails).astype(np.uint8)
    expected = brute_force(gradients, grays)
    found = near_pairs(gradients, grays)
    assert len(expected) > 100
    assert len(found) == len(set(map(tuple, found.tolist())))
    assert set(map(tuple, found.tolist())) == expected


def test_none_and_one_image_have_no_pairs() -> None:
    for count in (0, 1):
        assert near_pairs(np.zeros(count, np.uint64), np.zeros((count, 256), np.uint8)).shape == (0, 2)


def test_flat_images_are_compared_by_their_gray_value() -> None:
    flat = [encoded(Image.new("RGB", (64, 48), (gray,) * 3)) for gray in (10, 10, 200, 201, 90)]
    pairs = near_pairs(*signatures(flat))
    assert pairs.tolist() == [[0, 1], [2, 3]]


def test_pairs_are_joined_to_groups() -> None:
    groups = groups_of(np.array([[5, 7], [0, 3], [7, 8]]), 10)
    assert [group.tolist() for group in groups] == [[0, 3], [5, 7, 8]]


@pytest.mark.parametrize("kind", VARIANTS)
def test_copies_of_generated_images_are_found(kind: str) -> None:
    rng = np.random.default_rng(1)
    check_copies([random_image(rng, (320, 240)) for _ in range(20)], VARIANTS[kind])


@pytest.mark.parametrize("kind", VARIANTS)
def test_copies_of_photographs_are_found(photographs: list[Image.Image], kind: str) -> None:
    check_copies(photographs[::4], VARIANTS[kind])


def check_copies(images: list[Image.Image], variant: Variant) -> None:
    """Check that each copy is paired with its original, and with nothing else."""
    count = len(images)
    contents = [encoded(image) for image in images] + [variant(image) for image in images]
    pairs = near_pairs(*signatures(contents))
    assert {(i, j) for i, j in pairs.tolist()} == {(i, i + count) for i in range(count)}


def test_different_photographs_are_far_from_the_limit(photographs: list[Image.Image]) -> None:
    gradients, thumbnails = signatures([encoded(image) for image in photographs])
    assert len(near_pairs(gradients, thumbnails)) == 0
    first, second = np.triu_indices(len(photographs), 1)
    assert correlation(thumbnails[first], thumbnails[second]).max() < MIN_CORRELATION - 0.05


def test_a_truncated_image_has_no_signature() -> None:
    content = encoded(random_image(np.random.default_rng(1)))
    with pytest.raises(OSError, match="truncated"):
        image_signature(content[: len(content) // 2])


def test_deep_and_transparent_images_have_the_signature_of_plain_ones() -> None:
    plain = random_image(np.random.default_rng(1)).convert("L")
    deep = Image.fromarray(np.asarray(plain).astype(np.uint16) * 257)
    buffer = io.BytesIO()
    deep.save(buffer, "PNG")
    transparent = plain.convert("RGBA")
    transparent.putalpha(7)
    others = [
        buffer.getvalue(),
        encoded(transparent, format="PNG"),
        encoded(plain.convert("P"), format="PNG"),
    ]
    pairs = near_pairs(*signatures([encoded(plain), *others]))
    assert pairs.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]


@pytest.mark.timeout(150)  # Too short to compare all pairs
@pytest.mark.parametrize("total", [10_000, pytest.param(118_287, marks=pytest.mark.slow)])
def test_the_number_of_images_of_coco_can_be_searched(total: int) -> None:
    """Search soft patterns, a tenth of them almost copies: brute force would be 7e9 comparisons for COCO."""
    rng = np.random.default_rng(0)
    spots = rng.normal(128, 50, (total, 5, 5))
    copies = rng.choice(total // 2, total // 10, replace=False)
    spots[total // 2 :][: len(copies)] = spots[copies]
    grid = np.linspace(0, 4, 16)
    low, part = np.minimum(grid.astype(int), 3), grid - np.minimum(grid.astype(int), 3)
    rows = spots[:, low] * (1 - part)[:, None] + spots[:, low + 1] * part[:, None]
    grays = rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part
    thumbnails = np.clip(grays + rng.normal(0, 2, grays.shape), 0, 255).astype(np.uint8)
    cells = thumbnails.astype(int)[:, ::2, ::2]
    bits = np.packbits(np.roll(cells, -1, axis=2) > cells, axis=2)[..., 0]
    gradients = np.ascontiguousarray(bits).view(np.uint64)[:, 0]
    pairs = near_pairs(gradients, thumbnails.reshape(total, -1))
    expected = {(int(original), total // 2 + number) for number, original in enumerate(copies)}
    found = set(map(tuple, pairs.tolist()))
    assert len(expected & found) > 0.8 * len(expected)  # The others differ in more bits
    assert len(found - expected) < 0.01 * len(expected)


def test_frames_of_a_fixed_camera_are_one_group() -> None:
    """All images look the same: of 2 million pairs, enough are returned to connect them."""
    rng = np.random.default_rng(0)
    scene = rng.integers(20, 230, (16, 16))
    thumbnails = np.clip(scene + rng.normal(0, 3, (2000, 16, 16)), 0, 255).astype(np.uint8)
    flipped = np.uint64(1) << rng.integers(0, 64, (2000, 2)).astype(np.uint64)
    gradients = np.uint64(0x1234567890ABCDEF) ^ flipped[:, 0] ^ flipped[:, 1]
    pairs = near_pairs(gradients, thumbnails.reshape(2000, -1))
    assert len(pairs) < 2000 * 16 * 64
    (group,) = groups_of(pairs, 2000)
    assert len(group) == 2000
