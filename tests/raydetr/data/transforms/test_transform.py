"""Test flip, crop, resize and the full training transform against the official ones: sizes, boxes, pixels."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

import goldens
from raydetr.config import ConfigError, TransformConfig, override
from raydetr.data.samples import load_sample
from raydetr.data.transforms.geometry import Crop, flip_horizontally, resize, resized_size
from raydetr.data.transforms.pixels import LazyImage, Pixels, size_of
from raydetr.data.transforms.transform import Transform, TransformParams
from raydetr.recipes import quickstart
from raydetr.recipes.coco import official_training_transform
from raydetr.shards.coco import usable_boxes
from raydetr.shards.reader import Shards

GOLDEN = goldens.FOLDER
DATA: dict[str, Any] = json.loads((GOLDEN / "data.json").read_text())


def golden_image(name: str) -> Pixels:
    with np.load(GOLDEN / "data.npz") as arrays:
        return np.array(arrays[name])


@pytest.mark.parametrize("row", DATA["resize_sizes"], ids=lambda row: "{}x{}".format(*row["h_w"]))
def test_sizes_equal_the_official_ones(row: dict[str, Any]) -> None:
    height, width = row["h_w"]
    for key, expected in row.items():
        if key == "h_w":
            continue
        short_side, max_side = key.split("_")
        found = resized_size(width, height, int(short_side), int(max_side) if max_side != "None" else None)
        if isinstance(expected, str):  # the official code fails: a side of 0
            assert min(found) == 1
        else:
            assert found == (expected[1], expected[0])


@pytest.mark.parametrize("number", range(len(DATA["images"])))
def test_flip_equals_the_official_one(number: int) -> None:
    golden = DATA["images"][number]
    image, boxes = flip_horizontally(golden_image(f"image{number}"), converted(golden))
    np.testing.assert_array_equal(image, golden_image(f"hflip{number}"))
    np.testing.assert_allclose(boxes, np.reshape(golden["hflip"]["boxes"], (-1, 4)), atol=1e-4)


@pytest.mark.parametrize("number", range(len(DATA["images"])))
def test_resize_equals_the_official_one(number: int) -> None:
    golden = DATA["images"][number]
    image = golden_image(f"image{number}")
    resized, _ = resize(image, converted(golden), resized_size(*size_of(image), 60, 100))
    check_levels(resized, golden_image(f"resize60_100_{number}"))
    for case in golden["resize"]:
        height, width = case["size"]
        if isinstance(case["boxes"], list):
            _, boxes = resize(image, converted(golden), (width, height))
            np.testing.assert_allclose(boxes, np.reshape(case["boxes"], (-1, 4)), atol=1e-3)


def check_levels(found: Pixels, expected: Pixels) -> None:
    """Check equality except for sums halfway between two levels; noise shrunk by 4/5 has many of them."""
    difference = found.astype(int) - expected
    assert found.shape == expected.shape
    assert abs(difference).max() <= 2
    assert (abs(difference) == 2).mean() < 1e-4
    assert (difference != 0).mean() < 0.1
    assert abs(difference.mean()) < 0.01


@pytest.mark.parametrize("number", range(len(DATA["images"])))
def test_validation_transform_equals_the_official_one(number: int) -> None:
    golden = DATA["images"][number]
    transform = Transform(TransformConfig(short_sides=(800,), max_side=1333))
    image, boxes, kept = transform(golden_image(f"image{number}"), converted(golden), seed=0, position=0)
    assert [image.height, image.width] == golden["val_transform"]["size"]
    expected = np.reshape(golden["val_transform"]["boxes"], (-1, 4))
    np.testing.assert_allclose(normalized(boxes, image), expected, atol=1e-6)
    assert kept.all()


@pytest.mark.parametrize(
    "row", DATA["train_transform_seeded"], ids=lambda row: "image{image}-seed{seed}".format(**row)
)
def test_training_transform_equals_the_official_one(row: dict[str, Any]) -> None:
    """With the parameters that the official code draws with this seed."""
    golden = DATA["images"][row["image"]]
    before = golden_image(f"image{row['image']}")
    boxes, category_ids = usable_boxes(golden["annotations"], *golden["wh"])
    transform = Transform(official_training_transform())
    image, boxes, kept = transform.apply(
        before, boxes, official_params(transform, row["seed"], size_of(before))
    )
    assert [image.height, image.width] == row["size"]
    np.testing.assert_allclose(normalized(boxes, image), np.reshape(row["boxes"], (-1, 4)), atol=1e-6)
    assert np.array(category_ids)[kept].tolist() == row["labels"]


def official_params(transform: Transform, seed: int, size: tuple[int, int]) -> TransformParams:
    """Draw parameters with the official sequence of calls to Python's and torch's generators."""
    python = random.Random(seed)
    torch.manual_seed(seed)
    flip, crop = python.random() < 0.5, None
    if python.random() >= 0.5:
        short_side = python.choice(transform.config.crop_short_sides)
        inside = resized_size(*size, short_side, None)
        width, height = (python.randint(384, min(side, 600)) for side in inside)
        top, left = 0, 0
        if inside != (width, height):
            top, left = (
                int(torch.randint(0, side - window + 1, (1,)).item())
                for side, window in ((inside[1], height), (inside[0], width))
            )
        crop = Crop(short_side, left, top, width, height)
    return TransformParams(flip, crop, python.choice(transform.config.short_sides))


def normalized(boxes: np.ndarray, image: LazyImage) -> np.ndarray:
    boxes = boxes / np.tile(image.size, 2)
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)


def converted(golden: dict[str, Any]) -> np.ndarray:
    return usable_boxes(golden["annotations"], *golden["wh"])[0]


def test_draws_depend_only_on_seed_and_position_and_are_uniform() -> None:
    transform = Transform(TransformConfig(short_sides=(10, 20, 30), max_side=99, horizontal_flip=0.25))
    draws = [transform.draw(7, position, (64, 48)) for position in range(6000)]
    assert draws == [transform.draw(7, position, (64, 48)) for position in range(6000)]
    assert draws != [transform.draw(8, position, (64, 48)) for position in range(6000)]
    assert abs(np.mean([drawn.flip for drawn in draws]) - 0.25) < 0.03
    for side in (10, 20, 30):
        assert abs(np.mean([drawn.short_side == side for drawn in draws]) - 1 / 3) < 0.03
    together = np.mean([drawn.flip and drawn.short_side == 10 for drawn in draws])
    assert abs(together - 0.25 / 3) < 0.02


def test_crops_have_the_official_distribution() -> None:
    """Half of the images are cropped; sizes are uniform from 384 to the image's side, at most 600; so are places."""
    transform = Transform(official_training_transform())
    size = (640, 480)
    draws = [transform.draw(3, position, size) for position in range(12000)]
    crops = [drawn.crop for drawn in draws if drawn.crop is not None]
    assert abs(len(crops) / len(draws) - 0.5) < 0.02
    assert abs(np.mean([drawn.flip for drawn in draws if drawn.crop is not None]) - 0.5) < 0.03
    sides = [drawn.short_side for drawn in draws if drawn.crop is not None]
    assert all(abs(sides.count(side) / len(sides) - 1 / 11) < 0.02 for side in transform.config.short_sides)
    for short_side in (400, 500, 600):
        own = [crop for crop in crops if crop.short_side == short_side]
        assert abs(len(own) / len(crops) - 1 / 3) < 0.03
        width, height = resized_size(*size, short_side, None)
        check_uniform([crop.width for crop in own], 384, min(600, width))
        check_uniform([crop.height for crop in own], 384, min(600, height))
        assert {crop.left for crop in own if crop.width == width} <= {0}
        places = [crop.left / (width - crop.width) for crop in own if width - crop.width > 50]
        if places:
            assert abs(np.mean(places) - 0.5) < 0.04
        assert all(crop.top + crop.height <= height for crop in own)
        assert max(crop.top + crop.height for crop in own) == height


