"""The decoder: one loop for the whole family. It owns the heads, because refinement needs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrs.attention import QueryPosition
from detrs.layers import FeedForward, full_precision, inverse_sigmoid
from detrs.structures import Memory, Predictions, Queries

Refinement = Literal["none", "detached", "look_forward_twice"]


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward; residuals normalised after (or before: `pre_norm`)."""

    def __init__(
        self,
        self_attention: nn.Module,
        cross_attention: nn.Module,
        feed_forward: FeedForward,
        hidden_dim: int,
        dropout: float,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = self_attention, cross_attention
        self.feed_forward, self.pre_norm = feed_forward, pre_norm
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(hidden_dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        where: QueryPosition,
        memory: Memory,
        blocked: Bool[Tensor, "q q"] | None,
    ) -> Float[Tensor, "b q d"]:
        """The queries' new content."""
        if self.pre_norm:
            x = x + self.dropout(self.self_attention(self.norm1(x), where, blocked))
            x = x + self.dropout(self.cross_attention(self.norm2(x), where, memory))
            out: Tensor = x + self.dropout(self.feed_forward(self.norm3(x)))
            return out
        x = self.norm1(x + self.dropout(self.self_attention(x, where, blocked)))
        x = self.norm2(x + self.dropout(self.cross_attention(x, where, memory)))
        out = self.norm3(x + self.dropout(self.feed_forward(x)))
        return out


class Decoder(nn.Module):
    """Layers, heads and the refinement between them.

    Args:
        layers: the layers, in order.
        where: called before each layer, says where its queries look.
        class_heads, box_heads: one for each layer, or a single one shared by all.
        norm: applied to a layer's output before the heads, but not before the next layer.
        refinement: "none": every layer starts from the queries' reference. "detached": a layer's boxes are
            the next one's references, without gradient (Deformable DETR, A.4). "look_forward_twice": the next
            layer looks without gradient, but its boxes pass it back to this one (DINO, section 3.5).
        eps: of the logit of a reference; the papers' code differs.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        where: nn.Module,
        class_heads: Iterable[nn.Module],
        box_heads: Iterable[nn.Module],
        *,
        norm: nn.Module | None,
        refinement: Refinement,
        eps: float,
    ) -> None:
        super().__init__()
        self.layers, self.where = layers, where
        self.class_heads, self.box_heads = nn.ModuleList(class_heads), nn.ModuleList(box_heads)
        self.norm, self.refinement, self.eps = norm, refinement, eps

    def forward(self, queries: Queries, memory: Memory) -> Predictions:
        """Class logits and boxes after every layer."""
        x = queries.content
        reference = queries.reference  # where the next layer looks
        start = queries.reference  # what its box deltas are added to
        logits, boxes = [], []
        for i, layer in enumerate(self.layers):
            where = self.where(i, x, queries, reference, memory)
            x = layer(x, where, memory, queries.blocked)
            normed = x if self.norm is None else self.norm(x)
            box_head = self.box_heads[min(i, len(self.box_heads) - 1)]
            logits.append(self.class_heads[min(i, len(self.class_heads) - 1)](normed))
            boxes.append(place(box_head(normed), start, self.eps))
            if self.refinement != "none" and i + 1 < len(self.layers):
                # refined from the state without the norm, as the official code does
                same = self.norm is None and self.refinement == "detached"
                refined = boxes[-1] if same else place(box_head(x), reference, self.eps)
                reference = refined.detach()
                start = refined if self.refinement == "look_forward_twice" else reference
        return Predictions(torch.stack(logits), torch.stack(boxes))


def place(
    delta: Float[Tensor, "b q 4"], reference: Float[Tensor, "b q k"] | None, eps: float
) -> Float[Tensor, "b q 4"]:
    """Boxes from deltas in logit space on top of a reference point or box; in float32 at least."""
    delta = full_precision(delta)
    if reference is None:
        return delta.sigmoid()
    return (delta + F.pad(inverse_sigmoid(reference, eps), (0, 4 - reference.shape[-1]))).sigmoid()
