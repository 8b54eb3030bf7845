"""Models of the DETR family: torch only, usable without the training platform.

model = detrs.build(detrs.DinoConfig(num_classes=91))
outputs = model.detector(images, targets)  # `Images` and `Targets` of detrs.structures
losses = model.criterion(outputs, targets, num_boxes)
detections = model.postprocess(outputs.predictions, sizes)
"""

from detrs.checkpoints import load_official
from detrs.zoo import (
    BackboneConfig,
    ConditionalDetrConfig,
    DabDetrConfig,
    DeformableDetrConfig,
    DetrConfig,
    DinoConfig,
    LossConfig,
    Model,
    build,
)

__all__ = [
    "BackboneConfig",
    "ConditionalDetrConfig",
    "DabDetrConfig",
    "DeformableDetrConfig",
    "DetrConfig",
    "DinoConfig",
    "LossConfig",
    "Model",
    "build",
    "load_official",
]
