"""DINO: DETR with Improved DeNoising Anchor Boxes (Zhang et al., ICLR 2023, arXiv:2203.03605).

Idea: also train the decoder on queries made from noised targets, including near misses that it must reject (contrastive
denoising).

Parent: two-stage Deformable DETR. Differences:
- the boxes of the queries come from the best tokens of the encoder, ranked by their best class; the content is learned
  (mixed query selection);
- the position embedding of a query is a function of its box (DAB-DETR);
- the box loss of a layer also trains the layer before (look forward twice);
- all decoder layers share the heads.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from detrs.backbone import BackboneConfig, build_backbone
from detrs.criterion import Criterion, LossConfig
from detrs.decoder import Decoder
from detrs.denoising import Denoising, GroupRule
from detrs.detector import Detector
from detrs.layers import box_head, class_head, xavier_
from detrs.neck import Neck, PositionEncoding
from detrs.postprocess import best_pairs
from detrs.queries import EncoderBoxes, Proposals
from detrs.query_position import AnchorPosition
from detrs.zoo.parts import (
    Model,
    clones,
    deformable_decoder_layers,
    deformable_encoder,
    level_widths,
    require_default,
    require_loss,
    require_num_classes,
    require_sizes,
)


@dataclass(frozen=True)
class DinoConfig:
    """Settings of DINO. The default is the 4-scale R50 model of the paper.

    It has 46.9 M parameters with 91 classes.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    architecture: Literal["dino"] = "dino"
    num_classes: int | None = None  # None: taken from the data
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    strides: tuple[int, ...] = (8, 16, 32)  # of the backbone levels used; 5-scale: (4, 8, 16, 32)
    num_feature_levels: int = 4  # levels beyond those of the backbone are strided convolutions
    position_temperature: float = 20.0
    hidden_dim: int = 256
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    ffn_dim: int = 2048
    num_points: int = 4  # sampled per decoder query, head and level
    num_encoder_points: int = 4
    dropout: float = 0.0
    num_queries: int = 900
    proposal_size: float = 0.05  # side of the box priors on the finest level; doubled with every level
    shared_heads: bool = True  # one pair of heads for all decoder layers
    num_denoising: int = 100  # desired positive denoising queries per image; 0: no denoising
    denoising_groups: GroupRule = "official"
    label_noise: float = 0.5
    box_noise: float = 0.4
    # Without these three, as in the ablation of the paper: denoising without negatives (DN-DETR); the
    # features of the chosen tokens as content (pure query selection); boxes detached between layers, as in the parent
    contrastive_denoising: bool = True
    mixed_selection: bool = True
    look_forward_twice: bool = True
    aux_loss: bool = True
    loss: LossConfig = field(default_factory=LossConfig)
    num_select: int = 300  # detections per image


def build_dino(config: DinoConfig) -> Model:
    """Build a DINO with new weights.

    Raises:
        ValueError: a setting that cannot be built; the message names it.
    """
    num_classes = require_num_classes(config.num_classes)
    require_sizes(config)
    require_loss(config.loss, "focal", "mal")
    if config.num_denoising == 0:
        require_default(config, ("contrastive_denoising",), "with model.num_denoising=0")
    if config.num_decoder_layers == 1:
        require_default(config, ("look_forward_twice",), "with model.num_decoder_layers=1")
    classify, regress = class_head(config.hidden_dim, num_classes), box_head(config.hidden_dim)
    # The heads of the encoder start as copies of those of the decoder
    proposals = Proposals(
        config.hidden_dim, copy.deepcopy(classify), copy.deepcopy(regress), config.proposal_size
    )
    detector = Detector(
        build_backbone(config.backbone),
        config.strides,
        _neck(config),
        deformable_encoder(
            config.num_encoder_layers, config.hidden_dim, config.num_heads, config.num_feature_levels,
            config.num_encoder_points, config.ffn_dim, config.dropout,
        ),
        EncoderBoxes(config.num_queries, config.hidden_dim, proposals, mixed=config.mixed_selection),
        _decoder(config, classify, regress),
        _denoising(config, num_classes),
        min_tokens=config.num_queries,
    )  # fmt: skip
    criterion = Criterion(
        config.loss,
        giou_eps=1e-6,
        aux_loss=config.aux_loss,
        denoising=detector.denoising is not None,
        first_stage="interm",
    )
    return Model(detector, criterion, functools.partial(best_pairs, num_select=config.num_select))


def _neck(config: DinoConfig) -> Neck:
    encoded = config.num_encoder_layers > 0  # only the encoder uses positions
    return Neck(
        level_widths(config.backbone, config.strides),
        config.hidden_dim,
        config.num_feature_levels,
        PositionEncoding(config.position_temperature) if encoded else None,
        group_norm=True,
        level_embed=encoded,
    )


def _decoder(config: DinoConfig, classify: nn.Module, regress: nn.Module) -> Decoder:
    num_pairs = 1 if config.shared_heads else config.num_decoder_layers
    if not (config.aux_loss or config.shared_heads):
        raise ValueError(
            "model.aux_loss: must be true with shared_heads=false: it trains the heads of all layers but the last"
        )
    query_position = AnchorPosition(config.hidden_dim)
    xavier_(query_position)
    return Decoder(
        deformable_decoder_layers(
            config.num_decoder_layers, config.hidden_dim, config.num_heads, config.num_feature_levels,
            config.num_points, config.ffn_dim, config.dropout,
        ),
        query_position,
        clones(classify, num_pairs),
        clones(regress, num_pairs),
        norm=nn.LayerNorm(config.hidden_dim),
        refinement="look_forward_twice" if config.look_forward_twice else "detached",
        eps=1e-3,
    )  # fmt: skip


def _denoising(config: DinoConfig, num_classes: int) -> Denoising | None:
    if config.num_denoising == 0:
        return None
    return Denoising(
        num_classes,
        config.hidden_dim,
        num_denoising=config.num_denoising,
        label_noise=config.label_noise,
        box_noise=config.box_noise,
        group_rule=config.denoising_groups,
        contrastive=config.contrastive_denoising,
    )
