"""What happens to an image and its boxes before they are batched: the official augmentation, and others.

Randomness is keyed by (seed, position), so it depends neither on ranks nor on workers.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from raydetr.config import TransformConfig
from raydetr.data.transforms.color import ColorChange, change_colors
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
from raydetr.data.transforms.pixels import Resized, Size, size_of
from raydetr.shards.images import Pixels


@dataclass(frozen=True)
class Choices:
    """What was drawn for one image."""

    flip: bool
    crop: Crop | None
    short_side: int | None  # None: the size is kept
    colors: ColorChange | None = None
    jitter: Jitter | None = None


@dataclass(frozen=True)
class Transform:
    """Combine images to mosaics, change colors, flip, crop and resize, as a configuration section says."""

    config: TransformConfig

    def __call__(
        self, pixels: Pixels, boxes_xyxy: Boxes, *, seed: int, position: int, short_side: int | None = None
    ) -> tuple[Resized, Boxes, Kept]:
        """Transform an image and its boxes [t, 4] in pixels; return also which boxes are left, as [t] of bool.

        `short_side` is that of the step (`step_short_side`); None: one is drawn for this image. The image is resized
        when its pixels are asked for.
        """
        return self.apply(pixels, boxes_xyxy, self.draw(seed, position, size_of(pixels), short_side))

    def step_short_side(self, seed: int, start: int) -> int | None:
        """Return the short side of all images of the global batch whose first sample is at position `start`.

        It depends on nothing else, so all ranks draw the same one. None: each image has its own.
        """
        if self.config.scale_per == "image":
            return None
        return _choose(random.Random(f"short side, seed {seed}, start {start}"), self.config.short_sides)

    def mosaic(self, seed: int, position: int, index: int, num_samples: int) -> Mosaic | None:
        """Draw the mosaic of image `index` at `position`; None: the image stays as it is.

        Partners are any of the data set's `num_samples` images. They differ for another image at the same position,
        so that a substitute for a corrupt sample does not need the sample that was corrupt.
        """
        probability = self.config.mosaic_probability
        if not probability:
            return None
        rng = random.Random(f"mosaic, seed {seed}, position {position}, image {index}")
        return Mosaic.draw(rng, num_samples) if rng.random() < probability else None

    def draw(self, seed: int, position: int, size: Size, short_side: int | None = None) -> Choices:
        """Draw the random choices for the sample at `position`, an image of `size` = (width, height)."""
        config, colors = self.config, self._draw_colors(seed, position)
        rng = random.Random(seed << 64 | position)
        if config.lsj_size is not None:
            flip = rng.random() < config.horizontal_flip
            scale = rng.uniform(config.lsj_min_scale, config.lsj_max_scale)
            return Choices(flip, None, None, colors, Jitter.draw(rng, size, config.lsj_size, scale))
        flip = rng.random() < config.horizontal_flip
        is_cropped = config.crop_probability > 0 and rng.random() < config.crop_probability
        window = self._draw_crop(rng, size) if is_cropped else None
        own = _choose(rng, config.short_sides)
        return Choices(flip, window, own if short_side is None else short_side, colors)

    def apply(self, pixels: Pixels, boxes_xyxy: Boxes, choices: Choices) -> tuple[Resized, Boxes, Kept]:
        """Transform as chosen; boxes of which nothing is left are dropped."""
        kept = np.ones(len(boxes_xyxy), np.bool_)
        if choices.colors is not None:
            pixels = change_colors(pixels, choices.colors)
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
        size = resized_size(*size_of(pixels), choices.short_side, self.config.max_side)
        return Resized(pixels, size), resize_boxes(boxes_xyxy, size_of(pixels), size), kept

    def _draw_crop(self, rng: random.Random, size: Size) -> Crop:
        config = self.config
        short_side = _choose(rng, config.crop_short_sides)
        inside = size_before_crop(size, short_side)
        # An image with a side below the minimum keeps that side; the official resize makes none
        limits = [(min(config.crop_min_side, side), min(config.crop_max_side, side)) for side in inside]
        width, height = (rng.randint(low, high) for low, high in limits)
        if config.scale_per == "step":  # the same area in the image's aspect ratio
            ratio = math.sqrt(width * height / (inside[0] * inside[1]))
            width, height = (max(1, round(ratio * side)) for side in inside)
        top, left = rng.randint(0, inside[1] - height), rng.randint(0, inside[0] - width)
        return Crop(short_side, left, top, width, height)

    def _draw_colors(self, seed: int, position: int) -> ColorChange | None:
        limits = (self.config.brightness, self.config.contrast, self.config.saturation, self.config.hue)
        if not any(limits):
            return None
        return ColorChange.draw(random.Random(f"colours, seed {seed}, position {position}"), *limits)


def _choose(rng: random.Random, values: tuple[int, ...]) -> int | None:
    drawn = rng.random()  # also without values to choose from: later draws must not depend on them
    return values[int(drawn * len(values))] if values else None
