"""Build what the official trainings on COCO 2017 have in common: data, augmentation, optimizer."""

from __future__ import annotations

from detrs.zoo import ModelConfig
from raydetr.config import ClusterConfig, DataConfig, OptimConfig, RunConfig, TransformConfig

OFFICIAL_SHORT_SIDES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)  # pixels


def official_run(recipe: str, model: ModelConfig, optim: OptimConfig, *, batch_size: int) -> RunConfig:
    """Return a training on COCO with eight GPUs; `batch_size` is the sum over all of them."""
    return RunConfig(
        recipe=recipe,
        data=coco_data(batch_size),
        model=model,
        optim=optim,
        cluster=ClusterConfig(num_workers=8, use_gpu=True, cpus_per_worker=4),
    )


def official_optim(
    *, epochs: int, lr_drop_epoch: int, lr: float, lr_backbone: float, lr_sampling: float
) -> OptimConfig:
    """Return AdamW with weight decay 1e-4 on all parameters, clipping at 0.1, one tenfold drop, no EMA."""
    return OptimConfig(
        epochs=epochs,
        lr=lr,
        lr_backbone=lr_backbone,
        lr_sampling=lr_sampling,
        weight_decay=1e-4,
        clip_max_norm=0.1,
        schedule="step",
        lr_drop_epochs=(lr_drop_epoch,),
    )


def coco_data(batch_size: int) -> DataConfig:
    """Return COCO 2017 at the official scales, with the labels of the official checkpoints."""
    return DataConfig(
        train="data/coco/train2017",
        val="data/coco/val2017",
        batch_size=batch_size,
        eval_batch_size=2,
        label_map="category_id",
        train_transform=official_training_transform(),
        val_transform=TransformConfig(short_sides=(800,), max_side=1333),
        num_loader_workers=3,
    )


def official_training_transform() -> TransformConfig:
    """Return flips and crops of half of the images each, and a resize of each image to one of eleven scales."""
    return TransformConfig(
        short_sides=OFFICIAL_SHORT_SIDES,
        scale_per="image",
        max_side=1333,
        horizontal_flip=0.5,
        crop_probability=0.5,
        crop_short_sides=(400, 500, 600),
        crop_min_side=384,
        crop_max_side=600,
    )
