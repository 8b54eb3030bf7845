"""The CUDA kernels' own source, run on the CPU lane by lane, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import emulated
from detrs.ops import deform_attn_fused_reference, deform_attn_reference
from emulated import Case, Result
from sampling import random_inputs

pytestmark = emulated.needs_compiler
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# shapes, and what else differs from 2 images, 3 heads, 5 queries, 2 points
PYRAMID = ((5, 7), (3, 2), (1, 1))
SIZES = {
    "standard": (((6, 9), (3, 5), (2, 3), (1, 2)), {"num_points": 4, "num_channels": 32, "num_images": 1}),
    "one of each": (((1, 1),), {"num_images": 1, "num_heads": 1, "num_queries": 1, "num_points": 1}),
    "odd": (PYRAMID, {"num_points": 5, "num_heads": 5, "num_queries": 37}),
    "many samples": (PYRAMID, {"num_points": 25, "num_heads": 1, "num_queries": 3}),
    "many levels": (tuple((1 + i % 3, 1 + i % 2) for i in range(19)), {"num_points": 1, "num_queries": 2}),
    "no queries": (PYRAMID, {"num_queries": 0}),
    "no images": (PYRAMID, {"num_images": 0}),
}


def make_case(shapes, *, dtype=torch.float32, reference_size=0, seed=0, **sizes) -> Case:
    value, locations, weights = random_inputs(shapes, dtype=torch.float64, seed=seed, **sizes)
    generator = torch.Generator().manual_seed(seed + 1)
    reference = None
    if reference_size != 0:
        size = (*weights.shape[:2], len(shapes), reference_size)
        reference = torch.rand(size, generator=generator, dtype=torch.float64)
        locations, weights = (locations - 0.5) * 5, torch.randn(weights.shape, generator=generator) * 3
    grad_out = torch.randn(
        *weights.shape[:2], value.shape[2] * value.shape[3], generator=generator, dtype=torch.float64
    )
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(
        shapes,
        value.to(dtype),
        locations.to(arithmetic),
        weights.to(arithmetic),
        grad_out.to(dtype),
        None if reference is None else reference.to(arithmetic),
        order=seed % 7,
    )


def expected_of(case: Case) -> list[Tensor]:
    """Out and gradients, in float64 from the very numbers that the kernels are given."""
    given = [case.value, case.locations, case.weights]
    if case.reference is not None:
        given.insert(1, case.reference)
    leaves = [tensor.double().requires_grad_() for tensor in given]
    function = deform_attn_reference if case.reference is None else deform_attn_fused_reference
    out = function(leaves[0], case.shapes, *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad_out.double())]


def found_of(result: Result) -> list[Tensor]:
    reference = [] if result.reference is None else [result.reference.sum(2)]
    return [result.out, result.value, *reference, result.locations, result.weights]


def assert_right(case: Case, result: Result) -> None:
    expected, found = expected_of(case), found_of(result)
    if case.reference is not None and not case.wants_reference_grad:
        del expected[2]
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        # only `out` is rounded to the storage's dtype
        tolerance = TOLERANCE[case.value.dtype if index == 0 else case.locations.dtype]
        limit = tolerance * float(1 + other.abs().max()) if other.numel() else 0
        torch.testing.assert_close(
            one.double(), other, rtol=0, atol=limit, msg=lambda text, i=index: f"{i}: {text}"
        )


def all_cases() -> list[Case]:
    cases = []
    for shapes, sizes in SIZES.values():
        for reference_size in (0, 2, 4):
            for dtype in emulated.STORAGES:
                cases.append(
                    make_case(shapes, dtype=dtype, reference_size=reference_size, seed=len(cases), **sizes)
                )
    for num_channels in (4, 12, 20, 32, 36, 64, 68, 128):
        for dtype in emulated.STORAGES:
            size = {"num_channels": num_channels, "num_images": 1, "num_points": 3}
            cases.append(make_case(PYRAMID, dtype=dtype, reference_size=2, seed=len(cases), **size))
            cases.append(make_case(PYRAMID, dtype=dtype, seed=len(cases), **size))
    return cases


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("emulation"))


def test_equal_the_reference(program):
    cases = all_cases()
    for case, result in zip(cases, emulated.run(program, cases), strict=True):
        assert_right(case, result)
