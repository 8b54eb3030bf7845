"""Compute the position of the queries for each decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detrs.layers import Mlp, full_precision, sine_encoding
from detrs.structures import Memory, Queries

PositionScale = Literal["elementwise", "scalar", "learned"]


@dataclass(frozen=True)
class QueryPosition:
    """The position of each query, in the forms that the attention variants take."""

    pos: Float[Tensor, "b q d"]  # added to the content, or projected and added
    spatial: Float[Tensor, "b q d"] | None = None  # the separate spatial query of conditional attention
    reference: Float[Tensor, "b q k"] | None = None  # point or box in [0, 1], for deformable attention


class LearnedPosition(nn.Module):
    """Learned position embedding, the same in every layer (DETR, Deformable DETR)."""

    def forward(
        self,
        layer: int,
        content: Float[Tensor, "b q d"],
        queries: Queries,
        reference: Float[Tensor, "b q k"] | None,
        memory: Memory,
    ) -> QueryPosition:
        """Return the learned position and the current reference."""
        assert queries.pos is not None
        return QueryPosition(queries.pos, reference=reference)


class PointPosition(nn.Module):
    """Learned position, and a spatial query: the encoding of the reference point, scaled by the content.

    Source: Conditional DETR, section 3.3. The first layer does not scale.
    """

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.scale = Mlp(hidden_dim, hidden_dim, hidden_dim)

    def forward(
        self,
        layer: int,
        content: Float[Tensor, "b q d"],
        queries: Queries,
        reference: Float[Tensor, "b q 2"],
        memory: Memory,
    ) -> QueryPosition:
        """Return the learned position and the spatial query of this layer."""
        assert queries.pos is not None
        spatial = sine_encoding(reference.flip(-1), self.hidden_dim // 2)  # (y, x)
        return QueryPosition(queries.pos, spatial if layer == 0 else spatial * self.scale(content), reference)


class ModulatedAnchorPosition(nn.Module):
    """Position and spatial query computed from the reference box (DAB-DETR, section 4), or from a point.

    Args:
        hidden_dim: width of a query.
        num_layers: decoder layers.
        scale: factor of the spatial query: "elementwise" or "scalar", computed from the content from the
            second layer on; "learned", one vector per layer.
        modulate: scale the attention by the box's width and height (eq. 6).
        sides: the references are boxes, not points.
    """

    def __init__(
        self, hidden_dim: int, num_layers: int, scale: PositionScale, *, modulate: bool, sides: bool = True
    ) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.embed = Mlp(2 * hidden_dim if sides else hidden_dim, hidden_dim, hidden_dim)
        width = 1 if scale == "scalar" else hidden_dim
        learned = scale == "learned"
        self.scale = nn.Embedding(num_layers, width) if learned else Mlp(hidden_dim, hidden_dim, width)
        self.sides = Mlp(hidden_dim, hidden_dim, 2) if modulate else None

    def forward(
        self,
        layer: int,
        content: Float[Tensor, "b q d"],
        queries: Queries,
        reference: Float[Tensor, "b q k"],
        memory: Memory,
    ) -> QueryPosition:
        """Encode the box or point for this layer."""
        encoding = box_encoding(reference, self.hidden_dim // 2)
        spatial = encoding[..., : self.hidden_dim]  # of (y, x)
        if isinstance(self.scale, nn.Embedding):
            spatial = spatial * self.scale.weight[layer]
        elif layer > 0:
            spatial = spatial * self.scale(content)
        if self.sides is not None:
            ratio = full_precision(self.sides(content)).sigmoid() / reference[..., 2:]  # of (w, h)
            spatial = spatial * ratio.flip(-1).repeat_interleave(self.hidden_dim // 2, dim=-1)
        return QueryPosition(self.embed(encoding), spatial, reference)


class AnchorPosition(nn.Module):
    """Position embedding computed from the reference box (DAB-DETR, eq. 3; DINO).

    With `scale`, it is multiplied by a function of the content from the second layer on (DAB-Deformable-DETR).
    """

    def __init__(self, hidden_dim: int, *, scale: bool = False) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.embed = Mlp(2 * hidden_dim, hidden_dim, hidden_dim)
        self.scale = Mlp(hidden_dim, hidden_dim, hidden_dim) if scale else None

    def forward(
        self,
        layer: int,
        content: Float[Tensor, "b q d"],
        queries: Queries,
        reference: Float[Tensor, "b q 4"],
        memory: Memory,
    ) -> QueryPosition:
        """Encode the box relative to the finest level, padding included, as the official code does."""
        finest = memory.valid_ratios[:, None, 0]
        encoding = box_encoding(reference * torch.cat((finest, finest), dim=-1), self.hidden_dim // 2)
        pos = self.embed(encoding)
        if self.scale is not None and layer > 0:
            pos = pos * self.scale(content)
        return QueryPosition(pos, reference=reference)


def box_encoding(boxes: Float[Tensor, "b q k"], dim: int) -> Float[Tensor, "b q e"]:
    """Return the sine encoding of boxes in the order (y, x, w, h), or of points in the order (y, x).

    There are `dim` features for each.
    """
    x, y, *sides = boxes.unbind(-1)
    return sine_encoding(torch.stack((y, x, *sides), dim=-1), dim)
