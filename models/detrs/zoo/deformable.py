"""Deformable DETR (Zhu et al., ICLR 2021, arXiv:2010.04159).

Idea: a query attends to a few sampled points around its reference on every feature level. The cost of attention is then
independent of the size of the feature maps, and several large ones can be used.

Parent: DETR. Differences:
- deformable attention in the encoder and in the cross-attention of the decoder, over levels C3 to C6;
- the content of the queries is learned, and a reference point is predicted from their position;
- sigmoid focal loss without a no-object class;
- variants: iterative box refinement (each layer refines the boxes of the layer before), and two-stage (the best boxes
  of the encoder become the queries).

With `anchors` it is DAB-Deformable-DETR (DAB-DETR, appendix C): the queries are learned boxes with a learned content,
and their position is a function of the box, scaled by a function of the content.
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
from detrs.queries import AnchorQueries, EncoderProposals, LearnedQueries, Proposals, ProposalScore
from detrs.query_position import AnchorPosition, LearnedPosition
from detrs.zoo.checks import require_default, require_loss, require_num_classes, require_sizes
from detrs.zoo.deformable_parts import clones, deformable_decoder_layers, deformable_encoder, deformable_neck
from detrs.zoo.parts import Model


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
    two_stage: bool = False  # without refinement, the encoder shares the heads of the decoder
    proposal_score: ProposalScore = "first_class"  # ranking of tokens in two-stage; see EncoderProposals
    anchors: bool = False  # the queries are learned boxes (DAB-Deformable-DETR)
    num_patterns: int = 0  # learned contents that are added to those of the anchors; 0: none
    random_points: bool = False  # initialize the centers of the anchors uniformly over the image
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
    num_pairs = config.num_decoder_layers if config.refinement else 1
    class_heads = clones(class_head(config.hidden_dim, num_classes), num_pairs)
    box_heads = clones(box_head(config.hidden_dim), num_pairs)
    queries = _queries(config, class_heads[0], box_heads[0])
    detector = Detector(
        build_backbone(config.backbone),
        config.strides,
        deformable_neck(
            config.backbone, config.strides, config.hidden_dim, config.num_feature_levels,
            PositionEncoding(offset=-0.5), has_encoder=config.num_encoder_layers > 0,
        ),
        deformable_encoder(
            config.num_encoder_layers, config.hidden_dim, config.num_heads, config.num_feature_levels,
            config.num_encoder_points, config.ffn_dim, config.dropout,
        ),
        queries,
        _decoder(config, class_heads, box_heads),
        min_tokens=config.num_queries if config.two_stage else 0,
    )  # fmt: skip
    criterion = Criterion(
        config.loss,
        giou_eps=1e-6 if config.anchors else 0.0,
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
    if not config.anchors:
        require_default(config, ("num_patterns", "random_points"), "with model.anchors=false")
    elif config.two_stage:
        raise ValueError("model.anchors: must be false with model.two_stage=true: its boxes are the queries")
    if config.num_patterns < 0:
        raise ValueError(f"model.num_patterns: {config.num_patterns} is negative")
    if config.refinement and not config.aux_loss:
        raise ValueError(
            "model.aux_loss: must be true with refinement: it trains the heads of all layers but the last"
        )


def _queries(config: DeformableDetrConfig, classify: nn.Module, regress: nn.Module) -> nn.Module:
    if config.anchors:
        return AnchorQueries(
            config.num_queries, config.hidden_dim, config.num_patterns,
            random_points=config.random_points, learned_content=True,
        )  # fmt: skip
    if not config.two_stage:
        return LearnedQueries(config.num_queries, config.hidden_dim)
    if config.refinement:  # the heads of the encoder start as copies of those of the decoder
        classify, regress = clones(classify, 1)[0], clones(regress, 1)[0]
    proposals = Proposals(config.hidden_dim, classify, regress, size=0.05)
    return EncoderProposals(config.num_queries, config.hidden_dim, proposals, config.proposal_score)


def _decoder(
    config: DeformableDetrConfig, class_heads: list[nn.Module], box_heads: list[nn.Module]
) -> Decoder:
    if not config.two_stage:
        # Initial boxes have a size of sigmoid(-2); in two-stage, sizes come from the proposals
        last = list(box_heads[0].parameters())[-1]
        last.data[2:] = -2.0
    query_position: nn.Module = LearnedPosition()
    if config.anchors:
        query_position = AnchorPosition(config.hidden_dim, scale=True)
        xavier_(query_position)
    return Decoder(
        deformable_decoder_layers(
            config.num_decoder_layers, config.hidden_dim, config.num_heads, config.num_feature_levels,
            config.num_points, config.ffn_dim, config.dropout,
        ),
        query_position,
        class_heads,
        box_heads,
        norm=None,
        refinement="detached" if config.refinement else "none",
        eps=1e-3 if config.anchors else 1e-5,
    )  # fmt: skip
