"""DAB-DETR: the paper's schedules (Liu et al., ICLR 2022, arXiv:2201.12329; AP and cost from its tables 2 and 8)."""

from __future__ import annotations

from detrs.zoo import DabDetrConfig
from raydetr.config import RunConfig, override
from raydetr.recipes.coco import official_optim, official_run


def dab_detr_r50_50ep() -> RunConfig:
    """DAB-DETR, ResNet-50, 50 epochs on COCO (Liu et al. 2022); official AP 42.2.

    The learning rate drops after 40 epochs; 16 images per batch. Cost: 94 GFLOPs per image; an epoch takes
    as long as Conditional DETR's (about 5 V100 hours). Command: `raydetr train dab_detr_r50_50ep`.
    """
    optim = official_optim(epochs=50, lr_drop_epoch=40, lr=1e-4, lr_backbone=1e-5, lr_sampling=1e-4)
    return official_run("dab_detr_r50_50ep", DabDetrConfig(), optim, batch_size=16)


def dab_detr_r50_3patterns_50ep() -> RunConfig:
    """DAB-DETR with 3 pattern embeddings, ResNet-50, 50 epochs on COCO (Liu et al. 2022); official AP 42.6.

    Each anchor has three queries, with different learned contents. Cost: 100 GFLOPs per image.
    Command: `raydetr train dab_detr_r50_3patterns_50ep`.
    """
    changes = {"model.num_patterns": 3}
    return override(dab_detr_r50_50ep(), {"recipe": "dab_detr_r50_3patterns_50ep", **changes})


def dab_detr_r50_dc5_50ep() -> RunConfig:
    """DAB-DETR-DC5, ResNet-50, 50 epochs on COCO (Liu et al. 2022); official AP 44.5.

    Cost: 202 GFLOPs per image. Evaluated with one image per batch: padding costs AP.
    Command: `raydetr train dab_detr_r50_dc5_50ep`.
    """
    changes = {"model.backbone.dilation": True, "data.eval_batch_size": 1}
    return override(dab_detr_r50_50ep(), {"recipe": "dab_detr_r50_dc5_50ep", **changes})


def dab_detr_r50_dc5_3patterns_50ep() -> RunConfig:
    """DAB-DETR-DC5, 3 pattern embeddings, ResNet-50, 50 epochs on COCO (Liu et al. 2022); official AP 45.7.

    Cost: 216 GFLOPs per image. Command: `raydetr train dab_detr_r50_dc5_3patterns_50ep`.
    """
    changes = {"model.num_patterns": 3}
    return override(dab_detr_r50_dc5_50ep(), {"recipe": "dab_detr_r50_dc5_3patterns_50ep", **changes})


def dab_detr_r50_dc5_random_points_50ep() -> RunConfig:
    """DAB-DETR-DC5 with random box centers, ResNet-50, 50 epochs on COCO (Liu et al. 2022); official AP 44.7.

    The paper (appendix H) describes centers that stay fixed, but its code trains them, and so does this recipe:
    `model.fixed_points=true` does as the paper says. Cost: 202 GFLOPs per image.
    Command: `raydetr train dab_detr_r50_dc5_random_points_50ep`.
    """
    changes = {"model.random_points": True}
    return override(dab_detr_r50_dc5_50ep(), {"recipe": "dab_detr_r50_dc5_random_points_50ep", **changes})


def dab_detr_r101_50ep() -> RunConfig:
    """DAB-DETR, ResNet-101, 50 epochs on COCO (Liu et al. 2022); AP 43.5.

    Cost: 174 GFLOPs per image. Command: `raydetr train dab_detr_r101_50ep`.
    """
    changes = {"model.backbone.name": "resnet101"}
    return override(dab_detr_r50_50ep(), {"recipe": "dab_detr_r101_50ep", **changes})


def dab_detr_r101_dc5_50ep() -> RunConfig:
    """DAB-DETR-DC5, ResNet-101, 50 epochs on COCO (Liu et al. 2022); AP 45.8.

    Cost: 282 GFLOPs per image. Command: `raydetr train dab_detr_r101_dc5_50ep`.
    """
    changes = {"model.backbone.name": "resnet101"}
    return override(dab_detr_r50_dc5_50ep(), {"recipe": "dab_detr_r101_dc5_50ep", **changes})


def dab_detr_r101_3patterns_50ep() -> RunConfig:
    """DAB-DETR with 3 pattern embeddings, ResNet-101, 50 epochs on COCO (Liu et al. 2022); AP 44.1.

    Cost: 13 G multiply-adds more than without patterns. Command: `raydetr train dab_detr_r101_3patterns_50ep`.
    """
    changes = {"model.num_patterns": 3}
    return override(dab_detr_r101_50ep(), {"recipe": "dab_detr_r101_3patterns_50ep", **changes})


def dab_detr_r101_dc5_3patterns_50ep() -> RunConfig:
    """DAB-DETR-DC5, 3 pattern embeddings, ResNet-101, 50 epochs on COCO (Liu et al. 2022); AP 46.6.

    Cost: 22 G multiply-adds more than without patterns. Command: `raydetr train dab_detr_r101_dc5_3patterns_50ep`.
    """
    changes = {"model.num_patterns": 3}
    return override(dab_detr_r101_dc5_50ep(), {"recipe": "dab_detr_r101_dc5_3patterns_50ep", **changes})
