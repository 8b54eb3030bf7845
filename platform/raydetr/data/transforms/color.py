"""Jitter colors in uint8: brightness, contrast, saturation and hue, as torchvision defines them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from raydetr.shards.images import Pixels

BLENDS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True)
class ColorJitter:
    """Drawn parameters: three factors, a shift of the hue, and the order of the four changes."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0  # fraction of the color circle, -0.5 to 0.5
    order: tuple[int, ...] = (0, 1, 2, 3)

    @classmethod
    def draw(
        cls, rng: random.Random, brightness: float, contrast: float, saturation: float, hue: float
    ) -> ColorJitter:
        """Draw each factor from 1 - limit to 1 + limit, at least 0, and the shift from -hue to hue."""
        limits = (brightness, contrast, saturation)
        first, second, third = (rng.uniform(max(0.0, 1 - limit), 1 + limit) for limit in limits)
        return cls(first, second, third, rng.uniform(-hue, hue), tuple(rng.sample(range(4), 4)))


def jitter_colors(pixels: Pixels, params: ColorJitter) -> Pixels:
    """Return a copy of the image with the four changes applied in their order.

    Source: torchvision's ColorJitter on Pillow images: a blend with black, with the mean gray of the image,
    with the gray of each pixel, and a shift of H in HSV.
    """
    image = Image.fromarray(pixels)
    factors = (params.brightness, params.contrast, params.saturation)
    for number in params.order:
        if number < 3 and factors[number] != 1:
            image = BLENDS[number](image).enhance(factors[number])
        elif number == 3 and params.hue:
            image = _shift_hue(image, round(params.hue * 256))
    return np.array(image)


def _shift_hue(image: Image.Image, shift: int) -> Image.Image:
    hue, *rest = image.convert("HSV").split()
    shifted = hue.point([(level + shift) % 256 for level in range(256)])  # Pillow's hue has 256 levels
    return Image.merge("HSV", [shifted, *rest]).convert("RGB")
