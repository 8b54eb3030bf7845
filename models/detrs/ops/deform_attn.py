"""Dispatch both forms of the operator to the native kernels or to the pure-torch reference."""

from __future__ import annotations

import torch
from torch import Tensor

from detrs.ops.checks import check_dtypes_and_devices, check_levels, check_reference, check_samples
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

    `deform_attn_reference` defines it. Arithmetic is float64 for float64 inputs, else float32. A bfloat16 or float16
    `value` is converted as it is read. `locations` and `weights` may then be float32, and should be: the 8 significant
    bits of bfloat16 are too few for a location. Autocast does not change the result.

    A location outside its level reads zero and has no gradient. The native kernels treat NaN and infinity as outside.
    On the CPU, the result is independent of the number of threads. On CUDA, the gradient of `value` is summed in no
    fixed order, unless `torch.use_deterministic_algorithms(True)` is set: then in one, far slower. There is no second
    derivative.

    Args:
        value: [N, S, M, D], one vector per image, token and head.
        shapes: (height, width) of each of the L levels; their areas sum up to S.
        locations: [N, Q, M, L, P, 2], (x, y) in [0, 1] of the level.
        weights: [N, Q, M, L, P].

    Returns:
        [N, Q, M*D], in the dtype of `value`.

    Raises:
        ValueError: a shape, dtype or device is wrong; names the argument, what was found and what is expected.
    """
    # Parameters are annotated without shapes: a run-time type checker would otherwise raise before these checks.
    samples = {"locations": locations, "weights": weights}
    check_levels(value, shapes)
    check_samples(value, shapes, samples)
    check_dtypes_and_devices(value, samples)
    dtype = _compute_dtype(value)
    locations, weights = locations.to(dtype), weights.to(dtype)
    if has_kernels(value):
        out: Tensor = torch.ops.detrs.deform_attn(value, _flat(shapes), locations, weights)
        return out
    return deform_attn_reference(value.to(dtype), shapes, locations, weights).to(value.dtype)


def deform_attn_fused(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Compute `deform_attn` from the outputs of the network, without materializing locations and softmax.

    `deform_attn_fused_reference` defines it. Dtypes, locations outside the levels, determinism and second derivatives
    are as in `deform_attn`.

    Args:
        value: [N, S, M, D], one vector per image, token and head.
        shapes: (height, width) of each of the L levels; their areas sum up to S.
        reference: [N, Q, L, 2], points (x, y), or [N, Q, L, 4], boxes cxcywh; in [0, 1] of the level.
        offsets: [N, Q, M, L, P, 2], (x, y): from a point in pixels of the level; from the center of a box in units of
            its half side / P.
        logits: [N, Q, M, L, P]; the weights are their softmax over the last two axes.

    Returns:
        [N, Q, M*D], in the dtype of `value`.

    Raises:
        ValueError: a shape, dtype or device is wrong; names the argument, what was found and what is expected.
    """
    _check_fused(value, shapes, reference, offsets, logits)
    dtype = _compute_dtype(value)
    reference, offsets, logits = reference.to(dtype), offsets.to(dtype), logits.to(dtype)
    if has_kernels(value):
        out: Tensor = torch.ops.detrs.deform_attn_fused(value, _flat(shapes), reference, offsets, logits)
        return out
    return deform_attn_fused_reference(value.to(dtype), shapes, reference, offsets, logits).to(value.dtype)


def deform_attn_unfused(
    value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Compute `deform_attn_fused` with locations and weights as tensors: slower, for comparisons only.

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
    check_dtypes_and_devices(value, {"reference": reference, **samples})


def _compute_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _flat(shapes: Shapes) -> list[int]:
    return [size for shape in shapes for size in shape]
