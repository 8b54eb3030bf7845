"""Augment and resize an image and its boxes: the official augmentation of DETR, and others.

Randomness is keyed by (seed, position), so it depends on neither ranks nor workers.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from raydetr.config import TransformConfig
from raydetr.data.transforms import geometry
from raydetr.data.transforms.color import ColorJitter, jitter_colors
from raydetr.data.transforms.geometry import Boxes, Crop, KeepMask, LargeScaleJitter
from raydetr.data.transforms.mosaic import Mosaic
from raydetr.data.transforms.pixels import LazyImage, Size, size_of
from raydetr.shards.images import Pixels


@dataclass(frozen=True)
class TransformParams:
    """Drawn parameters of the transform of one image."""

    flip: bool
    crop: Crop | None
    short_side: int | None  # None: the size is kept
    colors: ColorJitter | None = None
    jitter: LargeScaleJitter | None = None


@dataclass(frozen=True)
class Transform:
    """Combine images to mosaics, jitter colors, flip, crop and resize, as a configuration section defines it."""

    config: TransformConfig

    def __call__(
        self, pixels: Pixels, boxes_xyxy: Boxes, *, seed: int, position: int, short_side: int | None = None
    ) -> tuple[LazyImage, Boxes, KeepMask]:
        """Transform an image and its boxes [t, 4] in pixels; return also the mask [t] of the boxes kept.

        `short_side` is that of the step (`step_short_side`); None: one is drawn for this image. The last resize is
        deferred until the pixels are needed.
        """
        return self.apply(pixels, boxes_xyxy, self.draw(seed, position, size_of(pixels), short_side))

    def step_short_side(self, seed: int, start: int) -> int | None:
        """Return the short side of all images of the global batch whose first sample is at position `start`.

        It depends on nothing else, so all ranks draw the same one. None: each image draws its own.
        """
        if self.config.scale_per == "image":
            return None
        return _choose(random.Random(f"short side, seed {seed}, start {start}"), self.config.short_sides)

    def mosaic(self, seed: int, position: int, index: int, num_samples: int) -> Mosaic | None:
        """Draw the mosaic of image `index` at `position`; None: the image remains unchanged.

        Partners are any of the data set's `num_samples` images. They differ for another image at the same position,
        so that a substitute does not need the corrupt sample again.
        """
        probability = self.config.mosaic_probability
        if not probability:
            return None
        rng = random.Random(f"mosaic, seed {seed}, position {position}, image {index}")
        return Mosaic.draw(rng, num_samples) if rng.random() < probability else None

    def draw(self, seed: int, position: int, size: Size, short_side: int | None = None) -> TransformParams:
        """Draw the parameters for the sample at `position`, an image of `size` = (width, height)."""
        config, colors = self.config, self._draw_colors(seed, position)
        rng = random.Random(seed << 64 | position)
        flip = rng.random() < config.horizontal_flip
        if config.lsj_size is not None:
            scale = rng.uniform(config.lsj_min_scale, config.lsj_max_scale)
            jitter = LargeScaleJitter.draw(rng, size, config.lsj_size, scale)
            return TransformParams(flip, None, None, colors, jitter)
        is_cropped = config.crop_probability > 0 and rng.random() < config.crop_probability
        window = self._draw_crop(rng, size) if is_cropped else None
        own = _choose(rng, config.short_sides)
        return TransformParams(flip, window, own if short_side is None else short_side, colors)

    def apply(
        self, pixels: Pixels, boxes_xyxy: Boxes, params: TransformParams
    ) -> tuple[LazyImage, Boxes, KeepMask]:
        """Apply drawn parameters; boxes without area inside the result are dropped."""
        kept = np.ones(len(boxes_xyxy), np.bool_)
        if params.colors is not None:
            pixels = jitter_colors(pixels, params.colors)
        if params.flip:
            pixels, boxes_xyxy = geometry.flip_horizontally(pixels, boxes_xyxy)
        if params.jitter is not None:
            pixels, boxes_xyxy, kept = geometry.large_scale_jitter(pixels, boxes_xyxy, params.jitter)
        if params.crop is not None:
            before = geometry.size_before_crop(size_of(pixels), params.crop.short_side)
            pixels, boxes_xyxy = geometry.resize(pixels, boxes_xyxy, before)
            pixels, boxes_xyxy, kept = geometry.crop(pixels, boxes_xyxy, params.crop)
        if params.short_side is None:
            return LazyImage.unresized(pixels), boxes_xyxy, kept
        size = geometry.resized_size(*size_of(pixels), params.short_side, self.config.max_side)
        return LazyImage(pixels, size), geometry.resize_boxes(boxes_xyxy, size_of(pixels), size), kept

    def _draw_crop(self, rng: random.Random, size: Size) -> Crop:
        config = self.config
        short_side = _choose(rng, config.crop_short_sides)
        inside = geometry.size_before_crop(size, short_side)
        # A side below the minimum is kept uncropped; after the official resizes there is none
        limits = [(min(config.crop_min_side, side), min(config.crop_max_side, side)) for side in inside]
        width, height = (rng.randint(low, high) for low, high in limits)
        if config.scale_per == "step":  # keep the area, in the image's aspect ratio
            ratio = math.sqrt(width * height / (inside[0] * inside[1]))
            width, height = (max(1, round(ratio * side)) for side in inside)
        top, left = rng.randint(0, inside[1] - height), rng.randint(0, inside[0] - width)
        return Crop(short_side, left, top, width, height)

    def _draw_colors(self, seed: int, position: int) -> ColorJitter | None:
        limits = (self.config.brightness, self.config.contrast, self.config.saturation, self.config.hue)
        if not any(limits):
            return None
        return ColorJitter.draw(random.Random(f"color, seed {seed}, position {position}"), *limits)


def _choose(rng: random.Random, values: tuple[int, ...]) -> int | None:
    drawn = rng.random()  # drawn even without values, so that later draws do not depend on them
    return values[int(drawn * len(values))] if values else None
