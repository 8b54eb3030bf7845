"""Flip, resize and crop an image with its boxes, as the official DETR code does, and apply large-scale jitter."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydetr.data.transforms.pixels import Size, mirror, resize_pixels, size_of
from raydetr.shards.images import Pixels

Boxes = npt.NDArray[np.float64]  # [t, 4], xyxy in pixels
KeepMask = npt.NDArray[np.bool_]  # [t], True for boxes that remain

GRAY = (124, 116, 104)  # ImageNet's mean color, about 0 after the normalization


@dataclass(frozen=True)
class Crop:
    """A crop window, in pixels of the image after its resize to `short_side`."""

    short_side: int | None  # None: the image keeps its size before it is cropped
    left: int
    top: int
    width: int
    height: int


def resized_size(width: int, height: int, short_side: int, max_side: int | None) -> Size:
    """Return the (width, height) after a resize that keeps the aspect ratio.

    The short side becomes `short_side`, or less where the long side would exceed `max_side`.
    Source: the official DETR code. It rounds the limited short side first, so the long side of a narrow image
    may exceed `max_side`. Sides are at least 1 here; the official code fails on such images.
    """
    short, long = min(width, height), max(width, height)
    if max_side is not None and long / short * short_side > max_side:
        short_side = max(1, round(max_side * short / long))
    if short == short_side:
        return width, height
    if width < height:
        return short_side, max(1, int(short_side * height / width))
    return max(1, int(short_side * width / height)), short_side


def size_before_crop(size: Size, short_side: int | None) -> Size:
    """Return the (width, height) of the image that a window is cropped from."""
    return size if short_side is None else resized_size(*size, short_side, max_side=None)


def resize(pixels: Pixels, boxes_xyxy: Boxes, size: Size) -> tuple[Pixels, Boxes]:
    """Resize (bilinear, antialiased) to `size` = (width, height)."""
    return resize_pixels(pixels, size), resize_boxes(boxes_xyxy, size_of(pixels), size)


def resize_boxes(boxes_xyxy: Boxes, before: Size, after: Size) -> Boxes:
    """Scale the boxes of an image that is resized from (width, height) `before` to `after`."""
    return boxes_xyxy if before == after else boxes_xyxy * np.tile(np.divide(after, before), 2)


def flip_horizontally(pixels: Pixels, boxes_xyxy: Boxes) -> tuple[Pixels, Boxes]:
    """Mirror image and boxes: x becomes width - x."""
    flipped = boxes_xyxy.copy()
    flipped[:, [0, 2]] = pixels.shape[1] - boxes_xyxy[:, [2, 0]]
    return mirror(pixels), flipped


def crop(pixels: Pixels, boxes_xyxy: Boxes, window: Crop) -> tuple[Pixels, Boxes, KeepMask]:
    """Crop a window as a view of `pixels`, clamp the boxes to it and drop those without area."""
    right, bottom = window.left + window.width, window.top + window.height
    assert min(window.left, window.top) >= 0, window
    assert right <= pixels.shape[1], (window, pixels.shape)
    assert bottom <= pixels.shape[0], (window, pixels.shape)
    shifted = boxes_xyxy - np.tile([window.left, window.top], 2)
    boxes, kept = clamp_boxes(shifted, (window.width, window.height))
    return pixels[window.top : bottom, window.left : right], boxes, kept


def clamp_boxes(boxes_xyxy: Boxes, size: Size) -> tuple[Boxes, KeepMask]:
    """Clamp boxes to an image of `size` and drop those without area; return also the mask of those kept."""
    clamped: Boxes = boxes_xyxy.clip(0, np.tile(size, 2))
    kept: KeepMask = np.all(clamped[:, 2:] > clamped[:, :2], axis=1)
    return clamped[kept], kept


@dataclass(frozen=True)
class LargeScaleJitter:
    """Drawn parameters: the image is resized to `size`, and the square shows the window."""

    side: int  # of the square, in pixels
    size: Size
    window: Crop

    @classmethod
    def draw(cls, rng: random.Random, size: Size, side: int, scale: float) -> LargeScaleJitter:
        """Fit an image of `size` into a square of `scale` times `side`, and draw the window."""
        factor = scale * side / max(size)
        width, height = (max(1, round(factor * length)) for length in size)
        left, top = rng.randint(0, max(0, width - side)), rng.randint(0, max(0, height - side))
        window = Crop(None, left, top, min(width - left, side), min(height - top, side))
        return cls(side, (width, height), window)


def large_scale_jitter(
    pixels: Pixels, boxes_xyxy: Boxes, params: LargeScaleJitter
) -> tuple[Pixels, Boxes, KeepMask]:
    """Resize, then crop a square, or pad to it with gray at the right and at the bottom.

    Boxes are clamped to the square and dropped without area; the mask marks those kept.
    Source: Ghiasi et al., "Simple Copy-Paste" (CVPR 2021, arXiv:2012.07177), section 3: scales 0.1 to 2.0.
    """
    visible, boxes, kept = crop(*resize(pixels, boxes_xyxy, params.size), params.window)
    square = np.full((params.side, params.side, 3), GRAY, np.uint8)
    square[: params.window.height, : params.window.width] = visible
    return square, boxes, kept