def check_uniform(values: list[int], low: int, high: int) -> None:
    assert (min(values) - low) / (high - low) < 0.07
    assert (high - max(values)) / (high - low) < 0.07
    assert abs(np.mean(values) - (low + high) / 2) < 0.04 * (high - low) + 0.2


def test_crops_of_small_images_keep_their_small_sides() -> None:
    transform = Transform(TransformConfig(crop_probability=1.0, crop_min_side=30, crop_max_side=60))
    for position in range(200):
        crop = transform.draw(1, position, (20, 50)).crop
        assert crop is not None
        assert (crop.short_side, crop.left, crop.width) == (None, 0, 20)
        assert 30 <= crop.height <= 50
        assert 0 <= crop.top <= 50 - crop.height


def test_contradictory_crop_settings_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"crop_min_side 700 exceeds crop_max_side 600"):
        override(quickstart(), {"data.train_transform.crop_min_side": 700})


def test_transforms_without_randomness() -> None:
    size = (37, 22)
    assert Transform(TransformConfig()).draw(0, 5, size) == TransformParams(False, None, None)
    assert Transform(TransformConfig(short_sides=(20,), horizontal_flip=1.0)).draw(
        0, 5, size
    ) == TransformParams(True, None, 20)
    image = np.zeros((*size[::-1], 3), np.uint8)
    same, boxes, kept = Transform(TransformConfig())(image, np.zeros((0, 4)), seed=0, position=0)
    assert same.pixels() is image
    assert boxes.shape == (0, 4)
    assert kept.shape == (0,)


