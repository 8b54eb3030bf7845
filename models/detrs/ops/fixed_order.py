"""Compute the gradient of deformable attention with respect to its values in a fixed order, in plain torch.

The CUDA kernels add to it with atomics, in any order, so that the last bits of two runs differ. This is for
`torch.use_deterministic_algorithms(True)`: slower, with more memory.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from detrs.ops.reference import Shapes


def grad_value_in_fixed_order(
    grad_out: Float[Tensor, "n q c"],
    value: Float[Tensor, "n s m d"],
    shapes: Shapes,
    locations: Float[Tensor, "n q m l p 2"],
    weights: Float[Tensor, "n q m l p"],
) -> Float[Tensor, "n s m d"]:
    """Return the gradient of `deform_attn_reference` with respect to `value`, in its dtype.

    Each sample adds `grad_out`, times its weight and the bilinear coefficient, to the four pixels that it was read
    from. On CUDA, `index_add` sorts what it adds under `torch.use_deterministic_algorithms(True)`.

    Args:
        grad_out: gradient of the output; c = m*d.
        value, shapes, locations, weights: arguments of `deform_attn_reference`.
    """
    num_images, num_queries, num_heads = locations.shape[:3]
    num_tokens, num_channels = value.shape[1], value.shape[3]
    grad = grad_out.to(weights.dtype).reshape(num_images, num_queries, num_heads, 1, num_channels)
    total = grad.new_zeros(num_images * num_tokens * num_heads, num_channels)
    image = torch.arange(num_images, device=value.device)[:, None, None, None]
    head = torch.arange(num_heads, device=value.device)[:, None]
    start = 0
    for level, (height, width) in enumerate(shapes):
        x, y = locations[..., level, :, 0] * width - 0.5, locations[..., level, :, 1] * height - 0.5
        left, top = x.floor(), y.floor()
        for column, share_x in ((left, left + 1 - x), (left + 1, x - left)):
            for row, share_y in ((top, top + 1 - y), (top + 1, y - top)):
                is_inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)  # not for NaN
                pixel = torch.where(is_inside, row * width + column, 0).long()
                share = torch.where(is_inside, share_x * share_y * weights[..., level, :], 0)
                index = (image * num_tokens + start + pixel) * num_heads + head
                added = share[..., None] * grad
                total = total.index_add(0, index.flatten(), added.reshape(-1, num_channels))
        start += height * width
    return total.reshape(value.shape).to(value.dtype)
