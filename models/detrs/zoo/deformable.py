"""Deformable DETR (Zhu et al., ICLR 2021, arXiv:2010.04159).

Idea: a query attends to a few sampled points around its reference on every feature level. The cost of attention is then
independent of the size of the feature maps, and several large ones can be used.

Parent: DETR. Differences:
- deformable attention in the encoder and in the cross-attention of the decoder, over levels C3 to C6;
- the content of the queries is learned, and a reference point is predicted from their position;
- sigmoid focal loss without a no-object class;
- variants: iterative box refinement (each layer refines the boxes of the layer before), and two-stage (the best boxes
  of the encoder become the queries).
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
from detrs.layers import box_head, class_head
from detrs.neck import Neck, PositionEncoding
from detrs.postprocess import best_pairs
from detrs.queries import EncoderProposals, LearnedQueries, Proposals, ProposalScore
from detrs.query_position import LearnedPosition
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
class DeformableDetrConfig:
    """Settings of Deformable DETR. The default is the multi-scale R50 model of the paper.

    It has 40.1 M parameters with 91 classes.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    architecture: Literal["deformable_detr"] = "deformable_detr"
    num_classes: int | None = None  # None: taken from the data
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    strides: tuple[int, ...] = (8, 16, 32)  # of the backbone levels used; single-scale: (32,)
    num_feature_levels: int = 4  # levels beyond those of the backbone are strided convolutions
    refinement: bool = False
    two_stage: bool = False  # requires refinement
    proposal_score: ProposalScore = "first_class"  # ranking of tokens in two-stage; see EncoderProposals
    hidden_dim: int = 256
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    ffn_dim: int = 1024
    num_points: int = 4  # sampled per decoder query, head and level
    num_encoder_points: int = 4
    dropout: float = 0.1
    num_queries: int = 300
    aux_loss: bool = True
    loss: LossConfig = field(default_factory=lambda: LossConfig(class_weight=2.0))
    num_select: int = 100  # detections per image


def build_deformable_detr(config: DeformableDetrConfig) -> Model:
    """Build a Deformable DETR with new weights.

    Raises:
        ValueError: a setting that cannot be built; the message names it.
    """
    num_classes = require_num_classes(config.num_classes)
    _check(config)
    classify = class_head(config.hidden_dim, num_classes)
    regress = box_head(config.hidden_dim)
    queries: nn.Module = LearnedQueries(config.num_queries, config.hidden_dim)
    if config.two_stage:
        # The heads of the encoder start as copies of those of the decoder
        proposals = Proposals(config.hidden_dim, clones(classify, 1)[0], clones(regress, 1)[0], size=0.05)
        queries = EncoderProposals(config.num_queries, config.hidden_dim, proposals, config.proposal_score)
    detector = Detector(
        build_backbone(config.backbone),
        config.strides,
        _neck(config),
        deformable_encoder(
            config.num_encoder_layers, config.hidden_dim, config.num_heads, config.num_feature_levels,
            config.num_encoder_points, config.ffn_dim, config.dropout,
        ),
        queries,
        _decoder(config, classify, regress),
        min_tokens=config.num_queries if config.two_stage else 0,
    )  # fmt: skip
    criterion = Criterion(
        config.loss,
        giou_eps=0.0,
        aux_loss=config.aux_loss,
        first_stage_labels="zero" if config.proposal_score == "first_class" else "own",
        cost_alpha=0.25,  # fixed in the official matcher
    )
    return Model(detector, criterion, functools.partial(best_pairs, num_select=config.num_select))


def _check(config: DeformableDetrConfig) -> None:
    require_sizes(config)
    require_loss(config.loss, "focal", "mal")
    if not config.two_stage:
        require_default(config, ("proposal_score",), "with model.two_stage=false")
    if config.two_stage and not config.refinement:
        raise ValueError("model.two_stage: requires model.refinement=true, as in the paper")
    if config.refinement and not config.aux_loss:
        raise ValueError(
            "model.aux_loss: must be true with refinement: it trains the heads of all layers but the last"
        )


def _neck(config: DeformableDetrConfig) -> Neck:
    encoded = config.num_encoder_layers > 0  # only the encoder uses positions
    return Neck(
        level_widths(config.backbone, config.strides),
        config.hidden_dim,
        config.num_feature_levels,
        PositionEncoding(offset=-0.5) if encoded else None,
        group_norm=True,
        level_embed=encoded,
    )


def _decoder(config: DeformableDetrConfig, classify: nn.Module, regress: nn.Module) -> Decoder:
    num_pairs = config.num_decoder_layers if config.refinement else 1
    box_heads = clones(regress, num_pairs)
    if not config.two_stage:
        # Initial boxes have a size of sigmoid(-2); in two-stage, sizes come from the proposals
        last = list(box_heads[0].parameters())[-1]
        last.data[2:] = -2.0
    return Decoder(
        deformable_decoder_layers(
            config.num_decoder_layers, config.hidden_dim, config.num_heads, config.num_feature_levels,
            config.num_points, config.ffn_dim, config.dropout,
        ),
        LearnedPosition(),
        clones(classify, num_pairs),
        box_heads,
        norm=None,
        refinement="detached" if config.refinement else "none",
        eps=1e-5,
    )  # fmt: skip
