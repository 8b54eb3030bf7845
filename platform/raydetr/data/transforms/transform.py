"""What happens to an image and its boxes before they are batched: the official augmentation, and others.

Randomness is keyed by (seed, position), so it depends neither on ranks nor on workers.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raydetr.data.transforms.color import ColourChange, change_colours
from raydetr.data.transforms.geometry import (
    Boxes,
    Crop,
    Jitter,
    Kept,
    crop,
    flip_horizontally,
    jitter,
    resize,
    resize_boxes,
    resized_size,
    size_before_crop,
)
from raydetr.data.transforms.mosaic import Mosaic
from raydetr.data.transforms.pixels import Pixels, Resized, Size, size_of

ScalePer = Literal["image", "step"]


@dataclass(frozen=True)
class Choices:
    """What was drawn for one image."""

    flip: bool
    crop: Crop | None
    short_side: int | None  # None: the size is kept
    colours: ColourChange | None = None
    jitter: Jitter | None = None


@dataclass(frozen=True)
class Transform:
    """Put four images together by chance, change colours, flip, crop and resize.

    The official training of all five papers flips half of the images and crops half of them: those are
    resized to a short side of 400, 500 or 600 and lose all but a window of 384 to 600 pixels a side.

    `short_sides`: pixels; one is drawn for each image or step (`scale_per`); empty: the size is kept.
    `scale_per`: "image", as the official code does, or "step": one for all images of a global batch, and a
        crop keeps the image's aspect ratio. Images of one aspect ratio then have one size and no padding.
    `max_side`: pixels; the long side is limited to it when `short_sides` is given.
    `horizontal_flip`, `crop_probability`, `mosaic_probability`: probabilities.
    `crop_short_sides`: pixels; one is drawn for the resize before a crop; empty: no such resize.
    `crop_min_side`, `crop_max_side`: pixels; the sides of the window are drawn between them.
    `jitter_side`: pixels; the side of the square that large-scale jitter makes; None: no such jitter.
    `jitter_min_scale`, `jitter_max_scale`: the image is scaled to fit a square of `jitter_side` times a number
        drawn between them.
    `brightness`, `contrast`, `saturation`: the largest relative change; a factor is drawn from 1 - x to 1 + x.
    `hue`: the largest shift either way, as a share of the colour circle.
    """

    short_sides: tuple[int, ...] = ()
    max_side: int = 1333
    horizontal_flip: float = 0.0
    crop_probability: float = 0.0
    crop_short_sides: tuple[int, ...] = ()
    crop_min_side: int = 384
    crop_max_side: int = 600
    scale_per: ScalePer = "image"
    jitter_side: int | None = None
    jitter_min_scale: float = 0.1
    jitter_max_scale: float = 2.0
    mosaic_probability: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(
        self, pixels: Pixels, boxes_xyxy: Boxes, *, seed: int, position: int, short_side: int | None = None
    ) -> tuple[Resized, Boxes, Kept]:
        """Transform an image and its boxes [t, 4] in pixels; says which boxes are left, as [t] of bool.

        `short_side` is that of the step (`step_short_side`); None: one is drawn for this image. The image is
        resized when its pixels are asked for.
        """
        return self.apply(pixels, boxes_xyxy, self.draw(seed, position, size_of(pixels), short_side))

    def step_short_side(self, seed: int, start: int) -> int | None:
        """The short side of all images of the global batch whose first sample is at position `start`.

        It depends on nothing else, so all ranks find the same one. None: each image has its own.
        """
        if self.scale_per == "image":
            return None
        return _choose(random.Random(f"short side, seed {seed}, start {start}"), self.short_sides)

    def mosaic(self, seed: int, position: int, index: int, num_samples: int) -> Mosaic | None:
        """What is put together with image `index` at `position`, and how; None: nothing.

        Any of the data set's `num_samples` images may be. They are others for another image at the position, so
        that a substitute for a damaged one does without what was damaged.
        """
        if not self.mosaic_probability:
            return None
        rng = random.Random(f"mosaic, seed {seed}, position {position}, image {index}")
        return Mosaic.draw(rng, num_samples) if rng.random() < self.mosaic_probability else None

    def draw(self, seed: int, position: int, size: Size, short_side: int | None = None) -> Choices:
        """The choices for the sample at `position`, an image of `size` = (width, height)."""
        colours = self._draw_colours(seed, position)
        if self.jitter_side is not None:
            rng = random.Random(seed << 64 | position)
            flip = rng.random() < self.horizontal_flip
            scale = rng.uniform(self.jitter_min_scale, self.jitter_max_scale)
            return Choices(flip, None, None, colours, Jitter.draw(rng, size, self.jitter_side, scale))
        if self.horizontal_flip in (0.0, 1.0) and len(self.short_sides) <= 1 and not self.crop_probability:
            return Choices(self.horizontal_flip == 1.0, None, next(iter(self.short_sides), None), colours)
        rng = random.Random(seed << 64 | position)
        flip = rng.random() < self.horizontal_flip
        is_cropped = self.crop_probability > 0 and rng.random() < self.crop_probability
        window = self._draw_crop(rng, size) if is_cropped else None
        own = _choose(rng, self.short_sides)
        return Choices(flip, window, own if short_side is None else short_side, colours)

    def apply(self, pixels: Pixels, boxes_xyxy: Boxes, choices: Choices) -> tuple[Resized, Boxes, Kept]:
        """Transform as chosen; boxes of which nothing is left in the crop are left out."""
        kept = np.ones(len(boxes_xyxy), np.bool_)
        if choices.colours is not None:
            pixels = change_colours(pixels, choices.colours)
        if choices.flip:
            pixels, boxes_xyxy = flip_horizontally(pixels, boxes_xyxy)
        if choices.jitter is not None:
            pixels, boxes_xyxy, kept = jitter(pixels, boxes_xyxy, choices.jitter)
        if choices.crop is not None:
            before = size_before_crop(size_of(pixels), choices.crop.short_side)
            pixels, boxes_xyxy = resize(pixels, boxes_xyxy, before)
            pixels, boxes_xyxy, kept = crop(pixels, boxes_xyxy, choices.crop)
        if choices.short_side is None:
            return Resized.whole(pixels), boxes_xyxy, kept
        size = resized_size(*size_of(pixels), choices.short_side, self.max_side)
        return Resized(pixels, size), resize_boxes(boxes_xyxy, size_of(pixels), size), kept

    def _draw_crop(self, rng: random.Random, size: Size) -> Crop:
        short_side = _choose(rng, self.crop_short_sides)
        inside = size_before_crop(size, short_side)
        # an image with a side below the minimum keeps that side; the official resize makes none
        limits = [(min(self.crop_min_side, side), min(self.crop_max_side, side)) for side in inside]
        width, height = (rng.randint(low, high) for low, high in limits)
        if self.scale_per == "step":  # the same area in the image's aspect ratio
            share = math.sqrt(width * height / (inside[0] * inside[1]))
            width, height = (max(1, round(share * side)) for side in inside)
        top, left = rng.randint(0, inside[1] - height), rng.randint(0, inside[0] - width)
        return Crop(short_side, left, top, width, height)

    def _draw_colours(self, seed: int, position: int) -> ColourChange | None:
        limits = (self.brightness, self.contrast, self.saturation, self.hue)
        if not any(limits):
            return None
        return ColourChange.draw(random.Random(f"colours, seed {seed}, position {position}"), *limits)


def _choose(rng: random.Random, values: tuple[int, ...]) -> int | None:
    drawn = rng.random()  # also where there is nothing to choose: what is drawn next does not depend on it
    return values[int(drawn * len(values))] if values else None
