"""Test that compiled detectors give the same outputs, loss and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import small_models
from detrs.structures import Images
from detrs.zoo import build

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
@pytest.mark.parametrize("name", ["detr", "conditional", "dab", "deformable", "deformable_two_stage", "dino"])
def test_seven_image_sizes_are_two_graphs_and_one_exported_program(name: str) -> None:
    """The second graph is for square images, where torch takes height and width for one number."""
    assert int(run("dynamic_sizes.py", name)) <= 2


@pytest.mark.parametrize("name", ["detr", "conditional", "dab", "deformable_two_stage", "dino"])
def test_no_cache_keeps_a_tensor_of_a_tracing_mode(name: str) -> None:
    """Export and compilation run a detector with tensors without numbers, which must not come back later."""
    # Sizes that no other test has: whatever depends on them is not in any cache
    config = replace(small_models.CONFIGS[name], hidden_dim=40, num_queries=9)
    detector = build(config).detector.eval()
    images, _ = small_models.batch((1,), size=(69, 107))
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            detector(Images(mode.from_tensor(images.pixels), mode.from_tensor(images.padding_mask)))
        predictions = detector(images).predictions
    assert {type(predictions.logits), type(predictions.boxes)} == {Tensor}
    assert predictions.boxes.isfinite().all()
