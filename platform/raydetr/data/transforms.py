"""What happens to an image and its boxes before they are batched: flip and resize, as in the DETR code.

Randomness is keyed by (seed, position), so it depends neither on ranks nor on workers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Boxes = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Transform:
    """Flip an image by chance, then resize it to a short side that is drawn for it.

    `short_sides`: pixels; one is drawn per image; empty: the size is kept.
    `max_side`: pixels; the long side is limited to it when `short_sides` is given.
    `horizontal_flip`: probability.
    """

    short_sides: tuple[int, ...] = ()
    max_side: int = 1333
    horizontal_flip: float = 0.0

    def __call__(
        self, image: Image.Image, boxes_xyxy: Boxes, *, seed: int, position: int
    ) -> tuple[Image.Image, Boxes]:
        """Transform an image and its boxes [t, 4] in pixels."""
        flip, short_side = self.draw(seed, position)
        if flip:
            image, boxes_xyxy = flip_horizontally(image, boxes_xyxy)
        if short_side is not None:
            image, boxes_xyxy = resize(
                image, boxes_xyxy, resized_size(*image.size, short_side, self.max_side)
            )
        return image, boxes_xyxy

    def draw(self, seed: int, position: int) -> tuple[bool, int | None]:
        """Whether the sample at `position` is flipped, and its short side (None: the size is kept)."""
        if self.horizontal_flip in (0.0, 1.0) and len(self.short_sides) <= 1:
            return self.horizontal_flip == 1.0, next(iter(self.short_sides), None)
        rng = random.Random(seed << 64 | position)
        flip = rng.random() < self.horizontal_flip
        chosen = int(rng.random() * len(self.short_sides))
        return flip, self.short_sides[chosen] if self.short_sides else None


def resized_size(width: int, height: int, short_side: int, max_side: int) -> tuple[int, int]:
    """The (width, height) after a resize that keeps the aspect ratio.

    The short side becomes `short_side`, or what makes the long side about `max_side` where it would exceed
    that. Source: the rounding of the official DETR code: the limited short side is rounded first, so the
    long side of a narrow image may exceed `max_side`. Sides are at least 1, where the official code fails.
    """
    short, long = min(width, height), max(width, height)
    if long / short * short_side > max_side:
        short_side = max(1, round(max_side * short / long))
    if short == short_side:
        return width, height
    if width < height:
        return short_side, max(1, int(short_side * height / width))
    return max(1, int(short_side * width / height)), short_side


def resize(image: Image.Image, boxes_xyxy: Boxes, size: tuple[int, int]) -> tuple[Image.Image, Boxes]:
    """Resize (bilinear, antialiased) to `size` = (width, height)."""
    if size == image.size:
        return image, boxes_xyxy
    ratios = np.divide(size, image.size)
    return image.resize(size, Image.Resampling.BILINEAR), boxes_xyxy * np.tile(ratios, 2)


def flip_horizontally(image: Image.Image, boxes_xyxy: Boxes) -> tuple[Image.Image, Boxes]:
    """Mirror left and right: x becomes width - x."""
    flipped = boxes_xyxy.copy()
    flipped[:, [0, 2]] = image.width - boxes_xyxy[:, [2, 0]]
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flipped
