"""Define cases for the emulated CUDA kernels, and their expected results: the reference in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from detrs.ops import deform_attn_fused_reference, deform_attn_reference
from emulated import STORAGES, Case, Result
from sampling import Shapes, random_inputs

PYRAMID = ((5, 7), (3, 2), (1, 1))
# Shapes, and the differences from 2 images, 3 heads, 8 channels, 5 queries, 2 points
SIZES = (
    (((6, 9), (3, 5), (2, 3), (1, 2)), {"num_points": 4, "num_channels": 32, "num_images": 1}),  # the usual
    (((1, 1),), {"num_images": 1, "num_heads": 1, "num_queries": 1, "num_points": 1}),
    (PYRAMID, {"num_points": 5, "num_heads": 5, "num_queries": 37}),
    (
        PYRAMID,
        {"num_points": 25, "num_heads": 1, "num_queries": 3},
    ),  # more samples than any kernel takes at a time
    (
        tuple((1 + i % 3, 1 + i % 2) for i in range(32)),
        {"num_points": 1, "num_queries": 2},
    ),  # as many levels as there can be
    (PYRAMID, {"num_queries": 0}),
    (PYRAMID, {"num_images": 0}),
)
CHANNELS = (4, 12, 20, 32, 36, 64, 68, 128)
ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make_case(
    shapes: Shapes,
    *,
    dtype: torch.dtype = torch.float32,
    reference_size: int = 0,
    seed: int = 0,
    **sizes: int,
) -> Case:
    """Draw a case; a third of the locations lie outside. The seed also determines the order of the lanes."""
    value, locations, weights = random_inputs(shapes, dtype=torch.float64, seed=seed, **sizes)
    generator = torch.Generator().manual_seed(seed + 1)
    reference = None
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    if reference_size != 0:
        size = (*weights.shape[:2], len(shapes), reference_size)
        reference = torch.rand(size, generator=generator, dtype=arithmetic)
        locations, weights = (locations - 0.5) * 5, torch.randn(weights.shape, generator=generator) * 3
    grad_out = torch.randn(*weights.shape[:2], value.shape[2] * value.shape[3], generator=generator)
    locations, weights = locations.to(arithmetic), weights.to(arithmetic)
    return Case(shapes, value.to(dtype), locations, weights, grad_out.to(dtype), reference, order=seed % 7)


def all_cases() -> list[Case]:
    """Return each size in each form and dtype, and each number of channels."""
    cases: list[Case] = []
    for shapes, sizes in SIZES:
        for reference_size in (0, 2, 4):
            for dtype in STORAGES:
                form = {"reference_size": reference_size, "seed": len(cases)}
                cases.append(make_case(shapes, dtype=dtype, **form, **sizes))
    for num_channels in CHANNELS:
        for dtype in STORAGES:
            for reference_size in (0, 2):
                form = {"reference_size": reference_size, "seed": len(cases)}
                sizes = {"num_channels": num_channels, "num_images": 1, "num_points": 3}
                cases.append(make_case(PYRAMID, dtype=dtype, **form, **sizes))
    return cases


def expected_of(case: Case) -> list[Tensor]:
    """Return output and gradients, in float64 from the same numbers that the kernels get."""
    given = [case.value, case.locations, case.weights]
    if case.reference is not None:
        given.insert(1, case.reference)
    leaves = [tensor.double().requires_grad_() for tensor in given]
    function = deform_attn_reference if case.reference is None else deform_attn_fused_reference
    out = function(leaves[0], case.shapes, *leaves[1:])
    gradients = list(torch.autograd.grad(out, leaves, case.grad_out.double()))
    if case.reference is not None and not case.wants_reference_grad:
        del gradients[1]
    return [out.detach(), *gradients]


def assert_right(case: Case, result: Result) -> None:
    """Assert that the results are `expected_of` the case. Only `out` is rounded to the dtype of the storage."""
    reference = [] if result.reference is None else [result.reference.sum(2)]
    found = [result.out, result.value, *reference, result.locations, result.weights]
    sums = 1e-12 if case.value.dtype == torch.float64 else 2e-5
    for index, (one, other) in enumerate(zip(found, expected_of(case), strict=True)):
        limit = sums * float(1 + other.abs().max()) if other.numel() else 0
        relative = ROUNDING[case.value.dtype] if index == 0 else 0
        torch.testing.assert_close(one.double(), other, rtol=relative, atol=limit)
