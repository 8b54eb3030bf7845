"""The encoder: tokens look at each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detrs.attention import QueryPosition
from detrs.layers import FeedForward
from detrs.structures import Memory


class EncoderLayer(nn.Module):
    """Attention and feed-forward with residuals, normalised after them (or before: `pre_norm`)."""

    def __init__(
        self, attention: nn.Module, feed_forward: FeedForward, hidden_dim: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.attention, self.feed_forward, self.pre_norm = attention, feed_forward, pre_norm
        self.norm1, self.norm2 = nn.LayerNorm(hidden_dim), nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, memory: Memory, where: QueryPosition) -> Float[Tensor, "b s d"]:
        """The new tokens."""
        if self.pre_norm:
            memory_in = dataclasses.replace(memory, tokens=self.norm1(memory.tokens))
            x = memory.tokens + self.dropout(self.attention(memory_in.tokens, where, memory_in))
            out: Tensor = x + self.dropout(self.feed_forward(self.norm2(x)))
            return out
        x = self.norm1(memory.tokens + self.dropout(self.attention(memory.tokens, where, memory)))
        out = self.norm2(x + self.dropout(self.feed_forward(x)))
        return out


class Encoder(nn.Module):
    """Encoder layers; none is fine.

    Args:
        layers: the layers, in order.
        norm: applied to the last output (DETR's pre-norm variant).
        position_scale: factor of the position encoding computed from the tokens, layer by layer (DAB-DETR).
    """

    def __init__(
        self,
        layers: Iterable[EncoderLayer],
        *,
        norm: nn.Module | None = None,
        position_scale: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm, self.position_scale = norm, position_scale

    def forward(self, memory: Memory) -> Memory:
        """The memory with its tokens transformed."""
        centres = token_centres(memory) if len(self.layers) else None
        for layer in self.layers:
            seen = memory
            if self.position_scale is not None:
                seen = dataclasses.replace(memory, pos=memory.pos * self.position_scale(memory.tokens))
            tokens = layer(seen, QueryPosition(seen.pos, reference=centres))
            memory = dataclasses.replace(memory, tokens=tokens)
        if self.norm is not None:
            memory = dataclasses.replace(memory, tokens=self.norm(memory.tokens))
        return memory


def token_centres(memory: Memory) -> Float[Tensor, "b s 2"]:
    """(x, y) of each token's centre, relative to the image without its padding."""
    ratios = memory.valid_ratios
    centres = []
    for level, (height, width) in enumerate(memory.shapes):
        y = torch.arange(height, dtype=ratios.dtype, device=ratios.device) + 0.5
        x = torch.arange(width, dtype=ratios.dtype, device=ratios.device) + 0.5
        y, x = torch.meshgrid(y / height, x / width, indexing="ij")
        centres.append(torch.stack((x, y), dim=-1).flatten(0, 1)[None] / ratios[:, level, None])
    return torch.cat(centres, dim=1)
