"""Build the parts that several papers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from detrs.attention import ConditionalAttention, DenseAttention, SeparateSelfAttention
from detrs.backbone import BackboneConfig
from detrs.criterion import Criterion, LossConfig
from detrs.decoder import DecoderLayer
from detrs.detector import STRIDES, Detector
from detrs.encoder import Encoder, EncoderLayer
from detrs.layers import FeedForward, Mlp, xavier_
from detrs.neck import Neck, PositionEncoding
from detrs.structures import Detections, Predictions

Postprocess = Callable[[Predictions, Int[Tensor, "b 2"]], list[Detections]]


@dataclass(frozen=True)
class Model:
    """A detector with its criterion and its postprocessing.

    `postprocess(predictions, sizes)` takes the original (height, width) of each image in pixels.
    """

    detector: Detector
    criterion: Criterion
    postprocess: Postprocess


def require_num_classes(num_classes: int | None) -> int:
    """Return the number of classes.

    Raises:
        ValueError: it is missing, or less than 1.
    """
    if num_classes is None or num_classes < 1:
        raise ValueError(
            f"model.num_classes: {num_classes}; give the number of classes of the data, at least 1"
        )
    return num_classes


def require_sizes(config: Any) -> None:
    """Check the sizes of an architecture: positive numbers, and a width that can be divided.

    Raises:
        ValueError: a number is not positive, or the width cannot be divided among the heads and among the coordinates
            of a sine encoding.
    """
    for name in ("num_heads", "num_decoder_layers", "num_queries"):
        if getattr(config, name) < 1:
            raise ValueError(f"model.{name}: {getattr(config, name)} is not positive")
    if config.hidden_dim % config.num_heads or config.hidden_dim % 4:
        raise ValueError(
            f"model.hidden_dim: {config.hidden_dim} is not a multiple of 4 and of num_heads, {config.num_heads}"
        )


def require_loss(loss: LossConfig, *kinds: str) -> None:
    """Check that the class loss fits the class head, and that no setting of another loss is set.

    Raises:
        ValueError: it does not, or a setting has no effect.
    """
    if loss.kind not in kinds:
        head = "has a no-object class" if "cross_entropy" in kinds else "has no no-object class"
        raise ValueError(
            f"model.loss.kind: {loss.kind!r}, but the class head {head}: use {' or '.join(kinds)}"
        )
    ignored = ("alpha", "gamma") if loss.kind == "cross_entropy" else ("no_object_weight",)
    require_default(loss, ignored, f"with model.loss.kind={loss.kind}", prefix="model.loss")


def require_default(config: Any, names: Sequence[str], where: str, prefix: str = "model") -> None:
    """Check that settings have their default where they have no effect.

    Args:
        config: a dataclass.
        names: of its fields.
        where: when they have no effect, for the message.
        prefix: of the names, for the message.

    Raises:
        ValueError: one has another value.
    """
    defaults = {field.name: field.default for field in fields(config)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise ValueError(f"{prefix}.{name}: {getattr(config, name)!r} has no effect {where}: omit it")


def level_widths(backbone: BackboneConfig, strides: tuple[int, ...]) -> list[int]:
    """Return the channels of the backbone levels with these strides.

    Raises:
        ValueError: there is no such level.
    """
    if not strides or not set(strides) <= set(STRIDES) or list(strides) != sorted(set(strides)):
        raise ValueError(f"model.strides: {strides} is not an ascending choice of {STRIDES}")
    return [backbone.widths[STRIDES.index(stride)] for stride in strides]


def dense_neck(backbone: BackboneConfig, hidden_dim: int, temperature: float) -> Neck:
    """Build a neck with one level, layer4, projected without a norm, as in DETR."""
    position = PositionEncoding(temperature)
    return Neck([backbone.widths[-1]], hidden_dim, 1, position, group_norm=False, level_embed=False)


def dense_encoder(
    num_layers: int,
    hidden_dim: int,
    num_heads: int,
    ffn_dim: int,
    dropout: float,
    *,
    activation: type[nn.Module] = nn.ReLU,
    pre_norm: bool = False,
    scale_position: bool = False,
) -> Encoder:
    """Build an encoder with dense attention, initialized as in the official code."""

    def layer() -> EncoderLayer:
        feed_forward = FeedForward(hidden_dim, ffn_dim, dropout, activation())
        attention = DenseAttention(hidden_dim, num_heads, dropout)
        return EncoderLayer(attention, feed_forward, hidden_dim, dropout, pre_norm)

    encoder = Encoder(
        (layer() for _ in range(num_layers)),
        norm=nn.LayerNorm(hidden_dim) if pre_norm else None,
        position_scale=Mlp(hidden_dim, hidden_dim, hidden_dim) if scale_position else None,
    )
    xavier_(encoder)
    return encoder


def conditional_decoder_layers(
    num_layers: int,
    hidden_dim: int,
    num_heads: int,
    ffn_dim: int,
    dropout: float,
    *,
    activation: type[nn.Module] = nn.ReLU,
    add_position: bool = False,
) -> nn.ModuleList:
    """Build decoder layers with conditional cross-attention; the first layer, or all, add the query positions."""
    layers = nn.ModuleList(
        DecoderLayer(
            SeparateSelfAttention(hidden_dim, num_heads, dropout),
            ConditionalAttention(hidden_dim, num_heads, dropout, add_position=add_position or i == 0),
            FeedForward(hidden_dim, ffn_dim, dropout, activation()),
            hidden_dim,
            dropout,
        )
        for i in range(num_layers)
    )
    xavier_(layers)
    return layers
