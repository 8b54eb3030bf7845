"""Build the parts that several papers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Int
from torch import Tensor, nn

from detrs.attention import ConditionalAttention, DenseAttention, SeparateSelfAttention
from detrs.backbone import BackboneConfig
from detrs.criterion import Criterion
from detrs.decoder import DecoderLayer
from detrs.detector import STRIDES, Detector
from detrs.encoder import Encoder, EncoderLayer
from detrs.layers import FeedForward, Mlp, xavier_
from detrs.neck import LearnedEncoding, Neck, PositionEncoding
from detrs.structures import Detections, Predictions

Postprocess = Callable[[Predictions, Int[Tensor, "b 2"]], list[Detections]]
Activation = Literal["relu", "gelu", "prelu", "selu"]
PositionKind = Literal["sine", "learned"]

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "prelu": nn.PReLU,
    "selu": nn.SELU,
}


@dataclass(frozen=True)
class Model:
    """A detector with its criterion and its postprocessing.

    `postprocess(predictions, sizes)` takes the original (height, width) of each image in pixels.
    """

    detector: Detector
    criterion: Criterion
    postprocess: Postprocess


def level_widths(backbone: BackboneConfig, strides: tuple[int, ...]) -> list[int]:
    """Return the channels of the backbone levels with these strides.

    Raises:
        ValueError: there is no such level.
    """
    if not strides or not set(strides) <= set(STRIDES) or list(strides) != sorted(set(strides)):
        raise ValueError(f"model.strides: {strides} is not an ascending choice of {STRIDES}")
    return [backbone.widths[STRIDES.index(stride)] for stride in strides]


def dense_neck(
    backbone: BackboneConfig,
    hidden_dim: int,
    kind: PositionKind,
    sine: PositionEncoding | None = None,
) -> Neck:
    """Build a neck with one level, layer4, projected without a norm, as in DETR."""
    position = LearnedEncoding(hidden_dim) if kind == "learned" else sine or PositionEncoding()
    return Neck([backbone.widths[-1]], hidden_dim, 1, position, group_norm=False, level_embed=False)


def dense_encoder(
    num_layers: int,
    hidden_dim: int,
    num_heads: int,
    ffn_dim: int,
    dropout: float,
    *,
    activation: Activation = "relu",
    pre_norm: bool = False,
    final_norm: bool = False,
    scale_position: bool = False,
) -> Encoder:
    """Build an encoder with dense attention, initialized as in the official code."""

    def layer() -> EncoderLayer:
        feed_forward = feed_forward_of(hidden_dim, ffn_dim, dropout, activation)
        attention = DenseAttention(hidden_dim, num_heads, dropout)
        return EncoderLayer(attention, feed_forward, hidden_dim, dropout, pre_norm)

    encoder = Encoder(
        (layer() for _ in range(num_layers)),
        norm=nn.LayerNorm(hidden_dim) if final_norm else None,
        position_scale=Mlp(hidden_dim, hidden_dim, hidden_dim) if scale_position else None,
    )
    xavier_(encoder)
    return encoder


def feed_forward_of(hidden_dim: int, ffn_dim: int, dropout: float, activation: Activation) -> FeedForward:
    """Build a feed-forward with an activation by its name."""
    return FeedForward(hidden_dim, ffn_dim, dropout, _ACTIVATIONS[activation]())


def conditional_decoder_layers(
    num_layers: int,
    hidden_dim: int,
    num_heads: int,
    ffn_dim: int,
    dropout: float,
    *,
    activation: Activation = "relu",
    self_attention: bool = True,
    add_position: bool = False,
) -> nn.ModuleList:
    """Build decoder layers with conditional cross-attention; the first layer, or all, add the query positions."""
    layers = nn.ModuleList(
        DecoderLayer(
            SeparateSelfAttention(hidden_dim, num_heads, dropout) if self_attention else None,
            ConditionalAttention(hidden_dim, num_heads, dropout, add_position=add_position or i == 0),
            feed_forward_of(hidden_dim, ffn_dim, dropout, activation),
            hidden_dim,
            dropout,
        )
        for i in range(num_layers)
    )
    xavier_(layers)
    return layers
