"""Colour jitter in uint8: brightness, contrast, saturation and hue, as torchvision defines them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from raydetr.shards.images import Pixels


@dataclass(frozen=True)
class ColorChange:
    """What was drawn: three factors, a shift of the hue, and the order of the four changes."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0  # of the color circle, -0.5 to 0.5
    order: tuple[int, ...] = (0, 1, 2, 3)

    @classmethod
    def draw(
        cls, rng: random.Random, brightness: float, contrast: float, saturation: float, hue: float
    ) -> ColorChange:
        """Factors within these relative changes, not below 0; a shift within `hue` either way."""
        limits = (brightness, contrast, saturation)
        first, second, third = (rng.uniform(max(0.0, 1 - limit), 1 + limit) for limit in limits)
        return cls(first, second, third, rng.uniform(-hue, hue), tuple(rng.sample(range(4), 4)))


def change_colors(pixels: Pixels, change: ColorChange) -> Pixels:
    """Apply the four changes in their order; the image that is given stays as it is.

    Source: torchvision's ColorJitter on Pillow images: a blend with black, with the mean grey of the image,
    with the grey of each pixel, and a shift of H in HSV.
    """
    image = Image.fromarray(pixels)
    for number in change.order:
        if number == 0 and change.brightness != 1:
            image = ImageEnhance.Brightness(image).enhance(change.brightness)
        elif number == 1 and change.contrast != 1:
            image = ImageEnhance.Contrast(image).enhance(change.contrast)
        elif number == 2 and change.saturation != 1:
            image = ImageEnhance.Color(image).enhance(change.saturation)
        elif number == 3 and change.hue:
            image = _shift_hue(image, round(change.hue * 256))
    return np.array(image)


def _shift_hue(image: Image.Image, shift: int) -> Image.Image:
    hue, *rest = image.convert("HSV").split()
    turned = hue.point([(level + shift) % 256 for level in range(256)])  # 256 levels are the whole circle
    return Image.merge("HSV", [turned, *rest]).convert("RGB")
