"""Build the models of the papers: one configuration class per paper, and `build` for all of them."""

from __future__ import annotations

from detrs.backbone import BackboneConfig
from detrs.criterion import LossConfig
from detrs.zoo.conditional import ConditionalDetrConfig, build_conditional_detr
from detrs.zoo.dab import DabDetrConfig, build_dab_detr
from detrs.zoo.deformable import DeformableDetrConfig, build_deformable_detr
from detrs.zoo.detr import DetrConfig, build_detr
from detrs.zoo.dino import DinoConfig, build_dino
from detrs.zoo.parts import Model

ModelConfig = DetrConfig | ConditionalDetrConfig | DabDetrConfig | DeformableDetrConfig | DinoConfig

__all__ = [
    "BackboneConfig",
    "ConditionalDetrConfig",
    "DabDetrConfig",
    "DeformableDetrConfig",
    "DetrConfig",
    "DinoConfig",
    "LossConfig",
    "Model",
    "ModelConfig",
    "build",
]


def build(config: ModelConfig) -> Model:
    """Build the model of a configuration, with new weights.

    Raises:
        ValueError: a setting that cannot be built; the message names it.
    """
    match config:
        case DetrConfig():
            return build_detr(config)
        case ConditionalDetrConfig():
            return build_conditional_detr(config)
        case DabDetrConfig():
            return build_dab_detr(config)
        case DinoConfig():
            return build_dino(config)
        case DeformableDetrConfig():
            return build_deformable_detr(config)
