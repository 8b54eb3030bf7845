from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydetr.data.coco import usable_boxes
from raydetr.data.transforms import Transform, flip_horizontally, resize, resized_size

GOLDEN = Path(__file__).parents[2] / "golden"
DATA: dict[str, Any] = json.loads((GOLDEN / "data.json").read_text())


def golden_image(name: str) -> Image.Image:
    with np.load(GOLDEN / "data.npz") as arrays:
        return Image.fromarray(arrays[name])


@pytest.mark.parametrize("row", DATA["resize_sizes"], ids=lambda row: "{}x{}".format(*row["h_w"]))
def test_sizes_equal_the_official_ones(row: dict[str, Any]) -> None:
    height, width = row["h_w"]
    for key, expected in row.items():
        if key == "h_w":
            continue
        short_side, max_side = key.split("_")
        found = resized_size(width, height, int(short_side), int(max_side) if max_side != "None" else 10**9)
        if isinstance(expected, str):  # the official code fails: a side of 0
            assert min(found) == 1
        else:
            assert found == (expected[1], expected[0])


@pytest.mark.parametrize("number", range(3))
def test_flip_equals_the_official_one(number: int) -> None:
    golden = DATA["images"][number]
    image, boxes = flip_horizontally(golden_image(f"image{number}"), converted(golden))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(golden_image(f"hflip{number}")))
    np.testing.assert_allclose(boxes, np.reshape(golden["hflip"]["boxes"], (-1, 4)), atol=1e-4)


@pytest.mark.parametrize("number", range(3))
def test_resize_equals_the_official_one(number: int) -> None:
    golden = DATA["images"][number]
    image = golden_image(f"image{number}")
    resized, _ = resize(image, converted(golden), resized_size(*image.size, 60, 100))
    np.testing.assert_array_equal(np.asarray(resized), np.asarray(golden_image(f"resize60_100_{number}")))
    for case in golden["resize"]:
        height, width = case["size"]
        if isinstance(case["boxes"], list):
            _, boxes = resize(image, converted(golden), (width, height))
            np.testing.assert_allclose(boxes, np.reshape(case["boxes"], (-1, 4)), atol=1e-3)


@pytest.mark.parametrize("number", range(3))
def test_validation_transform_equals_the_official_one(number: int) -> None:
    golden = DATA["images"][number]
    transform = Transform(short_sides=(800,), max_side=1333)
    image, boxes = transform(golden_image(f"image{number}"), converted(golden), seed=0, position=0)
    assert [image.height, image.width] == golden["val_transform"]["size"]
    boxes = boxes / np.tile(image.size, 2)
    cxcywh = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
    np.testing.assert_allclose(cxcywh, np.reshape(golden["val_transform"]["boxes"], (-1, 4)), atol=1e-6)


def converted(golden: dict[str, Any]) -> np.ndarray:
    return usable_boxes(golden["annotations"], *golden["wh"])[0]


def test_draws_depend_on_seed_and_position_alone_and_are_fair() -> None:
    transform = Transform(short_sides=(10, 20, 30), max_side=99, horizontal_flip=0.25)
    draws = [transform.draw(7, position) for position in range(6000)]
    assert draws == [transform.draw(7, position) for position in range(6000)]
    assert draws != [transform.draw(8, position) for position in range(6000)]
    assert abs(np.mean([flip for flip, _ in draws]) - 0.25) < 0.03
    for side in (10, 20, 30):
        assert abs(np.mean([drawn == side for _, drawn in draws]) - 1 / 3) < 0.03
    together = np.mean([flip and side == 10 for flip, side in draws])
    assert abs(together - 0.25 / 3) < 0.02


def test_certain_transforms() -> None:
    assert Transform().draw(0, 5) == (False, None)
    assert Transform(short_sides=(20,), horizontal_flip=1.0).draw(0, 5) == (True, 20)
    image = Image.new("RGB", (37, 22))
    same, boxes = Transform()(image, np.zeros((0, 4)), seed=0, position=0)
    assert same is image
    assert boxes.shape == (0, 4)


def test_a_mark_stays_in_its_box() -> None:
    """A white square on black is where its box says, after any flip and resize."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[8:20, 6:30] = 255
    transform = Transform(short_sides=(20, 40, 80), max_side=100, horizontal_flip=0.5)
    for position in range(20):
        image, boxes = transform(
            Image.fromarray(pixels), np.array([[6.0, 8, 30, 20]]), seed=0, position=position
        )
        rows, columns = np.nonzero(np.asarray(image)[..., 0] > 127)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(found, boxes[0], atol=1.01)