def test_an_object_stays_in_its_box() -> None:
    """White on black, it lies in its box after any flip, crop and resize."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[8:20, 6:30] = 255
    transform = Transform(TransformConfig(
        short_sides=(20, 40, 80), max_side=100, horizontal_flip=0.5,
        crop_probability=0.7, crop_short_sides=(20, 30, 40), crop_min_side=8, crop_max_side=40,
    ))  # fmt: skip
    num_unreadable = 0
    for position in range(100):
        image, boxes, kept = transform(pixels, np.array([[6.0, 8, 30, 20]]), seed=0, position=position)
        assert len(boxes) == kept.sum()
        rows, columns = np.nonzero(image.pixels()[..., 0] > 127)
        if not kept[0]:
            num_unreadable += 1
            assert len(rows) == 0
        elif min(boxes[0, 2:] - boxes[0, :2]) > 2:  # smaller ones are gray
            scale = max(1.01, 0.7 * max(image.size) / 20)  # the last resize enlarges a pixel
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(found, boxes[0], atol=scale)
    assert 0 < num_unreadable < 30


def test_labels_stay_with_their_boxes_in_a_crop(shards: Shards) -> None:
    """Each uncropped box has the size of an object with its label."""
    transform = Transform(TransformConfig(crop_probability=1.0, crop_min_side=20, crop_max_side=60))
    labels = shards.label_map.labels
    num_uncropped = num_dropped = 0
    for index in range(shards.num_samples):
        found = load_sample(shards, index, transform, seed=2, position=index)
        assert len(found.boxes_xyxy) == len(found.labels)
        annotations = [a for a in shards.read(index).annotations if not a.get("iscrowd")]
        num_dropped += len(annotations) - len(found.labels)
        for label, (x0, y0, x1, y1) in zip(found.labels, found.boxes_xyxy, strict=True):
            if x0 > 0 and y0 > 0 and x1 < found.image.width and y1 < found.image.height:
                sizes = [a["bbox"][2:] for a in annotations if labels[a["category_id"]] == label]
                assert any(np.allclose((x1 - x0, y1 - y0), size, atol=1e-6) for size in sizes)
                num_uncropped += 1
    assert num_uncropped > 5
    assert num_dropped > 5
