"""What happens to an image and its boxes before they are batched: flip, crop, resize, as in the DETR code.

Randomness is keyed by (seed, position), so it depends neither on ranks nor on workers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

Boxes = npt.NDArray[np.float64]
Kept = npt.NDArray[np.bool_]
ScalePer = Literal["image", "step"]


@dataclass(frozen=True)
class Crop:
    """A window that is cut out of an image; pixels of the image after its resize to `short_side`."""

    short_side: int | None  # None: the image keeps its size before it is cropped
    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Choices:
    """What was drawn for one image."""

    flip: bool
    crop: Crop | None
    short_side: int | None  # None: the size is kept


@dataclass(frozen=True)
class Transform:
    """Flip an image by chance, crop it by chance, then resize it to a short side that is drawn for it.

    The official training of all five papers flips half of the images and crops half of them: those are
    resized to a short side of 400, 500 or 600 and lose all but a window of 384 to 600 pixels a side.

    `short_sides`: pixels; one is drawn for each image or step (`scale_per`); empty: the size is kept.
    `scale_per`: "image", as the official code does, or "step": one for all images of a global batch, so that
        images of one aspect ratio have one size and hardly any padding.
    `max_side`: pixels; the long side is limited to it when `short_sides` is given.
    `horizontal_flip`, `crop_probability`: probabilities.
    `crop_short_sides`: pixels; one is drawn for the resize before a crop; empty: no such resize.
    `crop_min_side`, `crop_max_side`: pixels; the sides of the window are drawn between them.
    """

    short_sides: tuple[int, ...] = ()
    max_side: int = 1333
    horizontal_flip: float = 0.0
    crop_probability: float = 0.0
    crop_short_sides: tuple[int, ...] = ()
    crop_min_side: int = 384
    crop_max_side: int = 600
    scale_per: ScalePer = "image"

    def __call__(
        self,
        image: Image.Image,
        boxes_xyxy: Boxes,
        *,
        seed: int,
        position: int,
        short_side: int | None = None,
    ) -> tuple[Image.Image, Boxes, Kept]:
        """Transform an image and its boxes [t, 4] in pixels; says which boxes are left, as [t] of bool.

        `short_side` is that of the step (`step_short_side`); None: one is drawn for this image.
        """
        return self.apply(image, boxes_xyxy, self.draw(seed, position, image.size, short_side))

    def step_short_side(self, seed: int, start: int) -> int | None:
        """The short side of all images of the global batch whose first sample is at position `start`.

        It depends on nothing else, so all ranks find the same one. None: each image has its own.
        """
        if self.scale_per == "image":
            return None
        return _choose(random.Random(f"short side, seed {seed}, start {start}"), self.short_sides)

    def draw(self, seed: int, position: int, size: tuple[int, int], short_side: int | None = None) -> Choices:
        """The choices for the sample at `position`, an image of `size` = (width, height)."""
        if self.horizontal_flip in (0.0, 1.0) and len(self.short_sides) <= 1 and not self.crop_probability:
            return Choices(self.horizontal_flip == 1.0, None, next(iter(self.short_sides), None))
        rng = random.Random(seed << 64 | position)
        flip = rng.random() < self.horizontal_flip
        is_cropped = self.crop_probability > 0 and rng.random() < self.crop_probability
        crop = self._draw_crop(rng, size) if is_cropped else None
        own = _choose(rng, self.short_sides)
        return Choices(flip, crop, own if short_side is None else short_side)

    def apply(
        self, image: Image.Image, boxes_xyxy: Boxes, choices: Choices
    ) -> tuple[Image.Image, Boxes, Kept]:
        """Transform as chosen; boxes of which nothing is left in the crop are left out."""
        kept = np.ones(len(boxes_xyxy), np.bool_)
        if choices.flip:
            image, boxes_xyxy = flip_horizontally(image, boxes_xyxy)
        if choices.crop is not None:
            before = _size_before_crop(image.size, choices.crop.short_side)
            image, boxes_xyxy = resize(image, boxes_xyxy, before)
            image, boxes_xyxy, kept = crop(image, boxes_xyxy, choices.crop)
        if choices.short_side is not None:
            size = resized_size(*image.size, choices.short_side, self.max_side)
            image, boxes_xyxy = resize(image, boxes_xyxy, size)
        return image, boxes_xyxy, kept

    def _draw_crop(self, rng: random.Random, size: tuple[int, int]) -> Crop:
        short_side = _choose(rng, self.crop_short_sides)
        inside = _size_before_crop(size, short_side)
        # an image with a side below the minimum keeps that side; the official resize makes none
        limits = [(min(self.crop_min_side, side), min(self.crop_max_side, side)) for side in inside]
        width, height = (rng.randint(low, high) for low, high in limits)
        top, left = rng.randint(0, inside[1] - height), rng.randint(0, inside[0] - width)
        return Crop(short_side, left, top, width, height)


def resized_size(width: int, height: int, short_side: int, max_side: int | None) -> tuple[int, int]:
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


def crop(image: Image.Image, boxes_xyxy: Boxes, window: Crop) -> tuple[Image.Image, Boxes, Kept]:
    """Cut a window out: boxes are clamped to it, and those without area left out; says which are kept."""
    right, bottom = window.left + window.width, window.top + window.height
    assert min(window.left, window.top) >= 0, window
    assert right <= image.width, (window, image.size)
    assert bottom <= image.height, (window, image.size)
    shifted = boxes_xyxy - np.tile([window.left, window.top], 2)
    clamped = shifted.clip(0, np.tile([window.width, window.height], 2))
    kept = (clamped[:, 2:] > clamped[:, :2]).all(axis=1)
    return image.crop((window.left, window.top, right, bottom)), clamped[kept], kept


def _size_before_crop(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    return size if short_side is None else resized_size(*size, short_side, max_side=None)


def _choose(rng: random.Random, values: tuple[int, ...]) -> int | None:
    drawn = rng.random()  # also where there is nothing to choose: what is drawn next does not depend on it
    return values[int(drawn * len(values))] if values else None
