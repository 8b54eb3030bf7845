"""Conditional DETR: the official schedules (Meng et al., ICCV 2021, arXiv:2108.06152; AP of the official models)."""

from __future__ import annotations

from detrs.zoo import ConditionalDetrConfig
from raydetr.config import RunConfig, override
from raydetr.recipes.coco import official_optim, official_run


def conditional_detr_r50_50ep() -> RunConfig:
    """Conditional DETR, ResNet-50, 50 epochs on COCO (Meng et al. 2021); official AP 41.0.

    The learning rate drops after 40 epochs; 16 images per batch. Cost: 90 GFLOPs per image, about 240 V100 hours.
    Command: `raydetr train conditional_detr_r50_50ep`.
    """
    optim = official_optim(epochs=50, lr_drop_epoch=40, lr=1e-4, lr_backbone=1e-5, lr_sampling=1e-4)
    return official_run("conditional_detr_r50_50ep", ConditionalDetrConfig(), optim, batch_size=16)


def conditional_detr_r50_dc5_50ep() -> RunConfig:
    """Conditional DETR-DC5, ResNet-50, 50 epochs on COCO (Meng et al. 2021); official AP 43.7.

    One image per GPU on eight GPUs, as in the official script, and one in evaluation: padding costs AP.
    Cost: 195 GFLOPs per image. Command: `raydetr train conditional_detr_r50_dc5_50ep`.
    """
    changes = {"model.backbone.dilation": True, "data.batch_size": 8, "data.eval_batch_size": 1}
    return override(conditional_detr_r50_50ep(), {"recipe": "conditional_detr_r50_dc5_50ep", **changes})


def conditional_detr_r101_50ep() -> RunConfig:
    """Conditional DETR, ResNet-101, 50 epochs on COCO (Meng et al. 2021); official AP 42.8.

    Cost: 156 GFLOPs per image. Command: `raydetr train conditional_detr_r101_50ep`.
    """
    changes = {"model.backbone.name": "resnet101"}
    return override(conditional_detr_r50_50ep(), {"recipe": "conditional_detr_r101_50ep", **changes})


def conditional_detr_r101_dc5_50ep() -> RunConfig:
    """Conditional DETR-DC5, ResNet-101, 50 epochs on COCO (Meng et al. 2021); official AP 45.0.

    Cost: 262 GFLOPs per image. Command: `raydetr train conditional_detr_r101_dc5_50ep`.
    """
    changes = {"model.backbone.name": "resnet101"}
    return override(conditional_detr_r50_dc5_50ep(), {"recipe": "conditional_detr_r101_dc5_50ep", **changes})
