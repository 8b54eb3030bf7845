"""Test the normalization of images against float64, and the native operator against its definition bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detrs.ops import native_status, normalize_images, normalize_images_reference, padding_mask

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
native = pytest.mark.skipif("cpu" not in native_status().devices, reason=native_status().reason)


def make_images(num_images, height, width, seed, channels_last=True):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (num_images, height, width, 3), dtype=torch.uint8, generator=generator)
    sides = [torch.randint(0, side + 1, (num_images,), generator=generator) for side in (height, width)]
    pixels = pixels.permute(0, 3, 1, 2)
    return (pixels if channels_last else pixels.contiguous()), torch.stack(sides, 1)


@settings(deadline=None, max_examples=60)
@given(
    num_images=st.integers(0, 4),
    height=st.integers(1, 40),
    width=st.integers(1, 70),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_number_at_any_size(num_images, height, width, channels_last, seed):
    """Numbers equal float64 up to rounding, the padding is 0, and both implementations agree bit by bit."""
    pixels, sizes = make_images(num_images, height, width, seed, channels_last)
    found = normalize_images(pixels, sizes, MEAN, STD)
    expected = (pixels.double() - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[
        :, None, None
    ]
    for image, (bottom, end) in zip(expected, sizes.tolist(), strict=True):
        image[:, bottom:] = 0
        image[:, :, end:] = 0
    assert (found.dtype, found.shape) == (torch.float32, pixels.shape)
    assert found.is_contiguous(memory_format=torch.channels_last) or found.numel() == 0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-7)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    outside = [(rows >= bottom) | (columns >= end) for bottom, end in sizes.tolist()]
    assert padding_mask(sizes, height, width).tolist() == [mask.tolist() for mask in outside]
    assert torch.equal(found, normalize_images_reference(pixels, sizes, MEAN, STD))


@native
def test_a_batch_of_many_huge_pages_on_several_threads():
    pixels, sizes = make_images(3, 480, 801, seed=1)
    expected = normalize_images_reference(pixels, sizes, MEAN, STD)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(normalize_images(pixels, sizes, MEAN, STD), expected)
    finally:
        torch.set_num_threads(threads)


@native
def test_opcheck():
    pixels, sizes = make_images(2, 9, 33, seed=2)
    arguments = (pixels.permute(0, 2, 3, 1), sizes, torch.tensor(MEAN), torch.tensor(STD))
    results = torch.library.opcheck(torch.ops.detrs.normalize_images.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@native
@pytest.mark.parametrize(
    ("argument", "wrong", "message"),
    [
        (0, torch.zeros(1, 4, 5, 3), "pixels: expected uint8"),
        (0, torch.zeros(1, 4, 5, 4, dtype=torch.uint8), "pixels: expected uint8"),
        (1, torch.tensor([[5, 5]]), "an image larger than pixels"),
        (1, torch.tensor([[4, -1]]), "an image larger than pixels"),
        (1, torch.tensor([[4, 5], [4, 5]]), "sizes: expected int64"),
        (2, torch.zeros(1), "mean and std: expected float32"),
        (3, torch.ones(3, dtype=torch.float64), "mean and std: expected float32"),
    ],
)
def test_a_direct_call_cannot_leave_the_memory(argument, wrong, message):
    arguments = [
        torch.zeros(1, 4, 5, 3, dtype=torch.uint8),
        torch.tensor([[4, 5]]),
        torch.zeros(3),
        torch.ones(3),
    ]
    arguments[argument] = wrong
    with pytest.raises(RuntimeError, match=message):
        torch.ops.detrs.normalize_images(*arguments)
