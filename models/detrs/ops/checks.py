"""Check the arguments of the operator: a ValueError names the argument, what was found and what is expected."""

from __future__ import annotations

import torch
from torch import Tensor

from detrs.ops.reference import Shapes

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_levels(value: Tensor, shapes: Shapes) -> None:
    """Raise ValueError unless `value` is [N, S, M, D] and the areas of `shapes` sum up to S."""
    if value.dim() != 4:
        raise ValueError(f"value: found shape {list(value.shape)}, expected [N, S, M, D]")
    if len(shapes) == 0 or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise ValueError(f"shapes: found {shapes}, expected a (height, width), each at least 1, per level")
    num_tokens = sum(height * width for height, width in shapes)
    if value.shape[1] != num_tokens:
        raise ValueError(f"value: found {value.shape[1]} tokens, expected {num_tokens}, the area of {shapes}")


def check_samples(value: Tensor, shapes: Shapes, samples: dict[str, Tensor]) -> None:
    """Raise ValueError unless the first of `samples` is [N, Q, M, L, P, 2] and the second [N, Q, M, L, P]."""
    (first, locations), (second, weights) = samples.items()
    if locations.dim() != 6:
        raise ValueError(f"{first}: found shape {list(locations.shape)}, expected [N, Q, M, L, P, 2]")
    num_queries, num_points = locations.shape[1], locations.shape[4]
    expected = [value.shape[0], num_queries, value.shape[2], len(shapes), num_points]
    if list(locations.shape) != [*expected, 2]:
        raise ValueError(f"{first}: found shape {list(locations.shape)}, expected {[*expected, 2]}")
    if list(weights.shape) != expected:
        raise ValueError(f"{second}: found shape {list(weights.shape)}, expected {expected}")


def check_reference(reference: Tensor, offsets: Tensor) -> None:
    """Raise ValueError unless `reference` is [N, Q, L, 2 or 4]."""
    expected = [offsets.shape[0], offsets.shape[1], offsets.shape[3]]
    if list(reference.shape) not in ([*expected, 2], [*expected, 4]):
        raise ValueError(
            f"reference: found shape {list(reference.shape)}, expected {[*expected, 2]} or {[*expected, 4]}"
        )


def check_dtypes_and_devices(value: Tensor, others: dict[str, Tensor]) -> None:
    """Raise ValueError unless the dtypes are supported and all tensors are on one device, float64 for all or none."""
    for name, tensor in {"value": value, **others}.items():
        if tensor.dtype not in DTYPES:
            expected = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(f"{name}: found dtype {tensor.dtype}, expected one of {expected}")
        if (tensor.dtype == torch.float64) != (value.dtype == torch.float64):
            expected = f"torch.float64 for all or none (value has {value.dtype})"
            raise ValueError(f"{name}: found dtype {tensor.dtype}, expected {expected}")
        if tensor.device != value.device:
            raise ValueError(
                f"{name}: found device {tensor.device}, expected {value.device}, the device of value"
            )
