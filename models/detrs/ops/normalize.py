"""Normalize images: cast, subtract the mean, divide by the standard deviation and clear the padding."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor

from detrs.ops.native import native_status


def normalize_images(
    pixels: UInt8[Tensor, "b 3 h w"],
    sizes: Int64[Tensor, "b 2"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float32[Tensor, "b 3 h w"]:
    """Return (pixels - mean) / std in float32, and 0 in the padding.

    On the CPU the native operator does it in one pass; its result equals that of `normalize_images_reference` bit by
    bit. It is fastest where `pixels` are channels last in memory, as the result always is.

    Args:
        pixels: padded on the right and at the bottom.
        sizes: (height, width) of each image without its padding.
        mean: per channel, in units of `pixels`.
        std: per channel, in units of `pixels`.
    """
    if pixels.device.type != "cpu" or "cpu" not in native_status().devices:
        return normalize_images_reference(pixels, sizes, mean, std)
    rows = torch.ops.detrs.normalize_images(
        pixels.permute(0, 2, 3, 1), sizes, torch.tensor(mean), torch.tensor(std)
    )
    normalized: Tensor = rows.permute(0, 3, 1, 2)
    return normalized


def normalize_images_reference(
    pixels: UInt8[Tensor, "b 3 h w"],
    sizes: Int64[Tensor, "b 2"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float32[Tensor, "b 3 h w"]:
    """Define `normalize_images` in plain torch: the implementation for GPUs, and without the native library."""
    normalized = pixels.to(torch.float32, memory_format=torch.channels_last)
    normalized.sub_(torch.tensor(mean, device=pixels.device)[:, None, None])
    normalized.div_(torch.tensor(std, device=pixels.device)[:, None, None])
    return normalized.masked_fill_(padding_mask(sizes, *pixels.shape[2:])[:, None], 0.0)


def padding_mask(sizes: Int64[Tensor, "b 2"], height: int, width: int) -> Bool[Tensor, "b {height} {width}"]:
    """Return a mask that is True outside of images with these sizes (height, width)."""
    if sizes.device.type == "cpu":  # two areas per image are filled faster than every pixel is compared
        mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
        for image, (bottom, end) in zip(mask, sizes.tolist(), strict=True):
            image[bottom:] = True
            image[:, end:] = True
        return mask
    below = torch.arange(height, device=sizes.device) >= sizes[:, 0, None]
    right = torch.arange(width, device=sizes.device) >= sizes[:, 1, None]
    return below[:, :, None] | right[:, None, :]
