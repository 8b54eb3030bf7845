"""Draw inputs for deformable attention, and define it slowly, without code shared with the other definitions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]


def random_inputs(
    shapes: Shapes,
    *,
    num_images: int = 2,
    num_heads: int = 3,
    num_channels: int = 8,
    num_queries: int = 5,
    num_points: int = 2,
    dtype: torch.dtype = torch.float64,
    margin: float = 0.3,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `value`, `locations` (up to `margin` outside the levels) and `weights`."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(height * width for height, width in shapes)
    rows = (num_images, num_queries, num_heads, len(shapes), num_points)
    value = torch.randn(num_images, num_tokens, num_heads, num_channels, generator=generator, dtype=dtype)
    locations = torch.rand(*rows, 2, generator=generator, dtype=dtype) * (1 + 2 * margin) - margin
    weights = torch.randn(rows, generator=generator, dtype=dtype)
    return value, locations, weights.flatten(3).softmax(3).reshape(rows)


def deform_attn_loop(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute deformable attention sample by sample and pixel by pixel, in Python numbers (which are float64)."""
    num_images, num_queries, num_heads = locations.shape[:3]
    out = torch.zeros(num_images, num_queries, num_heads, value.shape[3], dtype=torch.float64)
    starts = [sum(height * width for height, width in shapes[:level]) for level in range(len(shapes))]
    for sample in itertools.product(*(range(size) for size in weights.shape)):
        image, query, head, level = sample[:4]
        height, width = shapes[level]
        x = float(locations[sample][0]) * width - 0.5
        y = float(locations[sample][1]) * height - 0.5
        for row, column in itertools.product(range(height), range(width)):
            factor = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
            token = starts[level] + row * width + column
            out[image, query, head] += float(weights[sample]) * factor * value[image, token, head].double()
    return out.flatten(2)


def assert_close_to_largest(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Assert that each pair differs by at most `tolerance` times 1 + the largest expected number."""
    for one, other in zip(found, expected, strict=True):
        limit = tolerance * float(1 + other.abs().max()) if other.numel() else 0
        torch.testing.assert_close(one.to(other.dtype), other, rtol=0, atol=limit)


def plant_nonfinite(tensor: Tensor, seed: int = 0) -> Tensor:
    """Return a copy in which a tenth of the vectors along the last axis hold NaN or infinity, each in one place."""
    generator = torch.Generator().manual_seed(seed)
    planted = tensor.clone()
    vectors = planted.view(-1, planted.shape[-1])
    for number, vector in enumerate(torch.randperm(len(vectors), generator=generator)[: len(vectors) // 10]):
        wild = (torch.nan, torch.inf, -torch.inf)[number % 3]
        vectors[vector, number % vectors.shape[1]] = wild
    return planted


def assert_finite_in_the_same_places(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float
) -> None:
    """Assert that NaN or infinity is where it is expected, and that all other numbers are close."""
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        finite = other.isfinite()
        wrong = int((one.isfinite() != finite).sum())
        assert wrong == 0, f"tensor {index}: {wrong} of {finite.numel()} numbers are wrongly finite or not"
        assert_close_to_largest([one[finite]], [other[finite]], tolerance)
