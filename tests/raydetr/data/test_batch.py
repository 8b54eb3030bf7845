from __future__ import annotations

import dataclasses
import json

import numpy as np
import torch

import goldens
from raydetr.data.batch import Batch, Sample, collate, to_model
from raydetr.data.transforms.pixels import LazyImage

GOLDEN = goldens.FOLDER


def sample(width: int, height: int, boxes: list[list[float]], image_id: int = 1) -> Sample:
    pixels = np.random.default_rng(image_id).integers(1, 256, (height, width, 3), np.uint8)
    labels = np.arange(len(boxes))
    return Sample(
        LazyImage.unresized(pixels),
        labels,
        np.array(boxes, float).reshape(-1, 4),
        image_id,
        (2 * height, 2 * width),
    )


def made_batch() -> tuple[list[Sample], Batch]:
    samples = [
        sample(20, 30, [[2, 3, 12, 9], [0, 0, 20, 30]], image_id=7),
        sample(40, 10, [], image_id=2**40),
        sample(8, 8, [[1, 1, 3, 8]], image_id=9),
    ]
    return samples, collate(samples, position=96)


def test_images_are_padded_at_the_right_and_at_the_bottom() -> None:
    samples, batch = made_batch()
    assert (batch.pixels.shape, batch.pixels.dtype) == ((3, 3, 30, 40), torch.uint8)
    assert batch.sizes.tolist() == [[30, 20], [10, 40], [8, 8]]
    assert batch.original_sizes.tolist() == [[60, 40], [20, 80], [16, 16]]
    assert batch.image_ids.tolist() == [7, 2**40, 9]
    assert batch.position == 96
    for pixels, (height, width), one in zip(batch.pixels, batch.sizes.tolist(), samples, strict=True):
        np.testing.assert_array_equal(pixels[:, :height, :width].permute(1, 2, 0).numpy(), one.image.pixels())
        assert pixels[:, height:].sum() == pixels[:, :, width:].sum() == 0


def test_targets_are_packed_and_relative_to_the_image_without_padding() -> None:
    _, batch = made_batch()
    assert batch.counts == (2, 0, 1)
    assert batch.labels.tolist() == [0, 1, 0]
    expected = [[7 / 20, 6 / 30, 10 / 20, 6 / 30], [0.5, 0.5, 1, 1], [2 / 8, 4.5 / 8, 2 / 8, 7 / 8]]
    assert batch.boxes.dtype == torch.float32
    np.testing.assert_allclose(batch.boxes, expected, rtol=1e-6)


def test_batch_without_any_object() -> None:
    images, targets = to_model(collate([sample(5, 4, [])], 0), "cpu")
    assert (targets.boxes.shape, targets.labels.shape, targets.counts) == ((0, 4), (0,), (0,))
    assert (targets.labels.dtype, targets.boxes.dtype) == (torch.int64, torch.float32)
    assert not images.padding_mask.any()


def test_model_input_is_normalized_and_zero_in_the_padding() -> None:
    samples, batch = made_batch()
    images, targets = to_model(batch, "cpu")
    assert images.pixels.dtype == torch.float32
    assert images.pixels.is_contiguous(memory_format=torch.channels_last)
    for i, one in enumerate(samples):
        height, width = one.image.height, one.image.width
        expected = (one.image.pixels() / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        inside = images.pixels[i, :, :height, :width].permute(1, 2, 0)
        np.testing.assert_allclose(inside, expected, atol=2e-6)
        expected_padding = np.ones((30, 40), bool)
        expected_padding[:height, :width] = False
        np.testing.assert_array_equal(images.padding_mask[i], expected_padding)
    assert images.pixels.masked_select(images.padding_mask[:, None]).abs().sum() == 0
    assert (targets.boxes, targets.labels, targets.counts) == (batch.boxes, batch.labels, batch.counts)


def test_normalized_pixels_equal_the_official_ones() -> None:
    golden = json.loads((GOLDEN / "data.json").read_text())["images"][0]["normalized_pixels"]
    with np.load(GOLDEN / "data.npz") as arrays:
        image = LazyImage(np.array(arrays["image0"]), (80, 60))
    one = Sample(image, np.zeros(0, np.int64), np.zeros((0, 4)), 1, (48, 64))
    pixels = to_model(collate([one], 0), "cpu")[0].pixels[0]
    assert list(pixels.shape) == golden["shape"]
    np.testing.assert_allclose(pixels.mean((1, 2)), golden["mean_per_channel"], atol=1e-5)
    np.testing.assert_allclose(pixels.std((1, 2), correction=0), golden["std_per_channel"], atol=1e-5)
    np.testing.assert_allclose(pixels[0, 0, :8], golden["first_row_ch0"], atol=1e-5)
    np.testing.assert_allclose(pixels[2, -1, -8:], golden["last_row_ch2"], atol=1e-5)


def test_a_given_canvas_is_overwritten() -> None:
    """Images, resized or not, and padding equal those of a new array; the batch uses the canvas's memory."""
    samples, _ = made_batch()
    grown = dataclasses.replace(samples[2], image=LazyImage(samples[2].image.source, (25, 21)))
    shrunk = dataclasses.replace(samples[0], image=LazyImage(samples[0].image.source, (7, 29)))
    canvas = np.full((4, 30, 40, 3), 77, np.uint8)
    shapes = []

    def out(shape: tuple[int, int, int, int]) -> np.ndarray:
        shapes.append(shape)
        return canvas

    batch = collate([*samples[:2], grown, shrunk], 3, out=out)
    assert shapes == [(4, 30, 40, 3)]
    assert np.shares_memory(batch.pixels.numpy(), canvas)
    expected = collate([*samples[:2], grown, shrunk], 3)
    assert torch.equal(batch.pixels, expected.pixels)
    np.testing.assert_array_equal(canvas[2, :21, :25], grown.image.pixels())
    assert canvas[2, 21:].sum() == canvas[2, :, 25:].sum() == 0
