"""Decode the queries: one loop for all models. It contains the heads, because refinement needs their output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrs.layers import FeedForward, call_layer, full_precision, inverse_sigmoid
from detrs.query_position import QueryPosition
from detrs.structures import Memory, Predictions, Queries

Refinement = Literal["none", "detached", "look_forward_twice"]


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, with layer norm after them (before with `pre_norm`).

    Without `self_attention`, queries do not interact (an option of DAB-DETR's official code).
    """

    def __init__(
        self,
        self_attention: nn.Module | None,
        cross_attention: nn.Module,
        feed_forward: FeedForward,
        hidden_dim: int,
        dropout: float,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = self_attention, cross_attention
        self.feed_forward, self.pre_norm = feed_forward, pre_norm
        self.norm1 = None if self_attention is None else nn.LayerNorm(hidden_dim)
        self.norm2, self.norm3 = nn.LayerNorm(hidden_dim), nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        position: QueryPosition,
        memory: Memory,
        attn_mask: Bool[Tensor, "q q"] | None,
    ) -> Float[Tensor, "b q d"]:
        """Return the new content of the queries."""
        self_attention, norm1 = self.self_attention, self.norm1
        if self_attention is not None and norm1 is not None:
            x = self._add(x, norm1, lambda y: self_attention(y, position, attn_mask))
        x = self._add(x, self.norm2, lambda y: self.cross_attention(y, position, memory))
        return self._add(x, self.norm3, self.feed_forward)

    def _add(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        added: Tensor = x + self.dropout(sublayer(norm(x) if self.pre_norm else x))
        out: Tensor = added if self.pre_norm else norm(added)
        return out


class Decoder(nn.Module):
    """Layers, heads and the refinement between them.

    Args:
        layers: the layers, in order.
        query_position: computes the `QueryPosition` of each layer.
        class_heads, box_heads: one per layer, or a single one shared by all layers.
        norm: applied to the output of a layer before the heads, but not before the next layer.
        refinement: "none": all layers use the reference of the queries. "detached": the boxes of a layer, without
            gradient, are the references of the next (Deformable DETR, A.4). "look_forward_twice": the next layer
            attends at detached references too, but its boxes pass gradients to this layer (DINO, section 3.5).
        eps: clamp of `inverse_sigmoid` for references; it differs between the papers.
        refine_sides: refined references are boxes; False: points.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        query_position: nn.Module,
        class_heads: Iterable[nn.Module],
        box_heads: Iterable[nn.Module],
        *,
        norm: nn.Module | None,
        refinement: Refinement,
        eps: float,
        refine_sides: bool = True,
    ) -> None:
        super().__init__()
        self.layers, self.query_position = layers, query_position
        self.class_heads, self.box_heads = nn.ModuleList(class_heads), nn.ModuleList(box_heads)
        self.norm, self.refinement, self.eps, self.refine_sides = norm, refinement, eps, refine_sides
        self.activation_checkpointing = False

    def forward(self, queries: Queries, memory: Memory) -> Predictions:
        """Return class logits and boxes after every layer."""
        x = queries.content
        reference = queries.reference  # the next layer attends here
        start = queries.reference  # and its box deltas are added to this
        logits, boxes = [], []
        for i, layer in enumerate(self.layers):
            position = self.query_position(i, x, queries, reference, memory)
            inputs = (x, position, memory, queries.attn_mask)
            x = call_layer(layer, *inputs, recompute=self.activation_checkpointing)
            normed = x if self.norm is None else self.norm(x)
            box_head = self.box_heads[min(i, len(self.box_heads) - 1)]
            logits.append(self.class_heads[min(i, len(self.class_heads) - 1)](normed))
            boxes.append(decode_boxes(box_head(normed), start, self.eps))
            if self.refinement != "none" and i + 1 < len(self.layers):
                # The official code refines from the output before the norm
                same = self.norm is None and self.refinement == "detached"
                refined = boxes[-1] if same else decode_boxes(box_head(x), reference, self.eps)
                refined = refined if self.refine_sides else refined[..., :2]
                reference = refined.detach()
                start = refined if self.refinement == "look_forward_twice" else reference
        return Predictions(torch.stack(logits), torch.stack(boxes))


def decode_boxes(
    delta: Float[Tensor, "b q 4"], reference: Float[Tensor, "b q k"] | None, eps: float
) -> Float[Tensor, "b q 4"]:
    """Add deltas in logit space to a reference point or box; return boxes in float32 or wider."""
    delta = full_precision(delta)
    if reference is None:
        return delta.sigmoid()
    return (delta + F.pad(inverse_sigmoid(reference, eps), (0, 4 - reference.shape[-1]))).sigmoid()
