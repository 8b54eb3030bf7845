"""Fine-tune on your own data, from official weights or from a checkpoint of a run.

These recipes start from the checkpoint (`init.checkpoint`) that `raydetr import-checkpoint` writes with the command
in their docstrings. Rows of the class heads are taken for classes of the same name; all other weights are kept.
Learning rates are half of the official ones, with a short warm-up for the new heads and a cosine decay; the EMA reduces
the noise of training on few images. Batch norm stays frozen. The batch is for one GPU; with a larger one, scale the
learning rates in proportion. All images of a step have the same scale (`scale_per=step`), which reduces padding.
"""

from __future__ import annotations

from pathlib import Path

from raydetr.config import RunConfig, override
from raydetr.recipes.conditional import conditional_detr_r50_50ep
from raydetr.recipes.dab import dab_detr_r50_50ep
from raydetr.recipes.deformable import deformable_detr_r50_two_stage_50ep
from raydetr.recipes.detr import detr_r50_500ep
from raydetr.recipes.dino import dino_r50_4scale_12ep

WEIGHTS = Path("weights")  # with one folder per imported checkpoint


def finetune_dino_r50() -> RunConfig:
    """Fine-tune DINO (4 scales, ResNet-50) on your data, 24 epochs: try this one first.

    It starts from AP 49.0 on COCO, the highest of the five.
    First `raydetr import-checkpoint FILE --model dino_r50_4scale --out weights/dino_r50_4scale`.
    Command: `raydetr train finetune_dino_r50 data.train=shards/train data.val=shards/val`.
    """
    return _finetune("finetune_dino_r50", dino_r50_4scale_12ep(), "dino_r50_4scale", epochs=24)


def finetune_deformable_detr_r50() -> RunConfig:
    """Fine-tune two-stage Deformable DETR (ResNet-50) on your data, 24 epochs.

    First `raydetr import-checkpoint FILE --model deformable_detr_r50_two_stage
    --out weights/deformable_detr_r50_two_stage`.
    Command: `raydetr train finetune_deformable_detr_r50 data.train=shards/train data.val=shards/val`.
    """
    parent = deformable_detr_r50_two_stage_50ep()
    return _finetune("finetune_deformable_detr_r50", parent, "deformable_detr_r50_two_stage", epochs=24)


def finetune_dab_detr_r50() -> RunConfig:
    """Fine-tune DAB-DETR (ResNet-50) on your data, 36 epochs.

    First `raydetr import-checkpoint FILE --model dab_detr_r50 --out weights/dab_detr_r50`.
    Command: `raydetr train finetune_dab_detr_r50 data.train=shards/train data.val=shards/val`.
    """
    return _finetune("finetune_dab_detr_r50", dab_detr_r50_50ep(), "dab_detr_r50", epochs=36)


def finetune_conditional_detr_r50() -> RunConfig:
    """Fine-tune Conditional DETR (ResNet-50) on your data, 36 epochs.

    First `raydetr import-checkpoint FILE --model conditional_detr_r50 --out weights/conditional_detr_r50`.
    Command: `raydetr train finetune_conditional_detr_r50 data.train=shards/train data.val=shards/val`.
    """
    parent = conditional_detr_r50_50ep()
    return _finetune("finetune_conditional_detr_r50", parent, "conditional_detr_r50", epochs=36)


def finetune_detr_r50() -> RunConfig:
    """Fine-tune DETR (ResNet-50) on your data, 60 epochs: the slowest to adapt, and the fastest to run.

    First `raydetr import-checkpoint detr-r50-e632da11.pth --model detr_r50 --out weights/detr_r50`.
    Command: `raydetr train finetune_detr_r50 data.train=shards/train data.val=shards/val`.
    """
    return _finetune("finetune_detr_r50", detr_r50_500ep(), "detr_r50", epochs=60)


def _finetune(recipe: str, parent: RunConfig, weights: str, *, epochs: int) -> RunConfig:
    official = parent.optim
    return override(
        parent,
        {
            "recipe": recipe,
            "init.checkpoint": str(WEIGHTS / weights),
            "data.train": "shards/train",
            "data.val": "shards/val",
            "data.label_map": "contiguous",
            "data.batch_size": 8,
            "data.train_transform.scale_per": "step",
            "optim.epochs": epochs,
            "optim.lr": official.lr / 2,
            "optim.lr_backbone": official.lr_backbone / 2,
            "optim.lr_sampling": official.lr_sampling / 2,
            "optim.schedule": "cosine",
            "optim.lr_drop_epochs": [],
            "optim.warmup_fraction": 0.02,
            "optim.min_lr_ratio": 0.02,
            "optim.ema_decay": 0.999,
            "cluster.num_workers": 1,
        },
    )
