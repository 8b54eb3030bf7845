"""Test the operators called directly under autocast."""

from __future__ import annotations

import pytest
import torch

from detrs.ops import native_status
from fresh_interpreter import run_python
from sampling import random_inputs

pytestmark = pytest.mark.skipif("cpu" not in native_status().devices, reason=native_status().reason)
SHAPES = ((5, 7), (3, 2))
SIZES = [5, 7, 3, 2]


def test_locations_become_float32_and_the_value_keeps_its_dtype():
    value, locations, weights = (tensor.bfloat16() for tensor in random_inputs(SHAPES, dtype=torch.float32))
    reference = torch.rand(*locations.shape[:2], len(SHAPES), 2).bfloat16()
    operators = torch.ops.detrs
    calls = [
        (operators.deform_attn, (locations, weights)),
        (operators.deform_attn_fused, (reference, locations, weights)),
    ]
    for operator, samples in calls:
        with pytest.raises(RuntimeError, match="else float32"):
            operator(value, SIZES, *samples)
        leaves = [tensor.detach().requires_grad_() for tensor in samples]
        with torch.autocast("cpu", torch.bfloat16):
            out = operator(value, SIZES, *leaves)
        assert torch.equal(out, operator(value, SIZES, *(tensor.float() for tensor in samples)))
        out.sum().backward()
        assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16] * len(leaves)


COMPILED = """
import torch
from detrs.ops import deform_attn_fused
shapes = ((5, 7), (3, 2))
inputs = [torch.randn(2, 41, 3, 8), torch.rand(2, 5, 2, 4), torch.randn(2, 5, 3, 2, 4, 2), torch.randn(2, 5, 3, 2, 4)]

class Module(torch.nn.Module):
    def forward(self, value, *samples):
        with torch.autocast("cpu", torch.bfloat16):
            return deform_attn_fused(value, shapes, *samples)

def results(function):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]

compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
for one, other in zip(results(Module()), results(compiled), strict=True):
    torch.testing.assert_close(one, other)
exported = torch.export.export(Module(), tuple(inputs)).module()
torch.testing.assert_close(exported(*inputs), Module()(*inputs))
print("same")
"""


def test_compiles_and_exports_under_autocast():
    result = run_python(COMPILED)
    assert result.stdout == "same\n", result.stderr
