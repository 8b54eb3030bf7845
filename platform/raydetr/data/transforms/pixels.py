"""Arrays of RGB pixels, mirrored and resized in uint8: as Pillow does it, several times as fast."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate

from raydetr.shards.images import Pixels

Size = tuple[int, int]  # (width, height)


def size_of(pixels: Pixels) -> Size:
    """The (width, height) of an image."""
    return pixels.shape[1], pixels.shape[0]


def mirror(pixels: Pixels) -> Pixels:
    """Exchange left and right; writable `pixels`."""
    mirrored: Pixels = torch.from_numpy(pixels).flip(1).numpy()
    return mirrored


def resize_pixels(pixels: Pixels, size: Size) -> Pixels:
    """Resize to `size` = (width, height), bilinear, antialiased where it shrinks; writable `pixels`.

    Levels are those of Pillow's bilinear filter, except where a sum lies halfway between two: it is rounded the
    other way now and then.
    """
    if size == size_of(pixels):
        return pixels
    # with the batch in front the strides say "channels last", for which torch has the quickest kernel
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized: Pixels = (
        interpolate(images, size[::-1], mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    )
    return resized


@dataclass(frozen=True, eq=False)
class Resized:
    """An image that is yet to be resized: kept small until the batch is put together."""

    source: Pixels  # writable
    size: Size  # (width, height) after the resize

    @classmethod
    def whole(cls, pixels: Pixels) -> Resized:
        """The image as it is."""
        return cls(pixels, size_of(pixels))

    @property
    def width(self) -> int:
        """Pixels a row, after the resize."""
        return self.size[0]

    @property
    def height(self) -> int:
        """Number of rows, after the resize."""
        return self.size[1]

    def pixels(self) -> Pixels:
        """The resized image."""
        return resize_pixels(self.source, self.size)
