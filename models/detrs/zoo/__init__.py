"""The papers: a configuration each, and `build`, which makes the model of any of them."""

from __future__ import annotations

from detrs.backbone import BackboneConfig
from detrs.criterion import LossConfig
from detrs.zoo.deformable import DeformableDetrConfig, build_deformable_detr
from detrs.zoo.dino import DinoConfig, build_dino
from detrs.zoo.parts import Model

ModelConfig = DinoConfig | DeformableDetrConfig

__all__ = [
    "BackboneConfig",
    "DeformableDetrConfig",
    "DinoConfig",
    "LossConfig",
    "Model",
    "ModelConfig",
    "build",
]


def build(config: ModelConfig) -> Model:
    """The model of a configuration, with new weights.

    Raises:
        ValueError: a setting that cannot be built; the message names it.
    """
    match config:
        case DinoConfig():
            return build_dino(config)
        case DeformableDetrConfig():
            return build_deformable_detr(config)
