"""Deformable DETR: the official schedules (Zhu et al., ICLR 2021, arXiv:2010.04159; AP of the official models)."""

from __future__ import annotations

from detrs.zoo import DeformableDetrConfig, LossConfig
from raydetr.config import RunConfig, override
from raydetr.recipes.coco import official_optim, official_run


def deformable_detr_r50_50ep() -> RunConfig:
    """Deformable DETR, four scales, ResNet-50, 50 epochs on COCO (Zhu et al. 2021); official AP 44.5.

    The learning rate drops after 40 epochs; sampling offsets and reference points have a tenth of it; 32 images per
    batch. The paper has AP 43.8. Cost: 173 GFLOPs per image, about 325 V100 hours.
    Command: `raydetr train deformable_detr_r50_50ep`.
    """
    optim = official_optim(epochs=50, lr_drop_epoch=40, lr=2e-4, lr_backbone=2e-5, lr_sampling=2e-5)
    return official_run("deformable_detr_r50_50ep", DeformableDetrConfig(), optim, batch_size=32)


def deformable_detr_r50_refine_50ep() -> RunConfig:
    """Deformable DETR with box refinement, ResNet-50, 50 epochs on COCO (Zhu et al. 2021); official AP 46.2.

    The paper has AP 45.4. Cost: 173 GFLOPs per image, about 325 V100 hours.
    Command: `raydetr train deformable_detr_r50_refine_50ep`.
    """
    changes = {"model.refinement": True}
    return override(deformable_detr_r50_50ep(), {"recipe": "deformable_detr_r50_refine_50ep", **changes})


def deformable_detr_r50_two_stage_50ep() -> RunConfig:
    """Two-stage Deformable DETR with refinement, ResNet-50, 50 epochs on COCO (Zhu et al. 2021); AP 46.9.

    The paper has AP 46.2. Cost: 173 GFLOPs per image, about 340 V100 hours.
    Command: `raydetr train deformable_detr_r50_two_stage_50ep`.
    """
    recipe = {"recipe": "deformable_detr_r50_two_stage_50ep"}
    return override(deformable_detr_r50_refine_50ep(), {**recipe, "model.two_stage": True})


def deformable_detr_r50_single_scale_50ep() -> RunConfig:
    """Deformable DETR on the last stage only, ResNet-50, 50 epochs (Zhu et al. 2021); official AP 39.4.

    Cost: 78 GFLOPs per image, about 160 V100 hours. Command: `raydetr train deformable_detr_r50_single_scale_50ep`.
    """
    changes = {"model.strides": [32], "model.num_feature_levels": 1}
    recipe = {"recipe": "deformable_detr_r50_single_scale_50ep"}
    return override(deformable_detr_r50_50ep(), {**recipe, **changes})


def deformable_detr_r50_single_scale_dc5_50ep() -> RunConfig:
    """Deformable DETR on the dilated last stage only, ResNet-50, 50 epochs (Zhu et al. 2021); AP 41.5.

    Cost: 128 GFLOPs per image, about 215 V100 hours.
    Command: `raydetr train deformable_detr_r50_single_scale_dc5_50ep`.
    """
    recipe = {"recipe": "deformable_detr_r50_single_scale_dc5_50ep"}
    return override(deformable_detr_r50_single_scale_50ep(), {**recipe, "model.backbone.dilation": True})


def dab_deformable_detr_r50_50ep() -> RunConfig:
    """DAB-Deformable-DETR, four scales, ResNet-50, 50 epochs on COCO (Liu et al. 2022); official AP 48.7.

    Learned boxes as queries. Rates, batch, width of the layers and weight of the class loss are those of DAB-DETR, as
    in its official command; AP of the released model (v2). Cost: not published.
    Command: `raydetr train dab_deformable_detr_r50_50ep`.
    """
    optim = official_optim(epochs=50, lr_drop_epoch=40, lr=1e-4, lr_backbone=1e-5, lr_sampling=1e-4)
    model = DeformableDetrConfig(
        refinement=True, anchors=True, ffn_dim=2048, dropout=0.0, loss=LossConfig(class_weight=1.0)
    )
    return official_run("dab_deformable_detr_r50_50ep", model, optim, batch_size=16)
