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
from raydetr.doctor import duplicates
from raydetr.doctor.duplicates import MAX_DIFFERENT_BITS, near_groups
from raydetr.doctor.scan import perceptual_hash
from raydetr.shards.images import decode_image

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


def hashes_of(contents: list[bytes]) -> np.ndarray:
    return np.array([perceptual_hash(decode_image(content)) for content in contents], np.uint64)


def groups_in(contents: list[bytes]) -> list[list[int]]:
    return [group.tolist() for group in near_groups(hashes_of(contents))]


def brute_force(hashes: list[int]) -> list[list[int]]:
    """Return the groups of at least two hashes that are connected by near pairs."""
    groups: list[set[int]] = []
    for number, one in enumerate(hashes):
        is_near = [
            any((one ^ hashes[k]).bit_count() <= MAX_DIFFERENT_BITS for k in group) for group in groups
        ]
        joined = {number}.union(*(group for group, near in zip(groups, is_near, strict=True) if near))
        groups = [group for group, near in zip(groups, is_near, strict=True) if not near] + [joined]
    return sorted(sorted(group) for group in groups if len(group) > 1)


@pytest.mark.parametrize("rows", [1, 7, 1024])
def test_the_search_finds_what_brute_force_finds(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "ROWS", rows)
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 2**64, 100, np.uint64)
    hashes = []
    for _ in range(250):  # Flip up to 20 bits of an original: groups are connected, or are not
        flipped = rng.choice(64, rng.integers(0, 21), replace=False)
        hashes.append(int(originals[rng.integers(100)]) ^ sum(1 << int(bit) for bit in flipped))
    expected = brute_force(hashes)
    assert len(expected) > 20
    assert sum(map(len, expected)) < 200
    assert sorted(group.tolist() for group in near_groups(np.array(hashes, np.uint64))) == expected


def test_none_and_one_image_have_no_groups() -> None:
    for count in (0, 1):
        assert near_groups(np.zeros(count, np.uint64)) == []


def test_flat_images_are_compared_by_their_gray_value() -> None:
    flat = [encoded(Image.new("RGB", (64, 48), (gray,) * 3)) for gray in (10, 10, 200, 201, 90)]
    assert groups_in(flat) == [[0, 1], [2, 3]]


def test_pairs_are_joined_to_groups() -> None:
    far = 2**40 - 1
    near = [
        0,
        far << 20,
        1,
        3,
        2**10 - 1,
        far,
        (far << 20) ^ 7,
        2**18 - 1,
    ]  # Of which 0, 2, 3, 4, 7 form a chain
    assert [group.tolist() for group in near_groups(np.array(near, np.uint64))] == [[0, 2, 3, 4, 7], [1, 6]]


@pytest.mark.parametrize("kind", VARIANTS)
def test_copies_of_generated_images_are_found(kind: str) -> None:
    rng = np.random.default_rng(1)
    check_copies([random_image(rng, (320, 240)) for _ in range(20)], VARIANTS[kind])


@pytest.mark.parametrize("kind", VARIANTS)
def test_copies_of_photographs_are_found(photographs: list[Image.Image], kind: str) -> None:
    check_copies(photographs[::4], VARIANTS[kind])


def check_copies(images: list[Image.Image], variant: Variant) -> None:
    """Check that each copy is grouped with its original, and with nothing else."""
    count = len(images)
    contents = [encoded(image) for image in images] + [variant(image) for image in images]
    assert groups_in(contents) == [[number, number + count] for number in range(count)]


def test_different_photographs_are_far_from_the_limit(photographs: list[Image.Image]) -> None:
    hashes = hashes_of([encoded(image) for image in photographs])
    first, second = np.triu_indices(len(photographs), 1)
    assert np.bitwise_count(hashes[first] ^ hashes[second]).min() > MAX_DIFFERENT_BITS + 4


def test_deep_and_transparent_images_have_the_hash_of_plain_ones() -> None:
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
    assert groups_in([encoded(plain), *others]) == [[0, 1, 2, 3]]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("total", [10_000, pytest.param(118_287, marks=pytest.mark.slow)])
def test_the_number_of_images_of_coco_can_be_searched(total: int) -> None:
    """A tenth of the images are copies that differ in 0 to 6 bits."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, total, np.uint64)
    originals = rng.choice(total // 2, total // 10, replace=False)
    flipped = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (6, len(originals)), np.uint64))
    copies = total // 2 + np.arange(len(originals))
    hashes[copies] = hashes[originals] ^ flipped
    found = {tuple(group.tolist()) for group in near_groups(hashes)}
    expected = set(zip(originals.tolist(), copies.tolist(), strict=True))
    assert len(found ^ expected) < 0.001 * len(expected)  # Others are near by chance


def test_frames_of_a_fixed_camera_are_one_group() -> None:
    """All images look the same: of 2 million pairs, few are kept."""
    rng = np.random.default_rng(0)
    flipped = np.uint64(1) << rng.integers(0, 64, (2000, 2)).astype(np.uint64)
    (group,) = near_groups(np.uint64(0x1234567890ABCDEF) ^ flipped[:, 0] ^ flipped[:, 1])
    assert len(group) == 2000
    assert len(duplicates._near_edges(flipped[:, 0], 0)) < 2 * 2000
