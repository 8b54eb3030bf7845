"""DETR: End-to-End Object Detection with Transformers (Carion et al., ECCV 2020, arXiv:2005.12872).

Idea: predict a set. Each of a fixed number of learned queries becomes one box or "no object". Training matches boxes
and targets one to one, so that no duplicates have to be suppressed.

It is the root of the family: dense attention on one feature level, content that starts at zero, learned positions,
boxes predicted directly, softmax with a no-object class.

Variants: learned position encoding, pre-norm and DC5 of the official code; a sigmoid class loss without a no-object
class (DETR-DC5+, a baseline in table 1 of the Deformable DETR paper).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from detrs.attention import DenseAttention, SelfAttention
from detrs.backbone import BackboneConfig, build_backbone
from detrs.criterion import Criterion, LossConfig
from detrs.decoder import Decoder, DecoderLayer
from detrs.detector import Detector
from detrs.layers import Mlp, class_head, xavier_
from detrs.postprocess import best_classes, best_pairs
from detrs.queries import PositionQueries
from detrs.query_position import LearnedPosition
from detrs.zoo.checks import require_default, require_loss, require_num_classes, require_sizes
from detrs.zoo.parts import Activation, Model, PositionKind, dense_encoder, dense_neck, feed_forward_of


@dataclass(frozen=True)
class DetrConfig:
    """Settings of DETR. The default is the R50 model of the paper.

    It has 41.5 M parameters with 91 classes. For DC5, set `backbone.dilation`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    architecture: Literal["detr"] = "detr"
    num_classes: int | None = None  # None: taken from the data; "no object" is not counted
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    position_encoding: PositionKind = "sine"  # learned: feature maps of up to 50x50
    hidden_dim: int = 256
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    ffn_dim: int = 2048
    dropout: float = 0.1
    activation: Activation = "relu"
    pre_norm: bool = False
    num_queries: int = 100
    aux_loss: bool = True
    loss: LossConfig = field(default_factory=lambda: LossConfig("cross_entropy", class_cost=1.0))
    num_select: int = 100  # detections per image with a sigmoid loss; with cross_entropy, each query is one


def build_detr(config: DetrConfig) -> Model:
    """Build a DETR with new weights.

    Raises:
        ValueError: a setting that cannot be built; the message names it.
    """
    num_classes = require_num_classes(config.num_classes)
    require_sizes(config)
    require_loss(config.loss, "cross_entropy", "focal", "mal")
    softmax = config.loss.kind == "cross_entropy"
    if softmax:
        require_default(config, ("num_select",), "with model.loss.kind=cross_entropy")
    detector = Detector(
        build_backbone(config.backbone),
        (32,),
        dense_neck(config.backbone, config.hidden_dim, config.position_encoding),
        dense_encoder(
            config.num_encoder_layers,
            config.hidden_dim,
            config.num_heads,
            config.ffn_dim,
            config.dropout,
            activation=config.activation,
            pre_norm=config.pre_norm,
            final_norm=config.pre_norm,
        ),
        PositionQueries(config.num_queries, config.hidden_dim, point=None),
        _decoder(config, num_classes),
    )
    criterion = Criterion(config.loss, giou_eps=0.0, aux_loss=config.aux_loss)
    postprocess = best_classes if softmax else functools.partial(best_pairs, num_select=config.num_select)
    return Model(detector, criterion, postprocess)


def _decoder(config: DetrConfig, num_classes: int) -> Decoder:
    dim = config.hidden_dim
    layers = nn.ModuleList(
        DecoderLayer(
            SelfAttention(dim, config.num_heads, config.dropout),
            DenseAttention(dim, config.num_heads, config.dropout),
            feed_forward_of(dim, config.ffn_dim, config.dropout, config.activation),
            dim,
            config.dropout,
            config.pre_norm,
        )
        for _ in range(config.num_decoder_layers)
    )
    xavier_(layers)
    has_no_object = config.loss.kind == "cross_entropy"
    return Decoder(
        layers,
        LearnedPosition(),
        [nn.Linear(dim, num_classes + 1) if has_no_object else class_head(dim, num_classes)],
        [Mlp(dim, dim, dim, 4)],
        norm=nn.LayerNorm(dim),
        refinement="none",
        eps=0.0,  # there is no reference
    )
