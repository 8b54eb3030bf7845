"""Flip, resize and crop an image with its boxes, as in the DETR code; large-scale jitter."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydetr.data.transforms.pixels import Size, mirror, resize_pixels, size_of
from raydetr.shards.images import Pixels

Boxes = npt.NDArray[np.float64]  # [t, 4], xyxy in pixels
Kept = npt.NDArray[np.bool_]  # [t]


@dataclass(frozen=True)
class Crop:
    """A window that is cut out of an image; pixels of the image after its resize to `short_side`."""

    short_side: int | None  # None: the image keeps its size before it is cropped
    left: int
    top: int
    width: int
    height: int


def resized_size(width: int, height: int, short_side: int, max_side: int | None) -> Size:
    """The (width, height) after a resize that keeps the aspect ratio.

    The short side becomes `short_side`, or what makes the long side about `max_side` where it would exceed
    that. Source: the rounding of the official DETR code: the limited short side is rounded first, so the
    long side of a narrow image may exceed `max_side`. Sides are at least 1, where the official code fails.
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
    """The (width, height) out of which a window is cut."""
    return size if short_side is None else resized_size(*size, short_side, max_side=None)


def resize(pixels: Pixels, boxes_xyxy: Boxes, size: Size) -> tuple[Pixels, Boxes]:
    """Resize (bilinear, antialiased) to `size` = (width, height)."""
    if size == size_of(pixels):
        return pixels, boxes_xyxy
    return resize_pixels(pixels, size), resize_boxes(boxes_xyxy, size_of(pixels), size)


def resize_boxes(boxes_xyxy: Boxes, before: Size, after: Size) -> Boxes:
    """The boxes of an image that was resized from one (width, height) to another."""
    return boxes_xyxy if before == after else boxes_xyxy * np.tile(np.divide(after, before), 2)


def flip_horizontally(pixels: Pixels, boxes_xyxy: Boxes) -> tuple[Pixels, Boxes]:
    """Mirror left and right: x becomes width - x."""
    flipped = boxes_xyxy.copy()
    flipped[:, [0, 2]] = pixels.shape[1] - boxes_xyxy[:, [2, 0]]
    return mirror(pixels), flipped


def crop(pixels: Pixels, boxes_xyxy: Boxes, window: Crop) -> tuple[Pixels, Boxes, Kept]:
    """Cut a window out, without a copy: boxes are clamped to it, those without area left out."""
    right, bottom = window.left + window.width, window.top + window.height
    assert min(window.left, window.top) >= 0, window
    assert right <= pixels.shape[1], (window, pixels.shape)
    assert bottom <= pixels.shape[0], (window, pixels.shape)
    shifted = boxes_xyxy - np.tile([window.left, window.top], 2)
    boxes, kept = clamp(shifted, (window.width, window.height))
    return pixels[window.top : bottom, window.left : right], boxes, kept


def clamp(boxes_xyxy: Boxes, size: Size) -> tuple[Boxes, Kept]:
    """What of the boxes lies in an image of `size`; those of which something does, and which these are."""
    clamped: Boxes = boxes_xyxy.clip(0, np.tile(size, 2))
    kept: Kept = np.all(clamped[:, 2:] > clamped[:, :2], axis=1)
    return clamped[kept], kept


GREY = (124, 116, 104)  # ImageNet's mean color, about 0 after the normalisation


@dataclass(frozen=True)
class Jitter:
    """The image is resized to `size`, and of that the square shows what is right of and below (left, top)."""

    side: int  # of the square, in pixels
    size: Size
    left: int
    top: int

    @classmethod
    def draw(cls, rng: random.Random, size: Size, side: int, scale: float) -> Jitter:
        """An image of `size` is made to fit a square of `scale` times `side`; its window is drawn."""
        factor = scale * side / max(size)
        width, height = (max(1, round(factor * length)) for length in size)
        left, top = rng.randint(0, max(0, width - side)), rng.randint(0, max(0, height - side))
        return cls(side, (width, height), left, top)


def jitter(pixels: Pixels, boxes_xyxy: Boxes, choice: Jitter) -> tuple[Pixels, Boxes, Kept]:
    """Resize, then cut out a square, or fill it up with grey at the right and at the bottom.

    Boxes are clamped to the square, and those of which nothing is left are left out; says which are kept.
    Source: Ghiasi et al., "Simple Copy-Paste" (CVPR 2021, arXiv:2012.07177), section 3: scales 0.1 to 2.0.
    """
    side, (width, height) = choice.side, choice.size
    boxes = resize_boxes(boxes_xyxy, size_of(pixels), choice.size) - np.tile([choice.left, choice.top], 2)
    seen = min(width - choice.left, side), min(height - choice.top, side)
    square = np.empty((side, side, 3), np.uint8)
    resized = resize_pixels(pixels, choice.size)
    square[: seen[1], : seen[0]] = resized[
        choice.top : choice.top + seen[1], choice.left : choice.left + seen[0]
    ]
    square[seen[1] :] = GREY
    square[:, seen[0] :] = GREY
    return square, *clamp(boxes, seen)
