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


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_same_numbers(backend: str, name: str) -> None:
    paths = f"{ROOT / 'models'}{os.pathsep}{ROOT / 'tests' / 'support'}"
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "compare_compiled.py"), backend, name],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert result.returncode == 0, result.stderr
