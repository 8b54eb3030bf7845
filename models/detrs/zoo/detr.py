"""DETR: End-to-End Object Detection with Transformers (Carion et al., ECCV 2020, arXiv:2005.12872).

Idea: predict a set. Each of a fixed number of learned queries becomes one box or "no object". Training matches boxes
and targets one to one, so that no duplicates have to be suppressed.

It is the root of the family: dense attention on one feature level, content that starts at zero, learned positions,
boxes predicted directly, softmax with a no-object class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from detrs.attention import DenseAttention, SelfAttention
from detrs.backbone import BackboneConfig, build_backbone
from detrs.criterion import Criterion, LossConfig
from detrs.decoder import Decoder, DecoderLayer
from detrs.detector import Detector
from detrs.layers import FeedForward, Mlp, xavier_
from detrs.postprocess import best_classes
from detrs.queries import PositionQueries
from detrs.query_position import LearnedPosition
from detrs.zoo.parts import Model, dense_encoder, dense_neck, require_loss, require_num_classes, require_sizes


@dataclass(frozen=True)
class DetrConfig:
    """Settings of DETR. The default is the R50 model of the paper.

    It has 41.5 M parameters with 91 classes. For DC5, set `backbone.dilation`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    architecture: Literal["detr"] = "detr"
    num_classes: int | None = None  # None: taken from the data; "no object" is not counted
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    hidden_dim: int = 256
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    ffn_dim: int = 2048
    dropout: float = 0.1
    pre_norm: bool = False
    num_queries: int = 100
    aux_loss: bool = True
    loss: LossConfig = field(default_factory=lambda: LossConfig("cross_entropy", class_cost=1.0))


def build_detr(config: DetrConfig) -> Model:
    """Build a DETR with new weights.

    Raises:
        ValueError: a setting that cannot be built; the message names it.
    """
    num_classes = require_num_classes(config.num_classes)
    require_sizes(config)
    require_loss(config.loss, "cross_entropy")
    detector = Detector(
        build_backbone(config.backbone),
        (32,),
        dense_neck(config.backbone, config.hidden_dim, temperature=10000.0),
        dense_encoder(
            config.num_encoder_layers,
            config.hidden_dim,
            config.num_heads,
            config.ffn_dim,
            config.dropout,
            pre_norm=config.pre_norm,
        ),
        PositionQueries(config.num_queries, config.hidden_dim, point=False),
        _decoder(config, num_classes),
    )
    criterion = Criterion(config.loss, giou_eps=0.0, aux_loss=config.aux_loss)
    return Model(detector, criterion, best_classes)


def _decoder(config: DetrConfig, num_classes: int) -> Decoder:
    dim = config.hidden_dim
    layers = nn.ModuleList(
        DecoderLayer(
            SelfAttention(dim, config.num_heads, config.dropout),
            DenseAttention(dim, config.num_heads, config.dropout),
            FeedForward(dim, config.ffn_dim, config.dropout, nn.ReLU()),
            dim,
            config.dropout,
            config.pre_norm,
        )
        for _ in range(config.num_decoder_layers)
    )
    xavier_(layers)
    return Decoder(
        layers,
        LearnedPosition(),
        [nn.Linear(dim, num_classes + 1)],
        [Mlp(dim, dim, dim, 4)],
        norm=nn.LayerNorm(dim),
        refinement="none",
        eps=0.0,  # there is no reference
    )
