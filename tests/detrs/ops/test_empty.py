"""Test tensors without images, queries, heads, channels or points: zeros, forward and backward."""

from __future__ import annotations

import pytest
import torch

from detrs.ops import deform_attn, deform_attn_fused, deform_attn_fused_reference, deform_attn_reference
from sampling import random_inputs

SHAPES = ((5, 7), (3, 2))
FUNCTIONS = (deform_attn, deform_attn_reference, deform_attn_fused, deform_attn_fused_reference)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("missing", ["images", "queries", "heads", "channels", "points"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros(function, missing, dtype, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    value, locations, weights = random_inputs(SHAPES, dtype=torch.float32, **{f"num_{missing}": 0})
    samples = [locations, weights]
    if "fused" in function.__name__:
        samples.insert(0, torch.rand(*locations.shape[:2], len(SHAPES), 4))
    leaves = [tensor.to(device).requires_grad_() for tensor in (value.to(dtype), *samples)]
    kind = torch.float32 if "reference" in function.__name__ else dtype
    out = function(leaves[0].to(kind), SHAPES, *leaves[1:])
    assert out.shape == (*locations.shape[:2], value.shape[2] * value.shape[3])
    assert out.dtype == kind
    gradients = torch.autograd.grad(out.sum(), leaves)
    for tensor in (out, *gradients):
        assert torch.count_nonzero(tensor) == 0
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves]
