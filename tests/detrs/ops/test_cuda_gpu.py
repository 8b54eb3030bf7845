"""Test the CUDA kernels on a GPU. Tests that need none are in the other test_cuda files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detrs.ops import (
    deform_attn,
    deform_attn_fused,
    deform_attn_fused_reference,
    deform_attn_reference,
    native_status,
)
from emulated_cases import CHANNELS, PYRAMID
from fresh_interpreter import MODELS, run_python
from sampling import (
    assert_close_to_largest,
    assert_finite_in_the_same_places,
    plant_nonfinite,
    random_inputs,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif("cuda" not in native_status().devices, reason=native_status().reason),
]
STANDARD = ((100, 167), (50, 84), (25, 42), (13, 21))  # an image of 800 x 1333 pixels
SIZES = [size for shape in PYRAMID for size in shape]


def fused_inputs(shapes, *, dtype=torch.float32, size=4, **sizes) -> list[Tensor]:
    """Return value, reference, offsets and logits, on the GPU."""
    value, locations, weights = random_inputs(shapes, dtype=torch.float64, **sizes)
    reference = torch.rand(*weights.shape[:2], len(shapes), size)
    given = [value.to(dtype), reference, (locations - 0.5) * 5, weights.log()]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return [given[0].cuda(), *(tensor.to("cuda", exact) for tensor in given[1:])]


def plain_inputs(shapes, *, dtype=torch.float32, **sizes) -> list[Tensor]:
    """Return value, locations and weights, on the GPU."""
    value, *samples = random_inputs(shapes, dtype=torch.float64, **sizes)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return [value.to("cuda", dtype), *(tensor.to("cuda", exact) for tensor in samples)]


def results(function, shapes, inputs, dtype=None) -> list[Tensor]:
    """Return output and gradients, computed in `dtype` if given."""
    leaves = [tensor.to(dtype or tensor.dtype).requires_grad_() for tensor in inputs]
    out = function(leaves[0], shapes, *leaves[1:])
    generator = torch.Generator().manual_seed(0)
    grad_out = torch.randn(out.shape, generator=generator).to(inputs[0].dtype).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("num_channels", CHANNELS)
def test_equals_the_reference_at_small_sizes(dtype, num_channels):
    sizes = {"num_channels": num_channels, "num_queries": 37, "num_points": 5}
    for function, reference, inputs in (
        (deform_attn, deform_attn_reference, plain_inputs(PYRAMID, dtype=dtype, **sizes)),
        (deform_attn_fused, deform_attn_fused_reference, fused_inputs(PYRAMID, dtype=dtype, **sizes)),
    ):
        found = results(function, PYRAMID, inputs)
        assert_close_to_largest(found, results(reference, PYRAMID, inputs, torch.float64), ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_queries", [300, 22223])
def test_equals_the_reference_at_real_sizes(dtype, num_queries):
    """The reference runs in float64. Rounding moves some locations over a kink, where their gradients jump."""
    sizes = {"num_heads": 8, "num_channels": 32, "num_queries": num_queries, "num_points": 4}
    inputs = fused_inputs(STANDARD, dtype=dtype, size=2, num_images=2, **sizes)
    found = results(deform_attn_fused, STANDARD, inputs)
    expected = results(deform_attn_fused_reference, STANDARD, inputs, torch.float64)
    assert_close_to_largest(found[:2] + found[4:], expected[:2] + expected[4:], max(ROUNDING[dtype], 2e-4))
    for one, other in zip(found[2:4], expected[2:4], strict=True):
        away = (one.double() - other).abs() > 1e-3 * (1 + other.abs())
        assert away.float().mean() < 1e-3


def test_indices_beyond_32_bits():
    """With a value of more than 2^31 numbers, the last image is right."""
    shapes, num_images = ((512, 512),), 36
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("less than 12 GiB free on the GPU")
    value = torch.zeros(num_images, 512 * 512, 8, 32, dtype=torch.float16, device="cuda")
    assert value.numel() > 2**31
    value[-1] = torch.randn(512 * 512, 8, 32, device="cuda").half()
    locations, weights = (
        tensor.float().cuda()
        for tensor in random_inputs(((1, 1),), num_images=1, num_heads=8, num_queries=64)[1:]
    )
    out = deform_attn(
        value,
        shapes,
        locations.expand(num_images, *locations.shape[1:]),
        weights.expand(num_images, *weights.shape[1:]),
    )
    torch.testing.assert_close(out[-1:], deform_attn(value[-1:].clone(), shapes, locations, weights))
    assert torch.count_nonzero(out[:-1]) == 0


def test_misaligned_slices_and_other_streams():
    value, locations, weights = plain_inputs(PYRAMID)
    expected = results(deform_attn, PYRAMID, [value, locations, weights])
    shifted = torch.cat([torch.zeros(1, device="cuda"), value.flatten()])[1:].view(value.shape)
    assert shifted.is_contiguous()
    assert shifted.data_ptr() % 16 != 0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = results(deform_attn, PYRAMID, [shifted, locations, weights])
    torch.cuda.current_stream().wait_stream(stream)
    assert_close_to_largest(found, expected, 1e-6)


@pytest.mark.parametrize("sizes", [{"num_queries": 0}, {"num_images": 0}])
def test_nothing_to_do(sizes):
    inputs = fused_inputs(PYRAMID, **sizes)
    found = results(deform_attn_fused, PYRAMID, inputs)
    assert [tensor.shape for tensor in found[1:]] == [tensor.shape for tensor in inputs]
    assert torch.count_nonzero(found[1]) == 0


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("num_channels", [12, 32])
def test_nan_and_infinity_reach_no_location_outside_their_level(dtype, num_channels):
    sizes = {"num_channels": num_channels, "num_queries": 37, "margin": 0.6}
    for function, reference, inputs in (
        (deform_attn, deform_attn_reference, plain_inputs(PYRAMID, dtype=dtype, **sizes)),
        (deform_attn_fused, deform_attn_fused_reference, fused_inputs(PYRAMID, dtype=dtype, **sizes)),
    ):
        given = [plant_nonfinite(inputs[0].cpu()).cuda(), *inputs[1:]]
        # The reference runs on the CPU, where grid_sample does not read what is outside
        expected = results(reference, PYRAMID, [tensor.cpu() for tensor in given], torch.float64)
        found = [tensor.cpu() for tensor in results(function, PYRAMID, given)]
        assert not expected[0].isfinite().all()
        assert_finite_in_the_same_places(found, expected, max(ROUNDING[dtype], 2e-4))


@pytest.mark.parametrize("num_levels", [4, 17, 32])
def test_graph_capture(num_levels):
    """A replay computes with new inputs, also long after the call that was captured has returned."""
    shapes = tuple((1 + i % 3, 1 + i % 2) for i in range(num_levels))
    static, fresh = (fused_inputs(shapes, num_channels=32, num_queries=50, seed=seed) for seed in (0, 1))
    leaves = [tensor.requires_grad_() for tensor in static]

    def step() -> list[Tensor]:
        out = deform_attn_fused(leaves[0], shapes, *leaves[1:])
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf, tensor in zip(leaves, fresh, strict=True):
            leaf.copy_(tensor)
    graph.replay()
    torch.cuda.synchronize()
    found = [tensor.detach().clone() for tensor in captured]
    assert_close_to_largest(found, [tensor.detach() for tensor in step()], 1e-5)


def test_more_levels_than_there_can_be_are_an_error():
    shapes = ((1, 1),) * 33
    with pytest.raises(RuntimeError, match="shapes: found 33 levels, expected at most 32 on CUDA"):
        deform_attn(*plain_inputs(shapes)[:1], shapes, *plain_inputs(shapes)[1:])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_keeps_locations_in_float32(half):
    value, *samples = fused_inputs(PYRAMID)
    expected = deform_attn_fused(value.to(half), PYRAMID, *samples)
    with torch.autocast("cuda", half):
        found = deform_attn_fused(value.to(half), PYRAMID, *samples)
        operator = torch.ops.detrs.deform_attn_fused(value.to(half), SIZES, *(s.to(half) for s in samples))
    assert found.dtype == operator.dtype == half
    assert torch.equal(found, expected)
    assert torch.equal(
        operator, deform_attn_fused(value.to(half), PYRAMID, *(s.to(half).float() for s in samples))
    )


def test_opcheck():
    value, locations, weights = (tensor.requires_grad_() for tensor in plain_inputs(PYRAMID))
    arguments = (value, SIZES, locations, weights)
    assert set(torch.library.opcheck(torch.ops.detrs.deform_attn.default, arguments).values()) == {"SUCCESS"}
    value, *samples = (tensor.requires_grad_() for tensor in fused_inputs(PYRAMID))
    operator = torch.ops.detrs.deform_attn_fused.default
    assert set(torch.library.opcheck(operator, (value, SIZES, *samples)).values()) == {"SUCCESS"}


def test_gradcheck():
    """Atomics add in any order: repeated backward passes may differ by rounding."""
    shapes, sizes = PYRAMID[1:], {"num_images": 1, "num_queries": 2, "num_channels": 4}
    plain = [tensor.requires_grad_() for tensor in plain_inputs(shapes, dtype=torch.float64, **sizes)]
    assert torch.autograd.gradcheck(lambda v, *s: deform_attn(v, shapes, *s), plain, nondet_tol=1e-10)
    fused = [tensor.requires_grad_() for tensor in fused_inputs(shapes, dtype=torch.float64, **sizes)]
    assert torch.autograd.gradcheck(lambda v, *s: deform_attn_fused(v, shapes, *s), fused, nondet_tol=1e-10)


def test_the_forward_pass_is_deterministic_and_the_backward_pass_can_be():
    inputs = [tensor.requires_grad_() for tensor in plain_inputs(PYRAMID, num_queries=500)]
    outs = [deform_attn(inputs[0], PYRAMID, *inputs[1:]) for _ in range(3)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    torch.use_deterministic_algorithms(True)
    try:
        gradients = [torch.autograd.grad((out * out.detach()).sum(), inputs) for out in outs]
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second, third in zip(*gradients, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
    out = deform_attn(inputs[0], PYRAMID, *inputs[1:])
    (in_any_order,) = torch.autograd.grad((out * out.detach()).sum(), inputs[:1])
    torch.testing.assert_close(gradients[0][0], in_any_order, rtol=1e-4, atol=1e-4)


COMPILED = """
import torch
from detrs.ops import deform_attn_fused
torch.manual_seed(0)
shapes = ((5, 7), (3, 2))
leaves = [torch.randn(2, 41, 3, 8), torch.rand(2, 5, 2, 4), torch.randn(2, 5, 3, 2, 4, 2), torch.randn(2, 5, 3, 2, 4)]

def results(function):
    inputs = [tensor.cuda().requires_grad_() for tensor in leaves]
    out = function(inputs[0], shapes, *inputs[1:])
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]

compiled = torch.compile(deform_attn_fused, fullgraph=True)
for one, other in zip(results(deform_attn_fused), results(compiled), strict=True):
    torch.testing.assert_close(one, other)
print("same")
"""


def test_compiles_into_one_graph():
    result = run_python(COMPILED)
    assert result.stdout == "same\n", result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    """Run the small sizes under compute-sanitizer."""
    command = shutil.which("compute-sanitizer", path="/usr/local/cuda/bin:/usr/bin:/usr/local/bin")
    if command is None:
        pytest.skip("compute-sanitizer is not installed")
    program = Path(__file__).parents[3] / "benchmarks" / "gpu_sanitizer.py"
    arguments = [command, "--tool", tool, "--error-exitcode", "9", sys.executable, str(program), "--kernels"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(MODELS)}
    result = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert result.returncode == 0, result.stdout[-4000:]
