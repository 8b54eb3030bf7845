"""Simulate other machines in a fresh interpreter: no library, a broken one, fewer instructions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from detrs.ops import native_status
from fresh_interpreter import run_python

MODELS = Path(__file__).parents[3] / "models"

PARITY = """
import torch
from detrs.ops import *
from sampling import random_inputs
shapes = ((9, 7), (4, 3))
for num_channels in (1, 4, 16, 30, 32, 64):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        value, locations, weights = random_inputs(shapes, num_channels=num_channels, dtype=dtype)
        leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
        results = []
        for function in (deform_attn, deform_attn_reference):
            out = function(value, shapes, locations, weights)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for one, other in zip(*results, strict=True):
            limit = tolerance * float(1 + other.detach().abs().max())
            torch.testing.assert_close(one, other, rtol=tolerance, atol=limit)
reference = torch.rand(2, 5, 2, 4)
value, locations, weights = random_inputs(shapes, num_channels=16, dtype=torch.float32)
results = [f(value, shapes, reference, locations, weights) for f in (deform_attn_fused, deform_attn_fused_reference)]
torch.testing.assert_close(*results)
print(native_status().instruction_set, native_status().devices)
"""


@pytest.mark.skipif("cpu" not in native_status().devices, reason=native_status().reason)
@pytest.mark.parametrize("limit", ["default", "avx2"])
def test_the_instruction_set_of_torch_limits_the_kernels(limit):
    result = run_python(PARITY, ATEN_CPU_CAPABILITY=limit)
    assert result.returncode == 0, result.stderr
    allowed = {"baseline"} if limit == "default" else {"baseline", "avx2"}
    assert result.stdout.split()[0] in allowed


@pytest.fixture
def models_copy(tmp_path) -> Path:
    """Copy the sources of detrs.ops alone, without the library."""
    shutil.copytree(
        MODELS / "detrs" / "ops", tmp_path / "detrs" / "ops", ignore=shutil.ignore_patterns("*.so")
    )
    (tmp_path / "detrs" / "__init__.py").touch()
    return tmp_path


def test_without_the_library_one_warning_and_pure_torch(models_copy):
    result = run_python(PARITY, models=models_copy)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["None", "()"]
    assert result.stderr.count("RuntimeWarning") == 1
    assert "several times slower" in result.stderr
    assert "_C.so does not exist" in result.stderr
    assert "pip install --no-build-isolation -e ." in result.stderr


def test_a_library_that_does_not_load_is_explained(models_copy):
    (models_copy / "detrs" / "ops" / "_C.so").write_text("no library")
    result = run_python(PARITY, models=models_copy)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["None", "()"]
    assert "does not load" in result.stderr
