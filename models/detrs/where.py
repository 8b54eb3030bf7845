"""Where queries look: from the queries and their references to each layer's `QueryPosition`."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detrs.attention import QueryPosition
from detrs.layers import Mlp, full_precision, sine_encoding
from detrs.structures import Memory, Queries

PositionScale = Literal["elementwise", "scalar", "learned"]


class LearnedPosition(nn.Module):
    """The queries' own position embedding, the same at every layer (DETR, Deformable DETR)."""

    def forward(
        self,
        layer: int,
        content: Float[Tensor, "b q d"],
        queries: Queries,
        reference: Float[Tensor, "b q k"] | None,
        memory: Memory,
    ) -> QueryPosition:
        """The learned position and the current reference."""
        assert queries.pos is not None
        return QueryPosition(queries.pos, reference=reference)


class PointPosition(nn.Module):
    """The learned position, and a spatial query: the reference point's encoding, scaled by the content.

    Source: Conditional DETR, section 3.3; the first layer does not scale.
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
        """The same position at every layer, the spatial query of this one."""
        assert queries.pos is not None
        spatial = sine_encoding(reference.flip(-1), self.hidden_dim // 2)  # (y, x)
        return QueryPosition(queries.pos, spatial if layer == 0 else spatial * self.scale(content), reference)


class ModulatedAnchorPosition(nn.Module):
    """Position and spatial query are functions of the reference box (DAB-DETR, section 4).

    Args:
        hidden_dim: width of a query.
        num_layers: decoder layers.
        scale: factor of the spatial query: "elementwise" or "scalar", computed from the content from the
            second layer on; "learned", a vector for each layer.
        modulate: stretch the attention along the box's sides (eq. 6).
    """

    def __init__(self, hidden_dim: int, num_layers: int, scale: PositionScale, *, modulate: bool) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.embed = Mlp(2 * hidden_dim, hidden_dim, hidden_dim)
        width = 1 if scale == "scalar" else hidden_dim
        learned = scale == "learned"
        self.scale = nn.Embedding(num_layers, width) if learned else Mlp(hidden_dim, hidden_dim, width)
        self.sides = Mlp(hidden_dim, hidden_dim, 2) if modulate else None

    def forward(
        self,
        layer: int,
        content: Float[Tensor, "b q d"],
        queries: Queries,
        reference: Float[Tensor, "b q 4"],
        memory: Memory,
    ) -> QueryPosition:
        """Encode the box for this layer."""
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
    """The position embedding is a function of the reference box (DAB-DETR, eq. 3; DINO)."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.embed = Mlp(2 * hidden_dim, hidden_dim, hidden_dim)

    def forward(
        self,
        layer: int,
        content: Float[Tensor, "b q d"],
        queries: Queries,
        reference: Float[Tensor, "b q 4"],
        memory: Memory,
    ) -> QueryPosition:
        """Encode the box as the finest level sees it, padding included."""
        finest = memory.valid_ratios[:, None, 0]
        encoding = box_encoding(reference * torch.cat((finest, finest), dim=-1), self.hidden_dim // 2)
        return QueryPosition(self.embed(encoding), reference=reference)


def box_encoding(boxes: Float[Tensor, "b q 4"], dim: int) -> Float[Tensor, "b q e"]:
    """Sine encoding of boxes in the order (y, x, w, h), `dim` features each."""
    x, y, width, height = boxes.unbind(-1)
    return sine_encoding(torch.stack((y, x, width, height), dim=-1), dim)
