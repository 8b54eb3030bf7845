"""Encode the memory: attention among its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detrs.layers import FeedForward, call_layer
from detrs.query_position import QueryPosition
from detrs.structures import Memory


class EncoderLayer(nn.Module):
    """Attention and feed-forward with residuals and layer norm after them (before them with `pre_norm`)."""

    def __init__(
        self, attention: nn.Module, feed_forward: FeedForward, hidden_dim: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.attention, self.feed_forward, self.pre_norm = attention, feed_forward, pre_norm
        self.norm1, self.norm2 = nn.LayerNorm(hidden_dim), nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, memory: Memory, position: QueryPosition) -> Float[Tensor, "b s d"]:
        """Return the new tokens."""
        if self.pre_norm:
            memory_in = dataclasses.replace(memory, tokens=self.norm1(memory.tokens))
            x = memory.tokens + self.dropout(self.attention(memory_in.tokens, position, memory_in))
            out: Tensor = x + self.dropout(self.feed_forward(self.norm2(x)))
            return out
        x = self.norm1(memory.tokens + self.dropout(self.attention(memory.tokens, position, memory)))
        out = self.norm2(x + self.dropout(self.feed_forward(x)))
        return out


class Encoder(nn.Module):
    """Encoder layers; there may be none.

    Args:
        layers: the layers, in order.
        norm: applied to the output of the last layer (DETR's pre-norm variant, an option of DAB-DETR).
        position_scale: computes the factor of the position encoding from the tokens, in every layer (DAB-DETR).
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
        self.activation_checkpointing = False

    def forward(self, memory: Memory) -> Memory:
        """Return the memory with its tokens transformed."""
        centers = token_centers(memory) if len(self.layers) else None
        for layer in self.layers:
            layer_input = memory
            if self.position_scale is not None:
                layer_input = dataclasses.replace(memory, pos=memory.pos * self.position_scale(memory.tokens))
            position = QueryPosition(layer_input.pos, reference=centers)
            tokens = call_layer(layer, layer_input, position, recompute=self.activation_checkpointing)
            memory = dataclasses.replace(memory, tokens=tokens)
        if self.norm is not None:
            memory = dataclasses.replace(memory, tokens=self.norm(memory.tokens))
        return memory


def token_centers(memory: Memory) -> Float[Tensor, "b s 2"]:
    """Return (x, y) of the center of each token, relative to the image without its padding."""
    ratios = memory.valid_ratios
    centers = []
    for level, (height, width) in enumerate(memory.shapes):
        y = torch.arange(height, dtype=ratios.dtype, device=ratios.device) + 0.5
        x = torch.arange(width, dtype=ratios.dtype, device=ratios.device) + 0.5
        y, x = torch.meshgrid(y / height, x / width, indexing="ij")
        centers.append(torch.stack((x, y), dim=-1).flatten(0, 1)[None] / ratios[:, level, None])
    return torch.cat(centers, dim=1)
