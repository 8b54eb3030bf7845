"""Build the parts of the models with deformable attention."""

from __future__ import annotations

import copy

from torch import nn

from detrs.attention import DeformableAttention, SelfAttention
from detrs.backbone import BackboneConfig
from detrs.decoder import DecoderLayer
from detrs.encoder import Encoder, EncoderLayer
from detrs.layers import FeedForward, xavier_
from detrs.neck import Neck, PositionEncoding
from detrs.zoo.parts import level_widths


def deformable_neck(
    backbone: BackboneConfig,
    strides: tuple[int, ...],
    hidden_dim: int,
    num_levels: int,
    position: PositionEncoding,
    *,
    has_encoder: bool,
    level_embed: bool = True,
) -> Neck:
    """Build a neck with normalized projections; only an encoder uses positions and level embeddings.

    Raises:
        ValueError: the backbone has no such levels, or there are more of them than `num_levels`.
    """
    return Neck(
        level_widths(backbone, strides),
        hidden_dim,
        num_levels,
        position if has_encoder else None,
        group_norm=True,
        level_embed=has_encoder and level_embed,
    )


def deformable_encoder(
    num_layers: int,
    hidden_dim: int,
    num_heads: int,
    num_levels: int,
    num_points: int,
    ffn_dim: int,
    dropout: float,
) -> Encoder:
    """Build an encoder with deformable attention, initialized as in the official code."""

    def layer() -> EncoderLayer:
        attention = DeformableAttention(hidden_dim, num_heads, num_levels, num_points)
        feed_forward = FeedForward(hidden_dim, ffn_dim, dropout, nn.ReLU())
        return EncoderLayer(attention, feed_forward, hidden_dim, dropout, pre_norm=False)

    encoder = Encoder(layer() for _ in range(num_layers))
    initialize_(encoder)
    return encoder


def deformable_decoder_layers(
    num_layers: int,
    hidden_dim: int,
    num_heads: int,
    num_levels: int,
    num_points: int,
    ffn_dim: int,
    dropout: float,
) -> nn.ModuleList:
    """Build decoder layers with deformable cross-attention, initialized as in the official code."""
    layers = nn.ModuleList(
        DecoderLayer(
            SelfAttention(hidden_dim, num_heads, dropout),
            DeformableAttention(hidden_dim, num_heads, num_levels, num_points),
            FeedForward(hidden_dim, ffn_dim, dropout, nn.ReLU()),
            hidden_dim,
            dropout,
        )
        for _ in range(num_layers)
    )
    initialize_(layers)
    return layers


def initialize_(transformer: nn.Module) -> None:
    """Initialize all parameters with Xavier, then those of deformable attention in its own way."""
    xavier_(transformer)
    for module in transformer.modules():
        if isinstance(module, DeformableAttention):
            module.reset_parameters()


def clones(module: nn.Module, number: int) -> list[nn.Module]:
    """Return copies with equal values, to be trained separately."""
    return [copy.deepcopy(module) for _ in range(number)]
