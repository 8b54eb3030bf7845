"""The ways of looking: each attention gets the content, where it looks, and the memory.

An encoder layer is the special case in which the content is the memory's tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrs.layers import full_precision
from detrs.ops import deform_attn_fused, deform_attn_in_steps
from detrs.structures import Memory


@dataclass(frozen=True)
class QueryPosition:
    """Where each query looks."""

    pos: Float[Tensor, "b q d"]  # added to the content, or projected and added
    spatial: Float[Tensor, "b q d"] | None = None  # conditional attention's own spatial query
    reference: Float[Tensor, "b q k"] | None = None  # point or box in [0, 1], for deformable attention


def attend(
    query: Float[Tensor, "b q d"],
    key: Float[Tensor, "b s d"],
    value: Float[Tensor, "b s v"],
    num_heads: int,
    attended: Bool[Tensor, "*n s"] | None,
    dropout: float,
) -> Float[Tensor, "b q v"]:
    """Multi-head scaled dot-product attention; `attended` broadcasts to [b, heads, q, s]."""
    q, k, v = (x.view(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attended, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


class PackedAttention(nn.Module):
    """Query, key and value projections in one matrix, as torch's own multi-head attention keeps them."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj, self.out_proj = nn.Linear(hidden_dim, 3 * hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attended: Tensor | None) -> Tensor:
        weights, biases = self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        dropout = self.dropout if self.training else 0.0
        out: Tensor = self.out_proj(attend(q, k, v, self.num_heads, attended, dropout))
        return out


class SelfAttention(PackedAttention):
    """Queries look at each other: q = k = W (content + position) (DETR)."""

    def forward(
        self, content: Float[Tensor, "b q d"], where: QueryPosition, blocked: Bool[Tensor, "q q"] | None
    ) -> Float[Tensor, "b q d"]:
        """Mix the queries; `blocked[i, j]`: query i does not see query j."""
        placed = content + where.pos
        return self._attend(placed, placed, content, None if blocked is None else ~blocked)


class DenseAttention(PackedAttention):
    """Every query looks at every token (DETR)."""

    def forward(
        self, content: Float[Tensor, "b q d"], where: QueryPosition, memory: Memory
    ) -> Float[Tensor, "b q d"]:
        """Gather from the unpadded tokens."""
        attended = ~memory.padding[:, None, None, :]
        return self._attend(content + where.pos, memory.tokens + memory.pos, memory.tokens, attended)


class SeparateSelfAttention(nn.Module):
    """Queries look at each other with own projections of content and position (Conditional DETR)."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.content_query, self.content_key = _linear(hidden_dim), _linear(hidden_dim)
        self.pos_query, self.pos_key = _linear(hidden_dim), _linear(hidden_dim)
        self.value, self.out_proj = _linear(hidden_dim), _linear(hidden_dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, content: Float[Tensor, "b q d"], where: QueryPosition, blocked: Bool[Tensor, "q q"] | None
    ) -> Float[Tensor, "b q d"]:
        """Mix the queries; `blocked[i, j]`: query i does not see query j."""
        query = self.content_query(content) + self.pos_query(where.pos)
        key = self.content_key(content) + self.pos_key(where.pos)
        dropout = self.dropout if self.training else 0.0
        attended = None if blocked is None else ~blocked
        gathered = attend(query, key, self.value(content), self.num_heads, attended, dropout)
        out: Tensor = self.out_proj(gathered)
        return out


class ConditionalAttention(nn.Module):
    """Content is compared with content and place with place, head by head (Conditional DETR, section 3.3).

    With `add_position` the queries' positions also join the content, as in DETR; official models do this
    in the first layer only.
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
        self, content: Float[Tensor, "b q d"], where: QueryPosition, memory: Memory
    ) -> Float[Tensor, "b q d"]:
        """Gather from the unpadded tokens."""
        assert where.spatial is not None
        query, key = self.content_query(content), self.content_key(memory.tokens)
        place = self.pos_key(memory.pos)
        if self.pos_query is not None:
            query, key = query + self.pos_query(where.pos), key + place
        query = self._pair(query, self.spatial_query(where.spatial))
        attended, dropout = ~memory.padding[:, None, None, :], self.dropout if self.training else 0.0
        value = self.value(memory.tokens)
        gathered = attend(query, self._pair(key, place), value, self.num_heads, attended, dropout)
        out: Tensor = self.out_proj(gathered)
        return out

    def _pair(self, content: Float[Tensor, "b n d"], place: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        heads = (*content.shape[:2], self.num_heads, -1)
        return torch.cat((content.view(heads), place.view(heads)), dim=-1).flatten(2)


class DeformableAttention(nn.Module):
    """Every query looks at a few points a level around its reference (Deformable DETR, eq. 3).

    `fused` may be set to False to compare: locations and weights then become tensors (`deform_attn_in_steps`), which
    is slower and gives the same up to rounding.
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
        """Head m starts by looking into direction m, point p at distance p + 1 (section 4.1, A.4)."""
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
        self, content: Float[Tensor, "b q d"], where: QueryPosition, memory: Memory
    ) -> Float[Tensor, "b q d"]:
        """Gather from sampled points. Positions, weights and sums are float32 at least, whatever the value is."""
        query = content + where.pos
        samples = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        logits = full_precision(self.attention_weights(query)).view(samples)
        offsets = full_precision(self.sampling_offsets(query)).view(*samples, 2)
        value = self.value_proj(memory.tokens).masked_fill(memory.padding[..., None], 0)
        value = value.view(*value.shape[:2], self.num_heads, value.shape[2] // self.num_heads)
        assert where.reference is not None
        reference = on_levels(where.reference, memory)
        deform_attn = deform_attn_fused if self.fused else deform_attn_in_steps
        out: Tensor = self.output_proj(deform_attn(value, memory.shapes, reference, offsets, logits))
        return out


def on_levels(reference: Float[Tensor, "b q k"], memory: Memory) -> Float[Tensor, "b q l k"]:
    """Points or boxes relative to each padded level instead of to the image."""
    ratios = memory.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)
    return reference[:, :, None] * ratios[:, None]


def _linear(hidden_dim: int) -> nn.Linear:
    return nn.Linear(hidden_dim, hidden_dim)
