"""Large-scale jitter: an image much smaller or larger than usual in a square of a fixed size."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from raydetr.data.transforms.geometry import Boxes, Kept, clamp, resize_boxes
from raydetr.data.transforms.pixels import Pixels, Size, resize_pixels, size_of

GREY = (124, 116, 104)  # ImageNet's mean colour, about 0 after the normalisation


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
