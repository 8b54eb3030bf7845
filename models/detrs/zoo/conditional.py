"""Conditional DETR for Fast Training Convergence (Meng et al., ICCV 2021, arXiv:2108.06152).

Idea: in cross-attention, compare content with content and position with position, and scale the position by a function
of the content. Heads then find the extremities of objects before the content is good.

Parent: DETR. Differences:
- cross-attention is conditional: per head, content and spatial parts are concatenated;
- self-attention has separate projections of content and position;
- a reference point is predicted from the position of each query; boxes are offsets from it;
- sigmoid focal loss without a no-object class.

Variants: reference points that are parameters (section 3.3); learned position encoding and DC5 of the official code.
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
from detrs.postprocess import best_pairs
from detrs.queries import PointSource, PositionQueries
from detrs.query_position import PointPosition
from detrs.zoo.checks import require_loss, require_num_classes, require_sizes
from detrs.zoo.parts import (
    Activation,
    Model,
    PositionKind,
    conditional_decoder_layers,
    dense_encoder,
    dense_neck,
)


@dataclass(frozen=True)
class ConditionalDetrConfig:
    """Settings of Conditional DETR. The default is the R50 model of the paper.

    It has 43.4 M parameters with 91 classes. For DC5, set `backbone.dilation`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    architecture: Literal["conditional_detr"] = "conditional_detr"
    num_classes: int | None = None  # None: taken from the data
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    position_encoding: PositionKind = "sine"  # learned: feature maps of up to 50x50
    hidden_dim: int = 256
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    ffn_dim: int = 2048
    dropout: float = 0.1
    activation: Activation = "relu"
    num_queries: int = 300
    reference_point: PointSource = "predicted"  # from the query's position; or learned as a parameter
    aux_loss: bool = True
    loss: LossConfig = field(default_factory=lambda: LossConfig(class_weight=2.0))
    num_select: int = 100  # detections per image


def build_conditional_detr(config: ConditionalDetrConfig) -> Model:
    """Build a Conditional DETR with new weights.

    Raises:
        ValueError: a setting that cannot be built; the message names it.
    """
    num_classes = require_num_classes(config.num_classes)
    require_sizes(config)
    require_loss(config.loss, "focal", "mal")
    sizes = (config.hidden_dim, config.num_heads, config.ffn_dim, config.dropout)
    queries = PositionQueries(config.num_queries, config.hidden_dim, point=config.reference_point)
    query_position = PointPosition(config.hidden_dim)
    if queries.point is not None:
        xavier_(queries.point)
    xavier_(query_position)
    detector = Detector(
        build_backbone(config.backbone),
        (32,),
        dense_neck(config.backbone, config.hidden_dim, config.position_encoding),
        dense_encoder(config.num_encoder_layers, *sizes, activation=config.activation),
        queries,
        Decoder(
            conditional_decoder_layers(config.num_decoder_layers, *sizes, activation=config.activation),
            query_position,
            [class_head(config.hidden_dim, num_classes)],
            [box_head(config.hidden_dim)],
            norm=nn.LayerNorm(config.hidden_dim),
            refinement="none",
            eps=1e-5,
        ),
    )
    criterion = Criterion(config.loss, giou_eps=0.0, aux_loss=config.aux_loss)
    return Model(detector, criterion, functools.partial(best_pairs, num_select=config.num_select))
