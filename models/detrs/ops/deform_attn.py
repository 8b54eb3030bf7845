"""`deform_attn`: the arguments checked, then the native operator or its pure-torch twin."""

from __future__ import annotations

import torch
from torch import Tensor

from detrs.ops.native import native_status
from detrs.ops.reference import Shapes, deform_attn_reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sum, for each query and head, `weights` times `value` read at `locations`.

    `deform_attn_reference` defines it. Arithmetic is float64 if the inputs are, else float32. A bfloat16
    or float16 `value` is widened as it is read; `locations` and `weights` may be float32 beside it and should
    be: bfloat16 has 8 bits, too few for a position. Autocast changes nothing here.

    A location outside its level reads zero and has no gradient; on the native path NaN and infinity count as
    outside. On the CPU the result does not depend on the number of threads. There is no second derivative.

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
    _check_levels(value, shapes)
    _check_samples(value, shapes, locations, weights)
    _check_kinds(value, {"locations": locations, "weights": weights})
    compute_dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    locations, weights = locations.to(compute_dtype), weights.to(compute_dtype)
    if value.device.type in native_status().devices:
        sizes = [size for shape in shapes for size in shape]
        out: Tensor = torch.ops.detrs.deform_attn(value, sizes, locations, weights)
        return out
    return deform_attn_reference(value.to(compute_dtype), shapes, locations, weights).to(value.dtype)


def _check_levels(value: Tensor, shapes: Shapes) -> None:
    if value.dim() != 4:
        raise ValueError(f"value: found shape {list(value.shape)}, expected [N, S, M, D]")
    if len(shapes) == 0 or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise ValueError(f"shapes: found {shapes}, expected a (height, width), each at least 1, per level")
    num_tokens = sum(height * width for height, width in shapes)
    if value.shape[1] != num_tokens:
        raise ValueError(f"value: found {value.shape[1]} tokens, expected {num_tokens}, the area of {shapes}")


def _check_samples(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    if locations.dim() != 6:
        raise ValueError(f"locations: found shape {list(locations.shape)}, expected [N, Q, M, L, P, 2]")
    num_queries, num_points = locations.shape[1], locations.shape[4]
    expected = [value.shape[0], num_queries, value.shape[2], len(shapes), num_points]
    if list(locations.shape) != [*expected, 2]:
        raise ValueError(f"locations: found shape {list(locations.shape)}, expected {[*expected, 2]}")
    if list(weights.shape) != expected:
        raise ValueError(f"weights: found shape {list(weights.shape)}, expected {expected}")


def _check_kinds(value: Tensor, others: dict[str, Tensor]) -> None:
    for name, tensor in {"value": value, **others}.items():
        if tensor.dtype not in DTYPES:
            expected = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(f"{name}: found dtype {tensor.dtype}, expected one of {expected}")
        if (tensor.dtype == torch.float64) != (value.dtype == torch.float64):
            expected = f"torch.float64 for all or none (value has {value.dtype})"
            raise ValueError(f"{name}: found dtype {tensor.dtype}, expected {expected}")
        if tensor.device != value.device:
            raise ValueError(f"{name}: found device {tensor.device}, expected {value.device}, where value is")
