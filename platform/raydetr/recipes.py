"""Recipes: functions that return a complete RunConfig. A variant calls another and changes fields.

The docstring's first line is what `raydetr recipes` shows; the rest says what to expect.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

from detrs.zoo import BackboneConfig, DeformableDetrConfig, DinoConfig, LossConfig
from raydetr.config import (
    ClusterConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    OptimConfig,
    RunConfig,
    TransformConfig,
    nearest,
)

OFFICIAL_SHORT_SIDES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


def quickstart() -> RunConfig:
    """A small DINO that learns the procedural sample data in minutes on two CPU cores.

    Data: 2,400 + 500 generated 96x96 images of 4 classes (written on first use).
    Expected: AP 0.55, AP50 0.75 after 12 epochs. Command: `make quickstart`, or `raydetr train quickstart`.
    """
    return RunConfig(
        recipe="quickstart",
        data=DataConfig(
            train=Path("build/quickstart/train"),
            val=Path("build/quickstart/val"),
            sample="easy",
            batch_size=16,
            eval_batch_size=25,
            train_transform=TransformConfig(horizontal_flip=0.5),
        ),
        model=small_dino(),
        optim=OptimConfig(
            epochs=12,
            lr=4e-3,
            lr_backbone=4e-3,
            lr_sampling=4e-3,
            decay_norms_and_biases=False,
            schedule="cosine",
            warmup_share=0.05,
            final_lr_share=0.02,
            ema_decay=0.99,
        ),
        evaluation=EvaluationConfig(every_epochs=3),
        cluster=ClusterConfig(num_workers=2),
    )


def quickstart_hard() -> RunConfig:
    """The quickstart on the hard sample data: 5 classes, no colour cue, objects of 11-60 pixels."""
    easy = quickstart()
    data = easy.data.model_copy(
        update={
            "train": Path("build/quickstart-hard/train"),
            "val": Path("build/quickstart-hard/val"),
            "sample": "hard",
        }
    )
    return easy.model_copy(update={"recipe": "quickstart_hard", "data": data})


def dino_r50_4scale_12ep() -> RunConfig:
    """DINO, 4 scales, ResNet-50, 12 epochs on COCO (Zhang et al. 2022); official AP 49.0.

    Set `data.train` and `data.val` to COCO shards and `model.backbone.weights` to a torchvision
    ResNet-50 file. 16 images a batch, as in the paper. The official random crop is not part of it yet.
    """
    return RunConfig(
        recipe="dino_r50_4scale_12ep",
        data=coco_data(),
        model=DinoConfig(),
        optim=OptimConfig(
            epochs=12, lr=1e-4, lr_backbone=1e-5, lr_sampling=1e-4, schedule="step", drop_epochs=(11,)
        ),
        cluster=ClusterConfig(num_workers=8, use_gpu=True, cpus_per_worker=4),
    )


def deformable_detr_r50_two_stage_50ep() -> RunConfig:
    """Two-stage Deformable DETR with refinement, ResNet-50, 50 epochs on COCO (Zhu et al. 2021); AP 46.2.

    Set `data.train` and `data.val` to COCO shards and `model.backbone.weights` to a torchvision
    ResNet-50 file. 32 images a batch, as in the paper. The official random crop is not part of it yet.
    """
    coco = coco_data()
    return RunConfig(
        recipe="deformable_detr_r50_two_stage_50ep",
        data=coco.model_copy(update={"batch_size": 32}),
        model=DeformableDetrConfig(refinement=True, two_stage=True),
        optim=OptimConfig(
            epochs=50, lr=2e-4, lr_backbone=2e-5, lr_sampling=2e-5, schedule="step", drop_epochs=(40,)
        ),
        cluster=ClusterConfig(num_workers=8, use_gpu=True, cpus_per_worker=4),
    )


RECIPES: tuple[Callable[[], RunConfig], ...] = (
    quickstart,
    quickstart_hard,
    dino_r50_4scale_12ep,
    deformable_detr_r50_two_stage_50ep,
)


def find(name: str) -> RunConfig:
    """The configuration of the recipe called `name`.

    Raises:
        ConfigError: there is no such recipe; the nearest one is named.
    """
    for recipe in RECIPES:
        if recipe.__name__ == name:
            return recipe()
    names = [recipe.__name__ for recipe in RECIPES]
    raise ConfigError(f"no recipe {name!r}{nearest(name, names)} There are: {', '.join(names)}")


def summary(recipe: Callable[[], RunConfig]) -> str:
    """The first line of a recipe's docstring."""
    return (inspect.getdoc(recipe) or "").splitlines()[0]


def small_dino() -> DinoConfig:
    """DINO with 0.7 M parameters for 96-pixel images: no encoder, two decoder layers, three levels."""
    return DinoConfig(
        backbone=BackboneConfig(name="small", norm="batch", num_frozen_stages=0),
        num_feature_levels=3,
        hidden_dim=64,
        num_heads=4,
        num_encoder_layers=0,
        num_decoder_layers=2,
        ffn_dim=128,
        num_queries=25,
        proposal_size=0.1,
        shared_heads=False,
        num_denoising=8,
        denoising_groups="fill",
        loss=LossConfig(kind="mal", class_weight=2.0, gamma=1.5),
        num_select=100,
    )


def coco_data() -> DataConfig:
    """COCO 2017 at the official scales, labels as the official checkpoints have them."""
    return DataConfig(
        train=Path("data/coco/train2017"),
        val=Path("data/coco/val2017"),
        batch_size=16,
        eval_batch_size=2,
        label_map="category_id",
        train_transform=TransformConfig(short_sides=OFFICIAL_SHORT_SIDES, max_side=1333, horizontal_flip=0.5),
        val_transform=TransformConfig(short_sides=(800,), max_side=1333),
        num_loader_workers=3,
    )
