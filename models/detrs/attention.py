"""Implement the attention variants of the family.

Self-attention takes the content and the position of the queries, cross-attention also the memory. In an encoder layer,
the content is the tokens of the memory, so that cross-attention becomes self-attention.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrs.layers import full_precision
from detrs.ops import deform_attn_fused, deform_attn_unfused
from detrs.query_position import QueryPosition
from detrs.structures import Memory


def attend(
    query: Float[Tensor, "b q d"],
    key: Float[Tensor, "b s d"],
    value: Float[Tensor, "b s v"],
    num_heads: int,
    attn_mask: Bool[Tensor, "*n s"] | None,
    dropout: float,
) -> Float[Tensor, "b q v"]:
    """Compute multi-head scaled dot-product attention.

    `attn_mask` broadcasts to [b, heads, q, s] and is True where a query must not attend to a key.
    """
    # F.scaled_dot_product_attention has the opposite convention: True where a query may attend
    may_attend = None if attn_mask is None else ~attn_mask
    q, k, v = (x.view(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


class PackedAttention(nn.Module):
    """Attention with one matrix for the query, key and value projections, as in `torch.nn.MultiheadAttention`."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj, self.out_proj = nn.Linear(hidden_dim, 3 * hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
        weights, biases = self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        dropout = self.dropout if self.training else 0.0
        out: Tensor = self.out_proj(attend(q, k, v, self.num_heads, attn_mask, dropout))
        return out


class SelfAttention(PackedAttention):
    """Self-attention of the queries; query and key are projections of content + position (DETR)."""

    def forward(
        self, content: Float[Tensor, "b q d"], position: QueryPosition, attn_mask: Bool[Tensor, "q q"] | None
    ) -> Float[Tensor, "b q d"]:
        """Attend among the queries; `attn_mask[i, j]` is True where query i must not attend to query j."""
        query = content + position.pos
        return self._attend(query, query, content, attn_mask)


class DenseAttention(PackedAttention):
    """Cross-attention of every query to every token (DETR)."""

    def forward(
        self, content: Float[Tensor, "b q d"], position: QueryPosition, memory: Memory
    ) -> Float[Tensor, "b q d"]:
        """Attend to the tokens that are not padding."""
        mask = memory.key_padding_mask[:, None, None, :]
        return self._attend(content + position.pos, memory.tokens + memory.pos, memory.tokens, mask)


class SeparateSelfAttention(nn.Module):
    """Self-attention with separate projections of content and position (Conditional DETR)."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.content_query, self.content_key = _linear(hidden_dim), _linear(hidden_dim)
        self.pos_query, self.pos_key = _linear(hidden_dim), _linear(hidden_dim)
        self.value, self.out_proj = _linear(hidden_dim), _linear(hidden_dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, content: Float[Tensor, "b q d"], position: QueryPosition, attn_mask: Bool[Tensor, "q q"] | None
    ) -> Float[Tensor, "b q d"]:
        """Attend among the queries; `attn_mask[i, j]` is True where query i must not attend to query j."""
        query = self.content_query(content) + self.pos_query(position.pos)
        key = self.content_key(content) + self.pos_key(position.pos)
        dropout = self.dropout if self.training else 0.0
        attended = attend(query, key, self.value(content), self.num_heads, attn_mask, dropout)
        out: Tensor = self.out_proj(attended)
        return out


class ConditionalAttention(nn.Module):
    """Cross-attention that concatenates content and spatial parts per head (Conditional DETR, section 3.3).

    With `add_position`, positions are also added to the content, as in DETR; the official models do this in the first
    layer only.
    """

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float, *, add_position: bool) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.content_query, self.content_key = _linear(hidden_dim), _linear(hidden_dim)
        self.pos_query = _linear(hidden_dim) if add_position else None
        self.pos_key, self.spatial_query = _linear(hidden_dim), _linear(hidden_dim)
        self.value, self.out_proj = _linear(hidden_dim), _linear(hidden_dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, content: Float[Tensor, "b q d"], position: QueryPosition, memory: Memory
    ) -> Float[Tensor, "b q d"]:
        """Attend to the tokens that are not padding."""
        assert position.spatial is not None
        query, key = self.content_query(content), self.content_key(memory.tokens)
        key_pos = self.pos_key(memory.pos)
        if self.pos_query is not None:
            query, key = query + self.pos_query(position.pos), key + key_pos
        query = self._concat(query, self.spatial_query(position.spatial))
        key, value = self._concat(key, key_pos), self.value(memory.tokens)
        mask, dropout = memory.key_padding_mask[:, None, None, :], self.dropout if self.training else 0.0
        attended = attend(query, key, value, self.num_heads, mask, dropout)
        out: Tensor = self.out_proj(attended)
        return out

    def _concat(
        self, content: Float[Tensor, "b n d"], spatial: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n e"]:
        # Per head: the logit is then content . content + spatial . spatial, without mixed terms
        heads = (*content.shape[:2], self.num_heads, -1)
        return torch.cat((content.view(heads), spatial.view(heads)), dim=-1).flatten(2)


class DeformableAttention(nn.Module):
    """Cross-attention to a few sampled points per level around the reference (Deformable DETR, eq. 3).

    Set `fused` to False for comparisons: locations and weights are then materialized (`deform_attn_unfused`), which is
    slower and equal up to rounding.
    """

    def __init__(self, hidden_dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.fused = True
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim: {hidden_dim} is not a multiple of num_heads, {num_heads}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        num_samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(hidden_dim, 2 * num_samples)
        self.attention_weights = nn.Linear(hidden_dim, num_samples)
        self.value_proj, self.output_proj = (
            nn.Linear(hidden_dim, hidden_dim),
            nn.Linear(hidden_dim, hidden_dim),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the offsets so that head m samples in direction m, point p at distance p + 1 (A.4)."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None, :] * distances[:, None]
        offsets = offsets.expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.data.copy_(offsets.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, content: Float[Tensor, "b q d"], position: QueryPosition, memory: Memory
    ) -> Float[Tensor, "b q d"]:
        """Attend to the sampled points. Positions, weights and sums are float32 or wider, whatever the values are."""
        query = content + position.pos
        samples = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        logits = full_precision(self.attention_weights(query)).view(samples)
        offsets = full_precision(self.sampling_offsets(query)).view(*samples, 2)
        value = self.value_proj(memory.tokens).masked_fill(memory.key_padding_mask[..., None], 0)
        value = value.view(*value.shape[:2], self.num_heads, value.shape[2] // self.num_heads)
        assert position.reference is not None
        reference = on_levels(position.reference, memory)
        deform_attn = deform_attn_fused if self.fused else deform_attn_unfused
        out: Tensor = self.output_proj(deform_attn(value, memory.shapes, reference, offsets, logits))
        return out


def on_levels(reference: Float[Tensor, "b q k"], memory: Memory) -> Float[Tensor, "b q l k"]:
    """Convert points or boxes from relative to the image to relative to each padded level."""
    ratios = memory.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)
    return reference[:, :, None] * ratios[:, None]


def _linear(hidden_dim: int) -> nn.Linear:
    return nn.Linear(hidden_dim, hidden_dim)
