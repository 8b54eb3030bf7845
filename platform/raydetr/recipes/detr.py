"""DETR: the official schedules (Carion et al., ECCV 2020, arXiv:2005.12872; AP of the official models), and the short
ones of the Deformable DETR paper (Zhu et al., ICLR 2021, arXiv:2010.04159, table 1)."""

from __future__ import annotations

from detrs.zoo import DetrConfig
from raydetr.config import RunConfig, override
from raydetr.recipes.coco import official_optim, official_run


def detr_r50_500ep() -> RunConfig:
    """DETR, ResNet-50, 500 epochs on COCO (Carion et al. 2020); official AP 42.0.

    The learning rate drops after 400 epochs; 64 images per batch, as in the paper.
    Cost: 86 GFLOPs per image, about 2000 V100 hours. Command: `raydetr train detr_r50_500ep`.
    """
    optim = official_optim(epochs=500, lr_drop_epoch=400, lr=1e-4, lr_backbone=1e-5, lr_sampling=1e-4)
    return official_run("detr_r50_500ep", DetrConfig(), optim, batch_size=64)


def detr_r50_150ep() -> RunConfig:
    """DETR, ResNet-50, 150 epochs on COCO (Carion et al. 2020); official AP 39.5.

    The official short schedule, on one machine: the learning rate drops after 100 epochs, 16 images per batch. Cost: 86
    GFLOPs per image, about 580 V100 hours (3 days on 8). Command: `raydetr train detr_r50_150ep`.
    """
    changes = {"optim.epochs": 150, "optim.lr_drop_epochs": [100], "data.batch_size": 16}
    return override(detr_r50_500ep(), {"recipe": "detr_r50_150ep", **changes})


def detr_r50_dc5_500ep() -> RunConfig:
    """DETR-DC5 (dilated last stage), ResNet-50, 500 epochs on COCO (Carion et al. 2020); official AP 43.3.

    Cost: 187 GFLOPs per image, about 7000 V100 hours. It was trained with one image per GPU and loses AP when
    evaluated with more, because of the padding. Command: `raydetr train detr_r50_dc5_500ep`.
    """
    changes = {"model.backbone.dilation": True, "data.eval_batch_size": 1}
    return override(detr_r50_500ep(), {"recipe": "detr_r50_dc5_500ep", **changes})


def detr_r50_dc5_50ep() -> RunConfig:
    """DETR-DC5, ResNet-50, 50 epochs on COCO, a baseline of Deformable DETR (Zhu et al. 2021); AP 35.3.

    Table 1 of that paper; the learning rate drops after 40 epochs. It does not give the batch and the learning rates of
    its baselines: these are DETR's. Cost: 187 GFLOPs per image, about 700 V100 hours.
    Command: `raydetr train detr_r50_dc5_50ep`.
    """
    changes = {"optim.epochs": 50, "optim.lr_drop_epochs": [40]}
    return override(detr_r50_dc5_500ep(), {"recipe": "detr_r50_dc5_50ep", **changes})


def detr_r50_dc5_plus_50ep() -> RunConfig:
    """DETR-DC5+ (focal loss, 300 queries), ResNet-50, 50 epochs on COCO (Zhu et al. 2021); AP 36.2.

    The improved baseline in table 1 of the Deformable DETR paper: DETR-DC5 with that paper's class loss (focal, weight
    2), matching cost, number of queries and detections. Cost: 187 GFLOPs per image, about 700 V100 hours.
    Command: `raydetr train detr_r50_dc5_plus_50ep`.
    """
    changes = {
        "model.loss.kind": "focal",
        "model.loss.class_weight": 2.0,
        "model.loss.class_cost": 2.0,
        "model.num_queries": 300,
    }
    return override(detr_r50_dc5_50ep(), {"recipe": "detr_r50_dc5_plus_50ep", **changes})


def detr_r101_500ep() -> RunConfig:
    """DETR, ResNet-101, 500 epochs on COCO (Carion et al. 2020); official AP 43.5.

    Cost: 152 GFLOPs per image. Command: `raydetr train detr_r101_500ep`.
    """
    changes = {"model.backbone.name": "resnet101"}
    return override(detr_r50_500ep(), {"recipe": "detr_r101_500ep", **changes})


def detr_r101_dc5_500ep() -> RunConfig:
    """DETR-DC5 (dilated last stage), ResNet-101, 500 epochs on COCO (Carion et al. 2020); official AP 44.9.

    Cost: 253 GFLOPs per image. Command: `raydetr train detr_r101_dc5_500ep`.
    """
    changes = {"model.backbone.name": "resnet101"}
    return override(detr_r50_dc5_500ep(), {"recipe": "detr_r101_dc5_500ep", **changes})
