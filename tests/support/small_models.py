"""Define small models and batches for tests without official weights."""

from __future__ import annotations

from typing import Any

import torch

from detrs.structures import Images, Targets
from detrs.zoo import (
    BackboneConfig,
    ConditionalDetrConfig,
    DabDetrConfig,
    DeformableDetrConfig,
    DetrConfig,
    DinoConfig,
    LossConfig,
    ModelConfig,
)

SMALL: dict[str, Any] = {
    "num_classes": 4,
    "backbone": BackboneConfig("small", "batch", 0),
    "hidden_dim": 32,
    "num_heads": 4,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "ffn_dim": 64,
    "num_queries": 10,
    "dropout": 0.0,
}
LEVELS: dict[str, Any] = {"num_feature_levels": 3, "num_points": 2, "num_encoder_points": 2}

CONFIGS: dict[str, ModelConfig] = {
    "detr": DetrConfig(**SMALL),
    "detr_pre_norm": DetrConfig(**SMALL, pre_norm=True),
    "detr_focal": DetrConfig(
        **SMALL, position_encoding="learned", activation="gelu", loss=LossConfig(class_weight=2.0)
    ),
    "conditional": ConditionalDetrConfig(**SMALL),
    "conditional_learned_points": ConditionalDetrConfig(
        **SMALL, position_encoding="learned", reference_point="learned"
    ),
    "dab": DabDetrConfig(**SMALL),
    "dab_scalar": DabDetrConfig(**SMALL, position_scale="scalar", shared_box_heads=False),
    "dab_patterns": DabDetrConfig(
        **{**SMALL, "num_queries": 5},
        num_patterns=2,
        random_points=True,
        modulate_attention=False,
        position_scale="learned",
        keep_query_position=True,
        activation="gelu",
    ),
    "dab_fixed_points": DabDetrConfig(
        **SMALL,
        position_temperature_y=40.0,
        encoder_norm=True,
        decoder_self_attention=False,
        random_points=True,
        fixed_points=True,
    ),
    "dab_no_refinement": DabDetrConfig(**SMALL, refinement=False, shared_box_heads=False),
    "dab_points": DabDetrConfig(**SMALL, anchor="point", modulate_attention=False, random_points=True),
    "dino": DinoConfig(**SMALL, **LEVELS, num_denoising=8, denoising_groups="fill"),
    "dino_without": DinoConfig(
        **SMALL,
        **LEVELS,
        num_denoising=8,
        denoising_groups="fill",
        contrastive_denoising=False,
        mixed_selection=False,
        look_forward_twice=False,
    ),
    "dino_quickstart": DinoConfig(
        **{**SMALL, "num_encoder_layers": 0},
        **LEVELS,
        num_denoising=8,
        denoising_groups="fill",
        shared_class_heads=False,
        shared_box_heads=False,
        loss=LossConfig("mal", class_weight=2.0, gamma=1.5),
    ),
    "dino_without_two_stage": DinoConfig(
        **SMALL,
        **LEVELS,
        num_denoising=2,
        denoising_groups="fixed",
        contrastive_denoising=False,
        box_noise_kind="center_and_size",
        two_stage=False,
        shared_box_heads=False,
        look_forward_twice=False,
    ),
    "dino_one_head": DinoConfig(
        **SMALL, **LEVELS, num_denoising=0, encoder_shares_class_head=True, encoder_shares_box_head=True
    ),
    "deformable": DeformableDetrConfig(**SMALL, **LEVELS),
    "deformable_refine": DeformableDetrConfig(**SMALL, **LEVELS, refinement=True),
    "deformable_two_stage": DeformableDetrConfig(**SMALL, **LEVELS, refinement=True, two_stage=True),
    "deformable_two_stage_best_class": DeformableDetrConfig(
        **SMALL, **LEVELS, refinement=True, two_stage=True, proposal_score="best_class"
    ),
    "deformable_two_stage_only": DeformableDetrConfig(**SMALL, **LEVELS, two_stage=True),
    "deformable_anchors": DeformableDetrConfig(
        **{**SMALL, "num_queries": 5},
        **LEVELS,
        refinement=True,
        anchors=True,
        num_patterns=2,
        random_points=True,
    ),
    "deformable_single_scale": DeformableDetrConfig(**SMALL, strides=(32,), num_feature_levels=1),
}


def batch(counts: tuple[int, ...], size: tuple[int, int] = (64, 96), seed: int = 0) -> tuple[Images, Targets]:
    """Return random images without padding, each with its number of random targets."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(len(counts), 3, *size, generator=generator)
    total = sum(counts)
    boxes = torch.cat(
        (
            0.3 + 0.4 * torch.rand(total, 2, generator=generator),
            0.1 + 0.3 * torch.rand(total, 2, generator=generator),
        ),
        dim=1,
    )
    labels = torch.randint(0, 4, (total,), generator=generator)
    padding = torch.zeros(len(counts), *size, dtype=torch.bool)
    return Images(pixels, padding), Targets(labels, boxes, counts)
