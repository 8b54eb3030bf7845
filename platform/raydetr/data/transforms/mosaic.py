"""Combine four images of the data set into one mosaic, of the size of the first."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydetr.data.transforms.geometry import Boxes, KeepMask, clamp_boxes, resize_boxes
from raydetr.data.transforms.pixels import resize_pixels, size_of
from raydetr.shards.images import Pixels

Labels = npt.NDArray[np.int64]  # [t]


@dataclass(frozen=True, eq=False)
class LabeledImage:
    """An image with its objects."""

    pixels: Pixels
    boxes_xyxy: Boxes  # [t, 4] in pixels
    labels: Labels  # [t]


@dataclass(frozen=True)
class Mosaic:
    """Drawn parameters of a mosaic."""

    partners: tuple[int, int, int]  # indices of the samples that are combined with the first image
    center: tuple[float, float]  # corner common to the four images, as a fraction of width and height
    # Per image, which part of it is visible: 0 left or top, 1 right or bottom
    offsets: tuple[tuple[float, float], ...]

    @classmethod
    def draw(cls, rng: random.Random, num_samples: int) -> Mosaic:
        """Draw any three images of the data set, and a center in the middle half of the image."""
        first, second, third = (rng.randrange(num_samples) for _ in range(3))
        center = rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.75)
        return cls((first, second, third), center, tuple((rng.random(), rng.random()) for _ in range(4)))


def make_mosaic(params: Mosaic, images: Sequence[LabeledImage]) -> LabeledImage:
    """Combine four images: top left, top right, bottom left, bottom right.

    Each is resized to cover its quarter and cropped to it. Boxes are clamped to the quarter and dropped without
    area. The result has the size, and so the aspect ratio, of the first image.
    Source: the idea of Bochkovskiy et al., YOLOv4 (arXiv:2004.10934), section 3.3.
    """
    width, height = size_of(images[0].pixels)
    x, y = round(params.center[0] * width), round(params.center[1] * height)
    columns, rows = (slice(0, x), slice(x, width)), (slice(0, y), slice(y, height))
    canvas = np.empty((height, width, 3), np.uint8)
    boxes, labels = [], []
    quarters = [(row, column) for row in rows for column in columns]
    for image, (row, column), offset in zip(images, quarters, params.offsets, strict=True):
        quarter = canvas[row, column]
        if quarter.size:  # quarters of an image of one pixel may be empty
            inside, kept = _cover(quarter, image, offset)
            boxes.append(inside + np.tile([column.start, row.start], 2))
            labels.append(image.labels[kept])
    return LabeledImage(canvas, np.concatenate(boxes), np.concatenate(labels))


def _cover(quarter: Pixels, image: LabeledImage, offset: tuple[float, float]) -> tuple[Boxes, KeepMask]:
    before, inside = size_of(image.pixels), size_of(quarter)
    factor = max(inside[0] / before[0], inside[1] / before[1])
    size = max(inside[0], round(factor * before[0])), max(inside[1], round(factor * before[1]))
    left, top = (
        round(fraction * (full - visible))
        for fraction, full, visible in zip(offset, size, inside, strict=True)
    )
    quarter[...] = resize_pixels(image.pixels, size)[top : top + inside[1], left : left + inside[0]]
    return clamp_boxes(resize_boxes(image.boxes_xyxy, before, size) - np.tile([left, top], 2), inside)
