"""Where queries look: from the queries and their references to each layer's `Where`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detrs.attention import Where
from detrs.layers import Mlp, sine_encoding
from detrs.structures import Memory, Queries


class LearnedPosition(nn.Module):
    """The queries' own position embedding, the same at every layer (DETR, Deformable DETR)."""

    def forward(
        self,
        layer: int,
        content: Float[Tensor, "b q d"],
        queries: Queries,
        reference: Float[Tensor, "b q k"] | None,
        memory: Memory,
    ) -> Where:
        """The learned position and the current reference."""
        assert queries.pos is not None
        return Where(queries.pos, reference=reference)


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
    ) -> Where:
        """Encode the box as the finest level sees it, padding included."""
        finest = memory.valid_ratios[:, None, 0]
        encoding = box_encoding(reference * torch.cat((finest, finest), dim=-1), self.hidden_dim // 2)
        return Where(self.embed(encoding), reference=reference)


def box_encoding(boxes: Float[Tensor, "b q 4"], dim: int) -> Float[Tensor, "b q e"]:
    """Sine encoding of boxes in the order (y, x, w, h), `dim` features each."""
    x, y, width, height = boxes.unbind(-1)
    return sine_encoding(torch.stack((y, x, width, height), dim=-1), dim)
