"""Train the five models of the papers at the size of the quickstart, with one recipe: what `make race` compares.

Data, backbone, width, number of layers and queries, optimizer and schedule are the same. What differs is what a paper
defines: attention, queries, refinement, denoising, the kind of class loss, and the feature levels. Deformable DETR is
the main model of its paper, without refinement. The models with dense attention have one level: the last, at the
resolution of the third (DC5), because 96 pixels have only 3x3 tokens at stride 32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
from raydetr.config import RunConfig, override
from raydetr.recipes.quickstart import quickstart

_BACKBONE = BackboneConfig(name="small", norm="batch", num_frozen_stages=0)
_SIZES: dict[str, Any] = {
    "backbone": _BACKBONE, "hidden_dim": 64, "num_heads": 4, "num_encoder_layers": 1, "num_decoder_layers": 2,
    "ffn_dim": 128, "num_queries": 25, "dropout": 0.0,
}  # fmt: skip
_ONE_LEVEL = _SIZES | {"backbone": replace(_BACKBONE, dilation=True)}
_THREE_LEVELS = _SIZES | {"num_feature_levels": 3}
# The official codes give the class loss a weight of 1 or 2; with 1, few queries learn slowly
_FOCAL: dict[str, Any] = {"loss": LossConfig("focal", class_weight=2.0)}


def small_detr() -> RunConfig:
    """Train a small DETR on the synthetic data, as the four below: the race of the papers."""
    return _small("small_detr", DetrConfig(**_ONE_LEVEL))


def small_conditional_detr() -> RunConfig:
    """Train a small Conditional DETR on the synthetic data."""
    return _small("small_conditional_detr", ConditionalDetrConfig(**_ONE_LEVEL, **_FOCAL))


def small_dab_detr() -> RunConfig:
    """Train a small DAB-DETR on the synthetic data."""
    return _small("small_dab_detr", DabDetrConfig(**_ONE_LEVEL, **_FOCAL, num_select=100))


def small_deformable_detr() -> RunConfig:
    """Train a small Deformable DETR on the synthetic data."""
    return _small("small_deformable_detr", DeformableDetrConfig(**_THREE_LEVELS, **_FOCAL))


def small_dino() -> RunConfig:
    """Train a small DINO on the synthetic data, with an encoder and focal loss, unlike the quickstart's."""
    model = DinoConfig(
        **_THREE_LEVELS, **_FOCAL, proposal_size=0.1, num_denoising=8, denoising_groups="fill", num_select=100
    )
    return _small("small_dino", model)


def _small(recipe: str, model: ModelConfig) -> RunConfig:
    parent = quickstart()
    return override(
        parent.model_copy(update={"recipe": recipe, "model": model}),
        {
            "data.batch_size": 8,
            "optim.epochs": 4,
            "optim.lr": 1e-3,
            "optim.lr_backbone": 1e-3,
            "optim.lr_sampling": 1e-3,
            "evaluation.every_epochs": 1,
        },
    )
