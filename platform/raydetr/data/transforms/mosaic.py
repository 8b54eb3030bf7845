"""Mosaic: four images of the data set become one, of the size of the first."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydetr.data.transforms.geometry import Boxes, clamp, resize_boxes
from raydetr.data.transforms.pixels import resize_pixels, size_of
from raydetr.shards.images import Pixels

Labels = npt.NDArray[np.int64]  # [t]


@dataclass(frozen=True, eq=False)
class Labelled:
    """An image with its objects."""

    pixels: Pixels
    boxes_xyxy: Boxes  # [t, 4] in pixels
    labels: Labels  # [t]


@dataclass(frozen=True)
class Mosaic:
    """What was drawn for a mosaic."""

    partners: tuple[int, int, int]  # samples of the data set that come to the first image
    centre: tuple[float, float]  # where the four meet, as a share of width and height
    places: tuple[tuple[float, float], ...]  # for each of the four, which part of it is seen: 0 left, 1 right

    @classmethod
    def draw(cls, rng: random.Random, num_samples: int) -> Mosaic:
        """Any images of the data set; they meet in the middle half of the picture."""
        first, second, third = (rng.randrange(num_samples) for _ in range(3))
        centre = rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.75)
        return cls((first, second, third), centre, tuple((rng.random(), rng.random()) for _ in range(4)))


def make_mosaic(choice: Mosaic, images: Sequence[Labelled]) -> Labelled:
    """Put four images together: top left, top right, bottom left, bottom right.

    Each is resized to cover its quarter, and what sticks out is cut off. Boxes are clamped to the quarter, and
    those of which nothing is left are left out. The whole has the size, and so the aspect ratio, of the first.
    Source: the idea of Bochkovskiy et al., YOLOv4 (arXiv:2004.10934), section 3.3.
    """
    width, height = size_of(images[0].pixels)
    middle, centre = round(choice.centre[0] * width), round(choice.centre[1] * height)
    columns, rows = (slice(0, middle), slice(middle, width)), (slice(0, centre), slice(centre, height))
    canvas = np.empty((height, width, 3), np.uint8)
    boxes, labels = [], []
    quarters = [(row, column) for row in rows for column in columns]
    for image, (row, column), place in zip(images, quarters, choice.places, strict=True):
        quarter = canvas[row, column]
        if quarter.size:  # an image of one pixel has no four quarters
            inside, kept = _cover(quarter, image, place)
            boxes.append(inside + np.tile([column.start, row.start], 2))
            labels.append(image.labels[kept])
    return Labelled(canvas, np.concatenate(boxes), np.concatenate(labels))


def _cover(
    quarter: Pixels, image: Labelled, place: tuple[float, float]
) -> tuple[Boxes, npt.NDArray[np.bool_]]:
    before, inside = size_of(image.pixels), size_of(quarter)
    factor = max(inside[0] / before[0], inside[1] / before[1])
    size = max(inside[0], round(factor * before[0])), max(inside[1], round(factor * before[1]))
    left, top = (
        round(share * (whole - seen)) for share, whole, seen in zip(place, size, inside, strict=True)
    )
    quarter[...] = resize_pixels(image.pixels, size)[top : top + inside[1], left : left + inside[0]]
    return clamp(resize_boxes(image.boxes_xyxy, before, size) - np.tile([left, top], 2), inside)
