"""Test the module around the operator: both forms, padding, mixed precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from detrs import attention
from detrs.attention import DeformableAttention, QueryPosition
from detrs.structures import Memory

SHAPES = ((6, 8), (3, 4))
NUM_TOKENS = 60


def made(
    dtype: torch.dtype = torch.float64,
) -> tuple[DeformableAttention, torch.Tensor, QueryPosition, Memory]:
    """Return an attention with random weights, content and boxes of 7 queries, and a memory with padding."""
    torch.manual_seed(0)
    module = DeformableAttention(16, 2, len(SHAPES), 3).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    masks = []
    for height, width in SHAPES:
        mask = torch.zeros(2, height, width, dtype=torch.bool)
        mask[0, :, width * 3 // 4 :] = mask[0, height * 2 // 3 :] = True
        masks.append(mask.flatten(1))
    ratios = torch.tensor([[[0.75, 2 / 3]] * 2, [[1, 1]] * 2], dtype=dtype)
    tokens = torch.randn(2, NUM_TOKENS, 16, dtype=dtype)
    memory = Memory(tokens, torch.randn_like(tokens), torch.cat(masks, 1), SHAPES, ratios)
    position = QueryPosition(torch.randn(2, 7, 16, dtype=dtype), reference=torch.rand(2, 7, 4, dtype=dtype))
    return module, torch.randn(2, 7, 16, dtype=dtype), position, memory


def test_the_fused_form_is_the_default_and_the_other_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module, content, position, memory = made()
    results = []
    for fused, other in ((True, "deform_attn_unfused"), (False, "deform_attn_fused")):
        assert module.fused is True or not fused
        module.fused = fused
        with monkeypatch.context() as patch:
            patch.setattr(attention, other, None)  # calling it fails
            out = module(content, position, memory)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert not torch.equal(results[0][3], torch.zeros_like(results[0][3]))


@pytest.mark.parametrize("fused", [True, False])
def test_padded_tokens_are_not_read_and_get_no_gradient(fused: bool) -> None:
    module, content, position, memory = made()
    module.fused = fused
    tokens = memory.tokens.clone().requires_grad_()
    out = module(content, position, dataclasses.replace(memory, tokens=tokens))
    (grad,) = torch.autograd.grad(out.square().sum(), tokens)
    assert torch.count_nonzero(grad[memory.key_padding_mask]) == 0
    assert torch.count_nonzero(grad[~memory.key_padding_mask]) > 0
    changed = memory.tokens.clone()
    changed[memory.key_padding_mask] = 1e6
    assert torch.equal(module(content, position, dataclasses.replace(memory, tokens=changed)), out)


@pytest.mark.parametrize("fused", [True, False])
def test_no_queries_and_no_images(fused: bool) -> None:
    module, content, position, memory = made()
    module.fused = fused
    none = QueryPosition(position.pos[:, :0], reference=torch.zeros(2, 0, 4, dtype=content.dtype))
    assert module(content[:, :0], none, memory).shape == (2, 0, 16)
    no_images = Memory(
        memory.tokens[:0], memory.pos[:0], memory.key_padding_mask[:0], SHAPES, memory.valid_ratios[:0]
    )
    no_positions = QueryPosition(position.pos[:0], reference=torch.zeros(0, 7, 4, dtype=content.dtype))
    assert module(content[:0], no_positions, no_images).shape == (0, 7, 16)


@pytest.mark.parametrize("fused", [True, False])
def test_under_autocast_only_the_value_is_half(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 8 significant bits of bfloat16 are too few for a position: reference, offsets and logits stay float32."""
    module, content, position, memory = made(torch.float32)
    module.fused = fused
    name = "deform_attn_fused" if fused else "deform_attn_unfused"
    function, dtypes = getattr(attention, name), []

    def record(value, shapes, *samples):
        dtypes.extend(tensor.dtype for tensor in (value, *samples))
        return function(value, shapes, *samples)

    monkeypatch.setattr(attention, name, record)
    expected = module(content, position, memory)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(content, position, memory)
    assert dtypes == [torch.float32] * 4 + [torch.bfloat16] + [torch.float32] * 3
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
