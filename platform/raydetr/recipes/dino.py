"""DINO: the official schedules (Zhang et al., ICLR 2023, arXiv:2203.03605; AP of the official models).

All have a learning rate of 1e-4, 1e-5 in the backbone, and 16 images per batch. It drops after 11 of 12, 20 of 24
or 30 of 36 epochs.

Two more recipes have the settings with which other libraries reach a higher AP in 12 epochs.
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


def dino_r50_4scale_12ep_300dn() -> RunConfig:
    """DINO, 4 scales, ResNet-50, 12 epochs (Zhang et al. 2022) with the settings of detrex; its AP 49.5.

    300 denoising queries instead of 100, with less noise in labels and more in boxes; the position encoding of
    Deformable DETR; heads for each layer; only the stem of the backbone is frozen. Source: detrex,
    projects/dino/configs/dino_r50_4scale_12ep_300dn.py. Cost: 279 GFLOPs per image.
    Command: `raydetr train dino_r50_4scale_12ep_300dn`.
    """
    changes = {
        **_OTHER_LIBRARIES,
        "model.label_noise": 0.2,
        "model.backbone.num_frozen_stages": 1,
    }
    return override(dino_r50_4scale_12ep(), {"recipe": "dino_r50_4scale_12ep_300dn", **changes})


def dino_r50_4scale_12ep_improved() -> RunConfig:
    """DINO, 4 scales, ResNet-50, 12 epochs (Zhang et al. 2022) with the settings of mmdetection; its AP 50.1.

    300 denoising queries instead of 100, with more noise in boxes; the position encoding, the weight of the class loss
    and the learning rates of Deformable DETR; heads for each layer; nothing in the backbone is frozen but its norms.
    Source: mmdetection 3.x, configs/dino/dino-4scale_r50_improved_8xb2-12e_coco.py. Cost: 279 GFLOPs per image.
    Command: `raydetr train dino_r50_4scale_12ep_improved`.
    """
    changes = {
        **_OTHER_LIBRARIES,
        "model.backbone.num_frozen_stages": 0,
        "model.loss.class_weight": 2.0,
        "optim.lr": 2e-4,
        "optim.lr_backbone": 2e-5,
        "optim.lr_sampling": 2e-5,
    }
    return override(dino_r50_4scale_12ep(), {"recipe": "dino_r50_4scale_12ep_improved", **changes})


_FIVE_SCALES = {"model.strides": [4, 8, 16, 32], "model.num_feature_levels": 5}

# What detrex and mmdetection have in common; in both, every decoder layer has heads of its own
_OTHER_LIBRARIES = {
    "model.num_denoising": 300,
    "model.box_noise": 1.0,
    "model.position_temperature": 10000.0,
    "model.position_offset": -0.5,
    "model.shared_class_heads": False,
    "model.shared_box_heads": False,
}
