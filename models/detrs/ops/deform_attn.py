"""The operator's two forms: the arguments checked, then the native operator or its pure-torch twin."""

from __future__ import annotations

import torch
from torch import Tensor

from detrs.ops.checks import check_kinds, check_levels, check_reference, check_samples
from detrs.ops.native import has_kernels
from detrs.ops.reference import (
    Shapes,
    deform_attn_fused_reference,
    deform_attn_reference,
    sampling_locations,
    sampling_weights,
)


def deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sum, for each query and head, `weights` times `value` read at `locations`.

    `deform_attn_reference` defines it. Arithmetic is float64 if the inputs are, else float32. A bfloat16
    or float16 `value` is widened as it is read; `locations` and `weights` may be float32 beside it and should
    be: bfloat16 has 8 bits, too few for a position. Autocast changes nothing here.

    A location outside its level reads zero and has no gradient; on the native path NaN and infinity count as
    outside. On the CPU the result does not depend on the number of threads; on CUDA gradients are summed in no fixed
    order, which is an error under `torch.use_deterministic_algorithms(True)`. There is no second derivative.

    Args:
        value: [N, S, M, D], a vector per image, token and head.
        shapes: (height, width) of each of the L levels; their areas sum up to S.
        locations: [N, Q, M, L, P, 2], (x, y) in [0, 1] of the level.
        weights: [N, Q, M, L, P].

    Returns:
        [N, Q, M*D], in the dtype of `value`.

    Raises:
        ValueError: a shape, dtype or device does not fit; names the argument, what was found and expected.
    """
    # The parameters' types are plain: with shapes in them a run-time type checker would answer first.
    samples = {"locations": locations, "weights": weights}
    check_levels(value, shapes)
    check_samples(value, shapes, samples)
    check_kinds(value, samples)
    dtype = _compute_dtype(value)
    locations, weights = locations.to(dtype), weights.to(dtype)
    if has_kernels(value):
        out: Tensor = torch.ops.detrs.deform_attn(value, _flat(shapes), locations, weights)
        return out
    return deform_attn_reference(value.to(dtype), shapes, locations, weights).to(value.dtype)


def deform_attn_fused(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """`deform_attn` from what the network predicts: locations and softmax never become tensors.

    `deform_attn_fused_reference` defines it. What `deform_attn` says of dtypes, of places outside the levels and of
    second derivatives holds here too.

    Args:
        value: [N, S, M, D], a vector per image, token and head.
        shapes: (height, width) of each of the L levels; their areas sum up to S.
        reference: [N, Q, L, 2], points (x, y), or [N, Q, L, 4], boxes cxcywh; in [0, 1] of the level.
        offsets: [N, Q, M, L, P, 2], (x, y): pixels of the level around a point; around a box's centre, units in
            which P is half a side.
        logits: [N, Q, M, L, P]; the weights are their softmax over the last two axes.

    Returns:
        [N, Q, M*D], in the dtype of `value`.

    Raises:
        ValueError: a shape, dtype or device does not fit; names the argument, what was found and expected.
    """
    _check_fused(value, shapes, reference, offsets, logits)
    dtype = _compute_dtype(value)
    reference, offsets, logits = reference.to(dtype), offsets.to(dtype), logits.to(dtype)
    if has_kernels(value):
        out: Tensor = torch.ops.detrs.deform_attn_fused(value, _flat(shapes), reference, offsets, logits)
        return out
    return deform_attn_fused_reference(value.to(dtype), shapes, reference, offsets, logits).to(value.dtype)


def deform_attn_in_steps(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """What `deform_attn_fused` does, with locations and weights as tensors: slower, and there for comparison.

    Arguments, result and errors are those of `deform_attn_fused`.
    """
    _check_fused(value, shapes, reference, offsets, logits)
    dtype = _compute_dtype(value)
    locations = sampling_locations(shapes, reference.to(dtype), offsets.to(dtype))
    return deform_attn(value, shapes, locations, sampling_weights(logits.to(dtype)))


def _check_fused(value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> None:
    samples = {"offsets": offsets, "logits": logits}
    check_levels(value, shapes)
    check_samples(value, shapes, samples)
    check_reference(reference, offsets)
    check_kinds(value, {"reference": reference, **samples})


def _compute_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _flat(shapes: Shapes) -> list[int]:
    return [size for shape in shapes for size in shape]
