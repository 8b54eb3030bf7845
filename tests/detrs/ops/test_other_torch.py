"""Test one built library with two versions of torch: the installed one and the oldest supported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from detrs.ops import native_status
from fresh_interpreter import MODELS
from sampling import random_inputs

OLDEST = "2.11.0"
ROOM = 15 * 2**30  # PyPI's torch for Linux is the CUDA build, with CUDA's libraries
SHAPES = ((9, 7), (4, 3))

RESULTS = """
import sys
import torch
from detrs.ops import *

def results(function, inputs):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(leaves[0], ((9, 7), (4, 3)), *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

assert native_status().devices, native_status().reason
found = {"version": str(torch.__version__), "library": str(native_status().library)}
for name, inputs in torch.load(sys.argv[1]).items():
    function = deform_attn_fused if "fused" in name else deform_attn
    reference = deform_attn_fused_reference if "fused" in name else deform_attn_reference
    found[name] = results(function, inputs)
    if "half" not in name:
        for one, other in zip(found[name], results(reference, inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(1 + other.abs().max()))
torch.save(found, sys.argv[2])
"""


@pytest.fixture
def oldest_torch(tmp_path: Path) -> Iterator[Path]:
    """Create an environment with the oldest torch and return its Python; remove it after the test."""
    if shutil.disk_usage(tmp_path).free < ROOM:
        pytest.skip(f"less than {ROOM // 2**30} GiB free for an environment with torch {OLDEST}")
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    wanted = [f"torch=={OLDEST}", "numpy", "scipy", "jaxtyping"]
    command = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *wanted]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if installed.returncode != 0:
        reason = (installed.stderr.strip().splitlines() or ["pip printed no reason"])[-1]
        pytest.skip(f"torch {OLDEST} cannot be installed: {reason}")
    yield python
    shutil.rmtree(folder)


def some_inputs() -> dict[str, list[torch.Tensor]]:
    """Draw inputs for each form and dtype, once for both versions, whose random generators may differ."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64), ("half", torch.bfloat16)):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        value, locations, weights = random_inputs(SHAPES, num_channels=32, dtype=wide)
        reference = torch.rand(*weights.shape[:2], len(SHAPES), 4, dtype=wide)
        found[name] = [value.to(dtype), locations, weights]
        found[f"fused {name}"] = [value.to(dtype), reference, locations, weights]
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif("cpu" not in native_status().devices, reason=native_status().reason)
def test_the_same_library_gives_the_same_bits_under_the_oldest_torch(
    tmp_path: Path, oldest_torch: Path
) -> None:
    torch.save(some_inputs(), tmp_path / "inputs.pt")
    found = []
    for python in (Path(sys.executable), oldest_torch):
        out = tmp_path / f"out{len(found)}.pt"
        done = subprocess.run(
            [python, "-c", RESULTS, tmp_path / "inputs.pt", out],
            env={**os.environ, "PYTHONPATH": str(MODELS), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.append(torch.load(out))
    here, there = found
    assert there["version"].startswith(OLDEST)
    assert here["version"] == torch.__version__
    assert here["library"] == there["library"]
    for name in some_inputs():
        for one, other in zip(here[name], there[name], strict=True):
            assert torch.equal(one, other), name
