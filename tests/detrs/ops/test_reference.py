"""Test the torch reference against the numbers of the published implementation and against a plain loop."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import goldens
from detrs.ops import deform_attn, deform_attn_reference
from sampling import deform_attn_loop, random_inputs

GOLDEN = goldens.FOLDER
CASES = json.loads((GOLDEN / "msda.json").read_text())["cases"]
NAMES = ("value", "sampling_locations", "attention_weights")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prefix"])
@pytest.mark.parametrize("function", [deform_attn, deform_attn_reference])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_matches_the_published_implementation(case, function, dtype, tolerance):
    with np.load(GOLDEN / "msda.npz") as arrays:
        golden = {
            k.removeprefix(case["prefix"]): torch.tensor(v) for k, v in arrays.items() if case["prefix"] in k
        }
    inputs = [golden[name].to(dtype).requires_grad_() for name in NAMES]
    shapes = tuple((height, width) for height, width in case["shapes"])

    out = function(inputs[0], shapes, inputs[1], inputs[2])
    gradients = torch.autograd.grad(out, inputs, golden["grad_out"].to(dtype))

    smooth = ~golden["kink"].bool()  # at a kink, the gradient of the location is not unique
    torch.testing.assert_close(out.double(), golden["output"].double(), rtol=0, atol=tolerance)
    for name, found in zip(NAMES, gradients, strict=True):
        expected, found = golden[f"grad_{name}"].double(), found.double()
        if name == "sampling_locations":
            expected, found = expected[smooth], found[smooth]
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max() + 1))


@pytest.mark.parametrize("function", [deform_attn, deform_attn_reference])
def test_matches_a_plain_loop(function):
    shapes = ((3, 4), (2, 1))
    value, locations, weights = random_inputs(shapes, num_queries=3, num_heads=2, num_channels=5)
    expected = deform_attn_loop(value, shapes, locations, weights)
    torch.testing.assert_close(function(value, shapes, locations, weights), expected, rtol=0, atol=1e-13)
