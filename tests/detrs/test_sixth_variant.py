"""Test that the parts compose: DAB-Deformable DETR with denoising, a model of none of the papers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import small_models
from detrs.backbone import BackboneConfig, build_backbone
from detrs.criterion import Criterion, LossConfig
from detrs.decoder import Decoder
from detrs.denoising import Denoising
from detrs.detector import Detector
from detrs.layers import box_head, class_head
from detrs.neck import Neck, PositionEncoding
from detrs.postprocess import best_pairs
from detrs.queries import AnchorQueries, EncoderBoxes, Proposals
from detrs.query_position import AnchorPosition
from detrs.zoo import Model
from detrs.zoo.deformable_parts import deformable_decoder_layers, deformable_encoder
from detrs.zoo.parts import level_widths


def build_dab_deformable(*, two_stage: bool) -> Model:
    backbone = BackboneConfig("small", "batch", 0)
    dim, num_classes, sizes = 32, 4, (32, 4, 3, 2, 64, 0.0)
    if two_stage:
        proposals = Proposals(dim, class_head(dim, num_classes), box_head(dim), size=0.05)
        queries: nn.Module = EncoderBoxes(10, dim, proposals)
    else:
        queries = AnchorQueries(10, dim, num_patterns=1, random_points=True)
    detector = Detector(
        build_backbone(backbone),
        (8, 16, 32),
        Neck(
            level_widths(backbone, (8, 16, 32)),
            dim,
            3,
            PositionEncoding(20.0),
            group_norm=True,
            level_embed=True,
        ),
        deformable_encoder(1, *sizes),
        queries,
        Decoder(
            deformable_decoder_layers(2, *sizes),
            AnchorPosition(dim),
            [class_head(dim, num_classes) for _ in range(2)],
            [box_head(dim) for _ in range(2)],
            norm=None,
            refinement="detached",
            eps=1e-3,
        ),
        Denoising(num_classes, dim, num_denoising=8, label_noise=0.5, box_noise=0.4, group_rule="fill"),
    )
    criterion = Criterion(LossConfig(), giou_eps=1e-6, denoising=True, first_stage="interm")
    return Model(detector, criterion, functools.partial(best_pairs, num_select=10))


@pytest.mark.parametrize("two_stage", [False, True])
def test_learns(two_stage: bool) -> None:
    torch.manual_seed(0)
    model = build_dab_deformable(two_stage=two_stage)
    images, targets = small_models.batch((2, 1), size=(64, 64))
    optimizer = torch.optim.AdamW(model.detector.parameters(), lr=4e-3)
    totals = []
    for _ in range(30):
        losses = model.criterion(model.detector(images, targets), targets, 3.0)
        totals.append(losses.total.item())
        optimizer.zero_grad()
        losses.total.backward()
        assert all(p.grad is not None for p in model.detector.parameters())
        nn.utils.clip_grad_norm_(model.detector.parameters(), 0.5)
        optimizer.step()
    assert totals[-1] < 0.6 * totals[0]
    assert losses.terms["loss_bbox_dn"] > 0
    assert ("loss_ce_interm" in losses.terms) == two_stage
