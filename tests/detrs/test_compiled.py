"""Test that compiled detectors give the same outputs, loss and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import small_models

ROOT = Path(__file__).parents[2]
CASES = [
    pytest.param("aot_eager", name, marks=[] if name == "dino" else pytest.mark.slow)
    for name in small_models.CONFIGS
] + [pytest.param("inductor", name, marks=pytest.mark.slow) for name in ("dino", "detr")]


def run(program: str, *arguments: str) -> str:
    """Run a program of tests/support, and return what it prints."""
    paths = f"{ROOT / 'models'}{os.pathsep}{ROOT / 'tests' / 'support'}"
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / program), *arguments],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_same_numbers(backend: str, name: str) -> None:
    run("compare_compiled.py", backend, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dino", "detr", "deformable_two_stage"])
def test_seven_image_sizes_are_two_graphs_and_one_exported_program(name: str) -> None:
    """The second graph is for square images, where torch takes height and width for one number."""
    assert int(run("dynamic_sizes.py", name)) <= 2
