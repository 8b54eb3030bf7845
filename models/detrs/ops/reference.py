"""Define multi-scale deformable attention in plain torch: specification and fallback of the native operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]


def deform_attn_reference(
    value: Float[Tensor, "n s m d"],
    shapes: Shapes,
    locations: Float[Tensor, "n q m l p 2"],
    weights: Float[Tensor, "n q m l p"],
) -> Float[Tensor, "n q m*d"]:
    """Sum, for each query and head, `weights` times `value` read at `locations`.

    This is the deformable attention of Zhu et al., "Deformable DETR" (arXiv 2010.04159), equation 3, without its two
    linear projections.

    Args:
        value: one vector per token and head. Tokens are the pixels of all levels, level by level and line by line.
        shapes: (height, width) of each level.
        locations: (x, y). (0, 0) is the outer corner of the first pixel of a level and (1, 1) that of the last. Values
            are interpolated bilinearly between pixel centers; outside the level they are zero.
        weights: one per sample; usually a softmax over the last two axes.
    """
    num_images, num_queries, num_heads = locations.shape[:3]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # [l, n*m, q, p, 2], edges -1 and 1
    heads = value.permute(0, 2, 3, 1).flatten(0, 1)  # [n*m, d, s]
    levels = torch.split(heads, [height * width for height, width in shapes], dim=2)
    samples = [
        F.grid_sample(level.reshape(*heads.shape[:2], *shape), grid, "bilinear", "zeros", align_corners=False)
        for level, grid, shape in zip(levels, grids, shapes, strict=True)
    ]
    stacked = torch.stack(samples, dim=3)  # [n*m, d, q, l, p]
    out = (stacked * weights.permute(0, 2, 1, 3, 4).flatten(0, 1).unsqueeze(1)).flatten(3).sum(3)
    num_channels = num_heads * value.shape[3]
    return out.reshape(num_images, num_channels, num_queries).permute(0, 2, 1)


def deform_attn_fused_reference(
    value: Float[Tensor, "n s m d"],
    shapes: Shapes,
    reference: Float[Tensor, "n q l k"],
    offsets: Float[Tensor, "n q m l p 2"],
    logits: Float[Tensor, "n q m l p"],
) -> Float[Tensor, "n q m*d"]:
    """Compute `deform_attn_reference` at `sampling_locations`, with the softmax of `logits` as weights."""
    locations = sampling_locations(shapes, reference, offsets)
    return deform_attn_reference(value, shapes, locations, sampling_weights(logits))


def sampling_weights(logits: Float[Tensor, "n q m l p"]) -> Float[Tensor, "n q m l p"]:
    """Return the softmax over all samples of a query and head."""
    return logits.flatten(3).softmax(3).reshape(logits.shape)


def sampling_locations(
    shapes: Shapes, reference: Float[Tensor, "n q l k"], offsets: Float[Tensor, "n q m l p 2"]
) -> Float[Tensor, "n q m l p 2"]:
    """Add offsets to a point (k = 2) in pixels, or to the center of a box (k = 4) in units of its half side / P.

    Source: Deformable DETR, section 4.1 and appendix A.3.
    """
    expanded = reference[:, :, None, :, None]  # [n, q, 1, l, 1, k]
    if reference.shape[3] == 4:
        return expanded[..., :2] + offsets / offsets.shape[4] * expanded[..., 2:] * 0.5
    sizes = torch.tensor([(width, height) for height, width in shapes], device=offsets.device)
    return expanded + offsets / sizes[:, None]
