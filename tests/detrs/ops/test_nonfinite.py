"""Test NaN and infinity in value and in the gradient of the output: they reach no location outside their level."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import emulated
from detrs.ops import (
    deform_attn,
    deform_attn_fused,
    deform_attn_fused_reference,
    deform_attn_reference,
    native_status,
)
from emulated_cases import expected_of, make_case
from fresh_interpreter import run_python
from sampling import assert_finite_in_the_same_places, plant_nonfinite, random_inputs

SHAPES = ((5, 7), (3, 2), (1, 1))
ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
needs_native = pytest.mark.skipif("cpu" not in native_status().devices, reason=native_status().reason)


def check_on_the_cpu(dtype: torch.dtype, num_channels: int, num_queries: int, fused: bool) -> None:
    """Compare output and gradients with the reference in float64."""
    value, locations, weights = random_inputs(
        SHAPES, num_channels=num_channels, num_queries=num_queries, margin=0.6
    )
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [plant_nonfinite(value).to(dtype), locations.to(exact), weights.to(exact)]
    if fused:
        reference = torch.rand(*weights.shape[:2], len(SHAPES), 4, generator=torch.Generator().manual_seed(1))
        inputs.insert(1, reference.to(exact))
    grad_out = torch.randn(2, num_queries, 3 * num_channels, generator=torch.Generator().manual_seed(2)).to(
        dtype
    )
    for planted in (grad_out, plant_nonfinite(grad_out.view(-1, num_channels), 3).view_as(grad_out)):
        functions = (
            (deform_attn_fused, deform_attn_fused_reference)
            if fused
            else (deform_attn, deform_attn_reference)
        )
        found, expected = (
            results(function, [tensor.to(kind or tensor.dtype) for tensor in inputs], planted)
            for function, kind in zip(functions, (None, torch.float64), strict=True)
        )
        assert not expected[0].isfinite().all()
        # Elsewhere the reference multiplies a gradient that is NaN by the 0 that it reads outside
        count = None if planted is grad_out else 2
        assert_finite_in_the_same_places(found[:count], expected[:count], ROUNDING[dtype])


def results(function, inputs, grad_out) -> list[Tensor]:
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = function(leaves[0], SHAPES, *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


CASES = [
    (dtype, num_channels, num_queries, fused)
    for dtype, num_channels in zip(ROUNDING, (7, 32, 20, 16), strict=True)
    for num_queries in (1, 5, 70)
    for fused in (False, True)
]


@needs_native
@pytest.mark.parametrize(("dtype", "num_channels", "num_queries", "fused"), CASES)
def test_on_the_cpu(dtype, num_channels, num_queries, fused):
    check_on_the_cpu(dtype, num_channels, num_queries, fused)


@needs_native
@pytest.mark.parametrize("limit", ["default", "avx2"])
def test_with_other_instruction_sets(limit):
    code = f"""
import sys
sys.path.insert(0, {str(emulated.ROOT / "tests" / "detrs" / "ops")!r})
import torch
from test_nonfinite import CASES, check_on_the_cpu
torch.set_num_threads(8)  # more than there are heads: threads share them
for case in CASES:
    check_on_the_cpu(*case)
"""
    result = run_python(code, ATEN_CPU_CAPABILITY=limit)
    assert result.returncode == 0, result.stderr


@emulated.needs_compiler
def test_on_cuda_emulated(tmp_path):
    program = emulated.build(tmp_path)
    cases = []
    for seed, dtype in enumerate(emulated.STORAGES):
        for size in (0, 4):
            case = make_case(
                SHAPES, dtype=dtype, reference_size=size, seed=seed, num_queries=9, num_channels=12
            )
            cases.append(replace(case, value=plant_nonfinite(case.value)))
    for case, result in zip(cases, emulated.run(program, cases), strict=True):
        reference = [] if result.reference is None else [result.reference.sum(2)]
        found = [result.out, result.value, *reference, result.locations, result.weights]
        assert_finite_in_the_same_places(found, expected_of(case), ROUNDING[case.value.dtype])
