"""DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR (Liu et al., ICLR 2022, arXiv:2201.12329).

Idea: the position of a query is a learned box that every layer refines. It determines center and shape of the
attention.

Parent: Conditional DETR. Differences:
- the position embedding is a function of the box, and each layer refines the box;
- attention is scaled by the width and height of the box;
- the encoder scales its position encoding by a function of the content;
- PReLU instead of ReLU, no dropout, a position encoding with temperature 20.

Variants: the arguments of the official constructors, and random centers that stay fixed (appendix H).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from detrs.backbone import BackboneConfig, build_backbone
from detrs.criterion import Criterion, LossConfig
from detrs.decoder import Decoder
from detrs.detector import Detector
from detrs.layers import box_head, class_head, xavier_
from detrs.neck import PositionEncoding
from detrs.postprocess import best_pairs
from detrs.queries import AnchorQueries
from detrs.query_position import ModulatedAnchorPosition, PositionScale
from detrs.zoo.checks import require_default, require_loss, require_num_classes, require_sizes
from detrs.zoo.parts import (
    Activation,
    Model,
    PositionKind,
    conditional_decoder_layers,
    dense_encoder,
    dense_neck,
)


@dataclass(frozen=True)
class DabDetrConfig:
    """Settings of DAB-DETR. The default is the R50 model of the paper.

    It has 43.7 M parameters with 91 classes. For DC5, set `backbone.dilation`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    architecture: Literal["dab_detr"] = "dab_detr"
    num_classes: int | None = None  # None: taken from the data
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    position_encoding: PositionKind = "sine"  # learned: feature maps of up to 50x50
    position_temperature: float = 20.0  # of the sine encoding
    position_temperature_y: float | None = None  # of its vertical axis; None: the same
    hidden_dim: int = 256
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    ffn_dim: int = 2048
    dropout: float = 0.0
    activation: Activation = "prelu"
    encoder_norm: bool = False  # after the last encoder layer; all that `pre_norm` does in the official code
    decoder_self_attention: bool = True
    num_queries: int = 300
    num_patterns: int = 0  # learned contents per box; 0: one content of zeros
    anchor: Literal["box", "point"] = "box"  # what a query learns
    random_points: bool = False  # initialize the box centers uniformly over the image
    fixed_points: bool = False  # do not train the random centers (appendix H); the official code does
    refinement: bool = True  # each layer refines the box; without it, all start from the learned one
    modulate_attention: bool = True  # scale attention by the width and height of the box
    position_scale: PositionScale = "elementwise"  # see ModulatedAnchorPosition
    keep_query_position: bool = False  # all layers add the query positions, not only the first
    shared_box_heads: bool = True
    aux_loss: bool = True
    loss: LossConfig = field(default_factory=LossConfig)
    num_select: int = 300  # detections per image


def build_dab_detr(config: DabDetrConfig) -> Model:
    """Build a DAB-DETR with new weights.

    Raises:
        ValueError: a setting that cannot be built; the message names it.
    """
    num_classes = require_num_classes(config.num_classes)
    require_sizes(config)
    require_loss(config.loss, "focal", "mal")
    if not (config.aux_loss or config.shared_box_heads):
        raise ValueError(
            "model.aux_loss: must be true with shared_box_heads=false: it trains the heads of all layers but the last"
        )
    if config.fixed_points and not config.random_points:
        raise ValueError("model.fixed_points: requires model.random_points=true, as in the paper")
    if config.anchor == "point" and (config.modulate_attention or config.fixed_points):
        name = "modulate_attention" if config.modulate_attention else "fixed_points"
        raise ValueError(
            f"model.{name}: must be false with model.anchor=point, which has no width and height"
        )
    if config.num_decoder_layers == 1:
        require_default(config, ("refinement",), "with model.num_decoder_layers=1")
    if config.position_encoding == "learned":
        temperatures = ("position_temperature", "position_temperature_y")
        require_default(config, temperatures, "with model.position_encoding=learned")
    sine = PositionEncoding(config.position_temperature, temperature_y=config.position_temperature_y)
    detector = Detector(
        build_backbone(config.backbone),
        (32,),
        dense_neck(config.backbone, config.hidden_dim, config.position_encoding, sine),
        dense_encoder(
            config.num_encoder_layers,
            config.hidden_dim,
            config.num_heads,
            config.ffn_dim,
            config.dropout,
            activation=config.activation,
            final_norm=config.encoder_norm,
            scale_position=config.num_encoder_layers > 0,
        ),
        AnchorQueries(
            config.num_queries,
            config.hidden_dim,
            config.num_patterns,
            random_points=config.random_points,
            fixed_points=config.fixed_points,
            sides=config.anchor == "box",
        ),
        _decoder(config, num_classes),
    )
    criterion = Criterion(config.loss, giou_eps=1e-6, aux_loss=config.aux_loss)
    return Model(detector, criterion, functools.partial(best_pairs, num_select=config.num_select))


def _decoder(config: DabDetrConfig, num_classes: int) -> Decoder:
    query_position = ModulatedAnchorPosition(
        config.hidden_dim,
        config.num_decoder_layers,
        config.position_scale,
        modulate=config.modulate_attention,
        sides=config.anchor == "box",
    )
    xavier_(query_position)
    num_box_heads = 1 if config.shared_box_heads else config.num_decoder_layers
    return Decoder(
        conditional_decoder_layers(
            config.num_decoder_layers,
            config.hidden_dim,
            config.num_heads,
            config.ffn_dim,
            config.dropout,
            activation=config.activation,
            self_attention=config.decoder_self_attention,
            add_position=config.keep_query_position,
        ),
        query_position,
        [class_head(config.hidden_dim, num_classes)],
        [box_head(config.hidden_dim) for _ in range(num_box_heads)],
        norm=nn.LayerNorm(config.hidden_dim),
        refinement="look_forward_twice" if config.refinement else "none",
        eps=1e-3,
        refine_sides=config.anchor == "box",
    )
