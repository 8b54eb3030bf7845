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

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from detrs.backbone import BackboneConfig, build_backbone
from detrs.criterion import Criterion, LossConfig
from detrs.decoder import Decoder
from detrs.denoising import BoxNoise, Denoising, GroupRule
from detrs.detector import Detector
from detrs.layers import box_head, class_head, xavier_
from detrs.neck import PositionEncoding
from detrs.postprocess import best_pairs
from detrs.queries import AnchorQueries, EncoderBoxes, Proposals
from detrs.query_position import AnchorPosition
from detrs.zoo.checks import require_default, require_loss, require_num_classes, require_sizes
from detrs.zoo.deformable_parts import clones, deformable_decoder_layers, deformable_encoder, deformable_neck
from detrs.zoo.parts import Model


@dataclass(frozen=True)
class DinoConfig:
    """Settings of DINO. The default is the 4-scale R50 model of the paper, 46.9 M parameters with 91 classes."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    architecture: Literal["dino"] = "dino"
    num_classes: int | None = None  # None: taken from the data
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    strides: tuple[int, ...] = (8, 16, 32)  # of the backbone levels used; 5-scale: (4, 8, 16, 32)
    num_feature_levels: int = 4  # levels beyond those of the backbone are strided convolutions
    position_temperature: float = 20.0
    position_temperature_y: float | None = None  # of its vertical axis; None: the same
    position_offset: float = 0.0  # of the positions in the image, in tokens; -0.5 in Deformable DETR
    hidden_dim: int = 256
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    ffn_dim: int = 2048
    num_points: int = 4  # sampled per decoder query, head and level
    num_encoder_points: int = 4
    dropout: float = 0.0
    num_queries: int = 900
    two_stage: bool = True  # False: the queries are learned boxes with a learned content, as in DAB-DETR
    mixed_selection: bool = True  # False: the content is that of the chosen tokens (pure query selection)
    proposal_size: float = 0.05  # side of the box priors on the finest level; doubled with every level
    encoder_shares_class_head: bool = False  # tokens are scored with the head of the decoder
    encoder_shares_box_head: bool = False
    shared_class_heads: bool = True  # one head for all decoder layers
    shared_box_heads: bool = True
    look_forward_twice: bool = True  # False: boxes are detached between layers, as in Deformable DETR
    num_denoising: int = 100  # desired positive denoising queries per image; 0: no denoising
    denoising_groups: GroupRule = "official"  # see Denoising; "fixed": num_denoising groups
    contrastive_denoising: bool = True  # False: no negatives, as in DN-DETR
    label_noise: float = 0.5  # twice the probability of another label
    box_noise: float = 0.4
    box_noise_kind: BoxNoise = "corners"  # "center_and_size": that of DN-DETR
    aux_loss: bool = True
    loss: LossConfig = field(default_factory=LossConfig)
    num_select: int = 300  # detections per image


def build_dino(config: DinoConfig) -> Model:
    """Build a DINO with new weights.

    Raises:
        ValueError: a setting that cannot be built; the message names it.
    """
    num_classes = require_num_classes(config.num_classes)
    _check(config)
    dim, num_layers = config.hidden_dim, config.num_decoder_layers
    class_heads = clones(class_head(dim, num_classes), 1 if config.shared_class_heads else num_layers)
    box_heads = clones(box_head(dim), 1 if config.shared_box_heads else num_layers)
    # Before the other parts, so that a seed draws the weights that it always has
    proposals = _proposals(config, class_heads[0], box_heads[0]) if config.two_stage else None
    detector = Detector(
        build_backbone(config.backbone),
        config.strides,
        deformable_neck(
            config.backbone, config.strides, config.hidden_dim, config.num_feature_levels,
            PositionEncoding(config.position_temperature, config.position_offset, config.position_temperature_y),
            has_encoder=config.num_encoder_layers > 0, level_embed=config.num_feature_levels > 1,
        ),
        deformable_encoder(
            config.num_encoder_layers, config.hidden_dim, config.num_heads, config.num_feature_levels,
            config.num_encoder_points, config.ffn_dim, config.dropout,
        ),
        _queries(config, proposals),
        _decoder(config, class_heads, box_heads),
        _denoising(config, num_classes),
        min_tokens=config.num_queries if config.two_stage else 0,
    )  # fmt: skip
    criterion = Criterion(
        config.loss, giou_eps=1e-6, aux_loss=config.aux_loss, denoising=config.num_denoising > 0,
        first_stage="interm",
    )  # fmt: skip
    return Model(detector, criterion, functools.partial(best_pairs, num_select=config.num_select))


def _check(config: DinoConfig) -> None:
    require_sizes(config)
    require_loss(config.loss, "focal", "mal")
    if config.num_denoising == 0:
        require_default(config, ("contrastive_denoising", "box_noise_kind"), "with model.num_denoising=0")
    if config.contrastive_denoising:
        require_default(config, ("box_noise_kind",), "with model.contrastive_denoising=true")
    if config.num_decoder_layers == 1:
        require_default(config, ("look_forward_twice",), "with model.num_decoder_layers=1")
    if not config.two_stage:
        shares = ("encoder_shares_class_head", "encoder_shares_box_head")
        require_default(config, ("mixed_selection", "proposal_size", *shares), "with model.two_stage=false")
    for head in ("class", "box"):
        if getattr(config, f"encoder_shares_{head}_head") and not getattr(config, f"shared_{head}_heads"):
            raise ValueError(
                f"model.encoder_shares_{head}_head: requires model.shared_{head}_heads=true: the head of all layers"
            )
    if not (config.aux_loss or (config.shared_class_heads and config.shared_box_heads)):
        raise ValueError(
            "model.aux_loss: must be true without shared heads: it trains the heads of all layers but the last"
        )


def _proposals(config: DinoConfig, classify: nn.Module, regress: nn.Module) -> Proposals:
    # Unless they are shared, the heads of the encoder start as copies of those of the decoder
    if not config.encoder_shares_class_head:
        (classify,) = clones(classify, 1)
    if not config.encoder_shares_box_head:
        (regress,) = clones(regress, 1)
    return Proposals(config.hidden_dim, classify, regress, config.proposal_size)


def _queries(config: DinoConfig, proposals: Proposals | None) -> nn.Module:
    dim, num_queries = config.hidden_dim, config.num_queries
    if proposals is not None:
        return EncoderBoxes(num_queries, dim, proposals, mixed=config.mixed_selection)
    queries = AnchorQueries(num_queries, dim, 0, random_points=False, learned_content=True)
    xavier_(queries)
    return queries


def _decoder(config: DinoConfig, class_heads: list[nn.Module], box_heads: list[nn.Module]) -> Decoder:
    query_position = AnchorPosition(config.hidden_dim)
    xavier_(query_position)
    return Decoder(
        deformable_decoder_layers(
            config.num_decoder_layers, config.hidden_dim, config.num_heads, config.num_feature_levels,
            config.num_points, config.ffn_dim, config.dropout,
        ),
        query_position, class_heads, box_heads,
        norm=nn.LayerNorm(config.hidden_dim),
        refinement="look_forward_twice" if config.look_forward_twice else "detached",
        eps=1e-3,
    )  # fmt: skip


def _denoising(config: DinoConfig, num_classes: int) -> Denoising | None:
    if config.num_denoising == 0:
        return None
    return Denoising(
        num_classes, config.hidden_dim, num_denoising=config.num_denoising, group_rule=config.denoising_groups,
        contrastive=config.contrastive_denoising, label_noise=config.label_noise,
        box_noise=config.box_noise, box_noise_kind=config.box_noise_kind,
    )  # fmt: skip
