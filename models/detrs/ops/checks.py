"""What the operator says to wrong arguments: a ValueError with the argument's name, found and expected."""

from __future__ import annotations

import torch
from torch import Tensor

from detrs.ops.reference import Shapes

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_levels(value: Tensor, shapes: Shapes) -> None:
    """`value` is [N, S, M, D] and `shapes` are the levels that S tokens come from."""
    if value.dim() != 4:
        raise ValueError(f"value: found shape {list(value.shape)}, expected [N, S, M, D]")
    if len(shapes) == 0 or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise ValueError(f"shapes: found {shapes}, expected a (height, width), each at least 1, per level")
    num_tokens = sum(height * width for height, width in shapes)
    if value.shape[1] != num_tokens:
        raise ValueError(f"value: found {value.shape[1]} tokens, expected {num_tokens}, the area of {shapes}")


def check_samples(value: Tensor, shapes: Shapes, samples: dict[str, Tensor]) -> None:
    """The first of `samples` is [N, Q, M, L, P, 2], the second the same without its last axis."""
    (first, places), (second, weights) = samples.items()
    if places.dim() != 6:
        raise ValueError(f"{first}: found shape {list(places.shape)}, expected [N, Q, M, L, P, 2]")
    num_queries, num_points = places.shape[1], places.shape[4]
    expected = [value.shape[0], num_queries, value.shape[2], len(shapes), num_points]
    if list(places.shape) != [*expected, 2]:
        raise ValueError(f"{first}: found shape {list(places.shape)}, expected {[*expected, 2]}")
    if list(weights.shape) != expected:
        raise ValueError(f"{second}: found shape {list(weights.shape)}, expected {expected}")


def check_reference(reference: Tensor, offsets: Tensor) -> None:
    """`reference` is [N, Q, L, 2 or 4]."""
    expected = [offsets.shape[0], offsets.shape[1], offsets.shape[3]]
    if list(reference.shape) not in ([*expected, 2], [*expected, 4]):
        raise ValueError(
            f"reference: found shape {list(reference.shape)}, expected {[*expected, 2]} or {[*expected, 4]}"
        )


def check_kinds(value: Tensor, others: dict[str, Tensor]) -> None:
    """All dtypes and devices go together."""
    for name, tensor in {"value": value, **others}.items():
        if tensor.dtype not in DTYPES:
            expected = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(f"{name}: found dtype {tensor.dtype}, expected one of {expected}")
        if (tensor.dtype == torch.float64) != (value.dtype == torch.float64):
            expected = f"torch.float64 for all or none (value has {value.dtype})"
            raise ValueError(f"{name}: found dtype {tensor.dtype}, expected {expected}")
        if tensor.device != value.device:
            raise ValueError(f"{name}: found device {tensor.device}, expected {value.device}, where value is")
