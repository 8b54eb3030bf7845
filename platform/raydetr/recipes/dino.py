"""DINO: the official schedules (Zhang et al., ICLR 2023, arXiv:2203.03605; AP of the official models).

All have a learning rate of 1e-4, 1e-5 in the backbone, and 16 images per batch. It drops after 11 of 12, 20 of 24
or 30 of 36 epochs.
"""

from __future__ import annotations

from detrs.zoo import DinoConfig
from raydetr.config import RunConfig, override
from raydetr.recipes.coco import official_optim, official_run


def dino_r50_4scale_12ep() -> RunConfig:
    """DINO, 4 scales, ResNet-50, 12 epochs on COCO (Zhang et al. 2022); official AP 49.0.

    Sampling offsets have the full learning rate, unlike in Deformable DETR. Cost: 279 GFLOPs per image.
    Command: `raydetr train dino_r50_4scale_12ep`.
    """
    optim = official_optim(epochs=12, lr_drop_epoch=11, lr=1e-4, lr_backbone=1e-5, lr_sampling=1e-4)
    return official_run("dino_r50_4scale_12ep", DinoConfig(), optim, batch_size=16)


def dino_r50_4scale_24ep() -> RunConfig:
    """DINO, 4 scales, ResNet-50, 24 epochs on COCO (Zhang et al. 2022); official AP 50.4.

    Cost: twice that of 12 epochs. Command: `raydetr train dino_r50_4scale_24ep`.
    """
    changes = {"optim.epochs": 24, "optim.lr_drop_epochs": [20]}
    return override(dino_r50_4scale_12ep(), {"recipe": "dino_r50_4scale_24ep", **changes})


def dino_r50_4scale_36ep() -> RunConfig:
    """DINO, 4 scales, ResNet-50, 36 epochs on COCO (Zhang et al. 2022); official AP 50.9.

    Cost: three times that of 12 epochs. Command: `raydetr train dino_r50_4scale_36ep`.
    """
    changes = {"optim.epochs": 36, "optim.lr_drop_epochs": [30]}
    return override(dino_r50_4scale_12ep(), {"recipe": "dino_r50_4scale_36ep", **changes})


def dino_r50_5scale_12ep() -> RunConfig:
    """DINO, 5 scales, ResNet-50, 12 epochs on COCO (Zhang et al. 2022); official AP 49.4.

    Cost: 860 GFLOPs per image; officially one image on each of 16 GPUs.
    Command: `raydetr train dino_r50_5scale_12ep cluster.num_workers=16`.
    """
    return override(dino_r50_4scale_12ep(), {"recipe": "dino_r50_5scale_12ep", **_FIVE_SCALES})


def dino_r50_5scale_24ep() -> RunConfig:
    """DINO, 5 scales, ResNet-50, 24 epochs on COCO (Zhang et al. 2022); official AP 51.3.

    Cost: twice that of 12 epochs. Command: `raydetr train dino_r50_5scale_24ep cluster.num_workers=16`.
    """
    return override(dino_r50_4scale_24ep(), {"recipe": "dino_r50_5scale_24ep", **_FIVE_SCALES})


def dino_r50_5scale_36ep() -> RunConfig:
    """DINO, 5 scales, ResNet-50, 36 epochs on COCO (Zhang et al. 2022); official AP 51.2.

    Cost: three times that of 12 epochs. Command: `raydetr train dino_r50_5scale_36ep cluster.num_workers=16`.
    """
    return override(dino_r50_4scale_36ep(), {"recipe": "dino_r50_5scale_36ep", **_FIVE_SCALES})


_FIVE_SCALES = {"model.strides": [4, 8, 16, 32], "model.num_feature_levels": 5}
