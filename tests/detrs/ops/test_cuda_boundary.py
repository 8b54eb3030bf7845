"""Test registration and build of the CUDA kernels, as far as this needs no GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from detrs.ops import deform_attn, deform_attn_fused, deform_attn_reference, native, native_status
from detrs.ops.fixed_order import grad_value_in_fixed_order
from detrs.ops.native import has_kernels
from fresh_interpreter import run_python

ROOT = Path(__file__).parents[3]
SHAPES = ((5, 7), (3, 2))
needs_cuda_build = pytest.mark.skipif("cuda" not in native_status().devices, reason=native_status().reason)


def fake_inputs(num_channels=8, dtype=torch.float32):
    """Return value, locations and weights on a GPU that need not exist."""
    value = torch.empty(2, 41, 3, num_channels, dtype=dtype, device="cuda")
    return value, torch.empty(2, 5, 3, 2, 4, 2, device="cuda"), torch.empty(2, 5, 3, 2, 4, device="cuda")


def test_the_library_has_kernels_for_gpus_if_nvcc_is_installed():
    if shutil.which("nvcc") is None or "NVCC set to nothing" in native_status().reason:
        pytest.skip("nvcc is not installed, or the library was built without it on purpose")
    assert "cuda" in native_status().devices, native_status().reason


@needs_cuda_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_on_a_gpu(dtype):
    with FakeTensorMode():
        value, locations, weights = fake_inputs(dtype=dtype)
        reference = torch.empty(2, 5, 2, 4, device="cuda")
        out = deform_attn(value, SHAPES, locations, weights)
        fused = deform_attn_fused(value, SHAPES, reference, locations, weights)
        gradients = torch.ops.detrs.deform_attn_fused_backward(
            out, value, [5, 7, 3, 2], reference, locations, weights, True
        )
    for found in (out, fused):
        assert (found.shape, found.dtype, found.device.type) == ((2, 5, 24), dtype, "cuda")
    expected = [(2, 41, 3, 8), (2, 5, 3, 2, 4), (2, 5, 3, 2, 4, 2), (2, 5, 3, 2, 4)]
    assert [tuple(gradient.shape) for gradient in gradients] == expected
    assert gradients[0].dtype == dtype


@needs_cuda_build
@pytest.mark.parametrize(("num_channels", "native"), [(4, True), (128, True), (6, False), (132, False)])
def test_other_numbers_of_channels_use_pure_torch_on_a_gpu(num_channels, native):
    assert has_kernels(torch.empty(2, 41, 3, num_channels))
    with FakeTensorMode():
        assert has_kernels(fake_inputs(num_channels)[0]) == native


@needs_cuda_build
@pytest.mark.parametrize("fused", [False, True])
def test_a_deterministic_backward_on_a_gpu_adds_in_a_fixed_order(monkeypatch, fused):
    """Call backward as autograd does, which itself cannot run on CUDA tensors without a GPU."""
    calls = []

    def spy(grad_out, value, shapes, *samples):
        calls.append((shapes, [tuple(tensor.shape) for tensor in (grad_out, *samples)]))
        return torch.empty_like(value)

    monkeypatch.setattr(native, "grad_value_in_fixed_order", spy)
    # Tensors on a GPU that is not there cannot be indexed
    monkeypatch.setattr(native, "sampling_locations", lambda shapes, reference, offsets: offsets)
    monkeypatch.setattr(native, "sampling_weights", lambda logits: logits)
    with FakeTensorMode():
        value, locations, weights = fake_inputs()
        saved = [value, locations, weights]
        if fused:
            saved.insert(1, torch.empty(2, 5, 2, 4, device="cuda"))
        context = SimpleNamespace(saved_tensors=saved, shapes=[5, 7, 3, 2], needs_input_grad=[True] * 5)
        backward = native._fused_backward if fused else native._backward
        backward(context, torch.empty(2, 5, 24, device="cuda"))
        assert not calls
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        gradients = backward(context, torch.empty(2, 5, 24, device="cuda"))
    assert calls == [(((5, 7), (3, 2)), [(2, 5, 24), (2, 5, 3, 2, 4, 2), (2, 5, 3, 2, 4)])]
    assert gradients[0].shape == value.shape
    assert gradients[0].device == value.device


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_in_a_fixed_order_is_that_of_the_reference(dtype):
    """Also at the edges of a level, outside, at NaN and infinity, with one pixel, and without queries."""
    shapes = ((5, 7), (3, 2), (1, 1))
    torch.manual_seed(0)
    for num_queries in (9, 0):
        value = torch.randn(2, 42, 3, 8, dtype=torch.float64).to(dtype).requires_grad_()
        locations = torch.rand(2, num_queries, 3, 3, 4, 2, dtype=torch.float64) * 1.6 - 0.3
        weights = torch.randn(2, num_queries, 3, 3, 4, dtype=torch.float64)
        grad_out = torch.randn(2, num_queries, 24, dtype=torch.float64)
        if num_queries:
            locations[0, 0, 0, 0] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5 / 7, 0.5 / 5], [1.0, 0.0]])
        reference = deform_attn_reference(value.double(), shapes, locations, weights)
        (expected,) = torch.autograd.grad(reference, value, grad_out)
        samples = [tensor if dtype == torch.float64 else tensor.float() for tensor in (locations, weights)]
        found = grad_value_in_fixed_order(grad_out, value.detach(), shapes, *samples)
        assert found.dtype == dtype
        torch.testing.assert_close(
            found,
            expected,
            **({"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}),
        )
        if num_queries:  # as the kernels: outside
            for bad in (float("nan"), float("inf"), -float("inf")):
                lost, without = locations.clone(), weights.clone()
                lost[1, 2], without[1, 2] = bad, 0
                gradients = [
                    grad_value_in_fixed_order(grad_out, value.detach(), shapes, lost, weights),
                    grad_value_in_fixed_order(grad_out, value.detach(), shapes, locations, without),
                ]
                torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_deterministic_algorithms_are_possible_on_the_cpu():
    value = torch.randn(2, 41, 3, 8, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        deform_attn(value, SHAPES, torch.rand(2, 5, 3, 2, 4, 2), torch.rand(2, 5, 3, 2, 4)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert value.grad is not None


def find_nvcc(**environment: str) -> str:
    """Return what `find_nvcc` of csrc/build.py finds in such an environment, without building."""
    code = (
        "import runpy; found = runpy.run_path('csrc/build.py')['find_nvcc']()\n"
        "print(found if isinstance(found, str) else ' '.join([*found.flags, found.target_names]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


@pytest.fixture
def compiler(tmp_path):
    """Return a function that writes a fake nvcc of a given release, which knows few GPUs."""

    def make(release: str, known: str = "sm_75 sm_80 sm_90 sm_121") -> Path:
        command = tmp_path / "nvcc"
        command.write_text(
            f'#!/bin/sh\ncase "$1" in --version) echo "Cuda compilation tools, release {release}, V1";;'
            f" --list-gpu-code) printf '%s\\n' {known};; esac\n"
        )
        command.chmod(0o755)
        return command

    return make


def test_setup_builds_for_the_gpus_that_the_compiler_knows(compiler):
    found = find_nvcc(PATH="/usr/bin:/bin", NVCC=str(compiler("12.4")))
    assert "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90" in found
    ptx = "-gencode=arch=compute_80,code=compute_80 -gencode=arch=compute_90,code=compute_90"
    assert found.endswith(f"{ptx} sm_80 sm_90 compute_80 compute_90")
    assert "sm_75" not in found
    assert "sm_121" not in found


def test_setup_builds_for_the_gpus_of_torchs_variable(compiler):
    nvcc = {"PATH": "/usr/bin:/bin", "NVCC": str(compiler("12.4"))}
    assert find_nvcc(**nvcc, TORCH_CUDA_ARCH_LIST="7.5;9.0+PTX").endswith(" sm_90 compute_90")
    assert "supported none of the targeted GPUs" in find_nvcc(**nvcc, TORCH_CUDA_ARCH_LIST="7.5")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        find_nvcc(**nvcc, TORCH_CUDA_ARCH_LIST="Hopper")
    assert "TORCH_CUDA_ARCH_LIST=Hopper: expected numbers" in failed.value.stderr


OLD_GPU = """
import dataclasses
import warnings
import torch
import detrs.ops.native as native
native._status = dataclasses.replace(native._status, oldest_gpu=(8, 0))
is_available = torch.cuda.is_available
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda index: (7, 5) if index else (8, 0)
torch.cuda.get_device_name = lambda index: "Tesla T4"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert native.supports_gpu(0) and not caught
    assert not native.supports_gpu(1) and not native.supports_gpu(1)
(warning,) = caught
print(warning.message)
torch.cuda.is_available = is_available  # the compiler asks too
compiled = torch.compile(lambda x: x + native.supports_gpu(0), backend="eager", fullgraph=True)
assert compiled(torch.ones(1)) == 2
"""


@needs_cuda_build
def test_a_gpu_that_is_too_old_gets_pure_torch_and_one_warning():
    result = run_python(OLD_GPU)
    assert result.returncode == 0, result.stderr
    assert "Tesla T4 has compute capability 7.5, and the native kernels need 8.0 or newer" in result.stdout


def test_setup_reports_why_there_are_no_kernels_for_gpus(compiler, tmp_path):
    assert "NVCC set to nothing" in find_nvcc(PATH="/usr/bin:/bin", NVCC="")
    assert "/none was not found" in find_nvcc(PATH="/usr/bin:/bin", NVCC=str(tmp_path / "none"))
    assert "supported none of the targeted GPUs" in find_nvcc(
        PATH="/usr/bin:/bin", NVCC=str(compiler("20.0", "sm_150"))
    )
    assert "not at least CUDA 12.1" in find_nvcc(PATH="/usr/bin:/bin", NVCC=str(compiler("11.8")))
