"""Implement the attention variants of the family.

Self-attention takes the content and the position of the queries, cross-attention also the memory. In an encoder layer,
the content is the tokens of the memory, so that cross-attention becomes self-attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrs.layers import full_precision
from detrs.ops import deform_attn_fused, deform_attn_unfused
from detrs.query_position import QueryPosition
from detrs.structures import Memory


@dataclass(frozen=True)
class DenseInputs:
    """The input of dense attention after its projections; the heads are consecutive slices of the last dimension.

    `attn_mask` broadcasts to [b, heads, q, s] and is True where a query must not attend to a key.
    """

    query: Float[Tensor, "b q d"]
    key: Float[Tensor, "b s d"]
    value: Float[Tensor, "b s v"]
    attn_mask: Bool[Tensor, "*n s"] | None


@dataclass(frozen=True)
class SampledInputs:
    """The input of deformable attention after its projections: the arguments of `detrs.ops.deform_attn_fused`."""

    value: Float[Tensor, "b s m d"]
    reference: Float[Tensor, "b q l k"]
    offsets: Float[Tensor, "b q m l p 2"]
    logits: Float[Tensor, "b q m l p"]


def attend(inputs: DenseInputs, num_heads: int, dropout: float) -> Float[Tensor, "b q v"]:
    """Compute multi-head scaled dot-product attention."""
    # F.scaled_dot_product_attention has the opposite convention: True where a query may attend
    may_attend = None if inputs.attn_mask is None else ~inputs.attn_mask
    q, k, v = (split_heads(x, num_heads) for x in (inputs.query, inputs.key, inputs.value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


def split_heads(x: Float[Tensor, "b n d"], num_heads: int) -> Float[Tensor, "b m n e"]:
    """Return the part of each head."""
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)


class PackedAttention(nn.Module):
    """Attention with one matrix for the query, key and value projections, as in `torch.nn.MultiheadAttention`."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj, self.out_proj = nn.Linear(hidden_dim, 3 * hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def _project(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> DenseInputs:
        weights, biases = self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return DenseInputs(q, k, v, attn_mask)


class SelfAttention(PackedAttention):
    """Self-attention of the queries; query and key are projections of content + position (DETR)."""

    def forward(
        self, content: Float[Tensor, "b q d"], position: QueryPosition, attn_mask: Bool[Tensor, "q q"] | None
    ) -> Float[Tensor, "b q d"]:
        """Attend among the queries; `attn_mask[i, j]` is True where query i must not attend to query j."""
        return _output(self, self.project(content, position, attn_mask))

    def project(
        self, content: Float[Tensor, "b q d"], position: QueryPosition, attn_mask: Bool[Tensor, "q q"] | None
    ) -> DenseInputs:
        """Return what `attend` gets."""
        query = content + position.pos
        return self._project(query, query, content, attn_mask)


class DenseAttention(PackedAttention):
    """Cross-attention of every query to every token (DETR)."""

    def forward(
        self, content: Float[Tensor, "b q d"], position: QueryPosition, memory: Memory
    ) -> Float[Tensor, "b q d"]:
        """Attend to the tokens that are not padding."""
        return _output(self, self.project(content, position, memory))

    def project(
        self, content: Float[Tensor, "b q d"], position: QueryPosition, memory: Memory
    ) -> DenseInputs:
        """Return what `attend` gets."""
        mask = memory.key_padding_mask[:, None, None, :]
        return self._project(content + position.pos, memory.tokens + memory.pos, memory.tokens, mask)


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
        return _output(self, self.project(content, position, attn_mask))

    def project(
        self, content: Float[Tensor, "b q d"], position: QueryPosition, attn_mask: Bool[Tensor, "q q"] | None
    ) -> DenseInputs:
        """Return what `attend` gets."""
        query = self.content_query(content) + self.pos_query(position.pos)
        key = self.content_key(content) + self.pos_key(position.pos)
        return DenseInputs(query, key, self.value(content), attn_mask)


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
        return _output(self, self.project(content, position, memory))

    def project(
        self, content: Float[Tensor, "b q d"], position: QueryPosition, memory: Memory
    ) -> DenseInputs:
        """Return what `attend` gets: the first half of each head is the content part, the second the spatial part."""
        assert position.spatial is not None
        query, key = self.content_query(content), self.content_key(memory.tokens)
        key_pos = self.pos_key(memory.pos)
        if self.pos_query is not None:
            query, key = query + self.pos_query(position.pos), key + key_pos
        query = self._concat(query, self.spatial_query(position.spatial))
        key, mask = self._concat(key, key_pos), memory.key_padding_mask[:, None, None, :]
        return DenseInputs(query, key, self.value(memory.tokens), mask)

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
        inputs = self.project(content, position, memory)
        deform_attn = deform_attn_fused if self.fused else deform_attn_unfused
        attended = deform_attn(inputs.value, memory.shapes, inputs.reference, inputs.offsets, inputs.logits)
        out: Tensor = self.output_proj(attended)
        return out

    def project(
        self, content: Float[Tensor, "b q d"], position: QueryPosition, memory: Memory
    ) -> SampledInputs:
        """Return what the operator gets, with `memory.shapes`."""
        query = content + position.pos
        samples = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        logits = full_precision(self.attention_weights(query)).view(samples)
        offsets = full_precision(self.sampling_offsets(query)).view(*samples, 2)
        value = self.value_proj(memory.tokens).masked_fill(memory.key_padding_mask[..., None], 0)
        value = value.view(*value.shape[:2], self.num_heads, value.shape[2] // self.num_heads)
        assert position.reference is not None
        return SampledInputs(value, on_levels(position.reference, memory), offsets, logits)


def on_levels(reference: Float[Tensor, "b q k"], memory: Memory) -> Float[Tensor, "b q l k"]:
    """Convert points or boxes from relative to the image to relative to each padded level."""
    ratios = memory.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)
    return reference[:, :, None] * ratios[:, None]


def _output(
    module: PackedAttention | SeparateSelfAttention | ConditionalAttention, inputs: DenseInputs
) -> Tensor:
    dropout = module.dropout if module.training else 0.0
    out: Tensor = module.out_proj(attend(inputs, module.num_heads, dropout))
    return out


def _linear(hidden_dim: int) -> nn.Linear:
    return nn.Linear(hidden_dim, hidden_dim)
