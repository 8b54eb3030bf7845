"""Define the sections of a run's configuration, each setting once.

The sections are frozen models without behavior, which other packages use directly: `Transform` takes a
`TransformConfig`, the remote reader a `RemoteConfig`. Settings that name files or folders have the types of
`raydetr.locations`, by which they are found and made absolute before they are sent to a worker.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from detrs.zoo import ModelConfig
from raydetr.locations import Location, TrackingUri, is_remote, scheme_of
from raydetr.section import Section
from raydetr.store.remote_config import RemoteConfig

ScalePer = Literal["image", "step"]
OnCorrupt = Literal["raise", "substitute", "mask"]
LabelMapKind = Literal["contiguous", "category_id"]
Engine = Literal["hotcoco", "pycocotools"]
Precision = Literal["fp32", "bf16", "fp16"]


# Settings of TransformConfig, each with the setting without which it has no effect
REQUIRES = {
    "max_side": "short_sides",
    "crop_short_sides": "crop_probability",
    "crop_min_side": "crop_probability",
    "crop_max_side": "crop_probability",
    "lsj_min_scale": "lsj_size",
    "lsj_max_scale": "lsj_size",
}
# Settings of TransformConfig that augment; the validation transform must not have them
AUGMENTATION = (
    "horizontal_flip",
    "crop_probability",
    "lsj_size",
    "mosaic_probability",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "scale_per",
)


MAX_INTEGER = 2**31  # no tensor has a size beyond it


class TransformConfig(Section):
    """Augmentation and resize of an image before it is batched.

    The official training of all five papers flips half of the images. It crops half of them: it resizes them to a
    short side of 400, 500 or 600, and cuts out a window with sides of 384 to 600 pixels.
    """

    short_sides: tuple[PositiveInt, ...] = ()  # pixels; one is drawn; empty: keep the size
    # Draw a short side per image, as the official code does, or one for all images of a step. With "step", a crop keeps
    # the image's aspect ratio: images of the same aspect ratio have the same size and no padding.
    scale_per: ScalePer = "image"
    max_side: PositiveInt = 1333  # pixels; limit of the long side when `short_sides` is given
    horizontal_flip: float = Field(default=0.0, ge=0.0, le=1.0)  # probability
    crop_probability: float = Field(default=0.0, ge=0.0, le=1.0)  # of a random crop before the resize
    crop_short_sides: tuple[PositiveInt, ...] = ()  # pixels; resize to one of them before the crop
    crop_min_side: PositiveInt = 384  # pixels; the sides of the crop are drawn from crop_min_side
    crop_max_side: PositiveInt = 600  # to crop_max_side, or to the image's side where that is smaller
    lsj_size: PositiveInt | None = None  # pixels; side of the square of large-scale jitter; None: no jitter
    lsj_min_scale: float = Field(default=0.1, gt=0)  # the image is resized to fit lsj_size times a factor
    lsj_max_scale: float = Field(default=2.0, gt=0)  # that is drawn from lsj_min_scale to lsj_max_scale
    mosaic_probability: float = Field(default=0.0, ge=0.0, le=1.0)  # of combining four images into one
    # The factor is drawn from 1 - brightness to 1 + brightness
    brightness: float = Field(default=0.0, ge=0.0)
    contrast: float = Field(default=0.0, ge=0.0)  # likewise
    saturation: float = Field(default=0.0, ge=0.0)  # likewise
    hue: float = Field(default=0.0, ge=0.0, le=0.5)  # largest shift, as a fraction of the color circle

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for low, high in (("crop_min_side", "crop_max_side"), ("lsj_min_scale", "lsj_max_scale")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} exceeds {high} {getattr(self, high)}")
        return self

    @model_validator(mode="after")
    def _check_effects(self) -> Self:
        for name, required in REQUIRES.items():
            value = getattr(self, name)
            if self.non_default((name,)) and not getattr(self, required):
                raise ValueError(f"{name} {value} has no effect without {required}: set both, or neither")
        for name in ("short_sides", "crop_probability"):
            value = getattr(self, name)
            if value and self.lsj_size is not None:
                raise ValueError(f"{name} {value} has no effect with lsj_size: the jitter resizes and crops")
        if self.scale_per == "step" and len(self.short_sides) < 2:
            raise ValueError(
                f"scale_per=step has no effect with short_sides {list(self.short_sides)}: "
                "give two or more, or omit scale_per"
            )
        return self


class DataConfig(Section):
    """The shards, and how they are batched."""

    train: Location  # a folder of shards, or its s3://, gs://, az://, http(s):// or file:// URL
    val: Location
    batch_size: PositiveInt  # images of one optimizer step, over all workers
    # Images that a worker processes at once; the gradients of a larger share of the batch are accumulated. None: the
    # complete share. What is computed does not change, except for statistics of batch norm
    micro_batch_size: PositiveInt | None = None
    eval_batch_size: PositiveInt  # images of one evaluation batch, per worker
    label_map: LabelMapKind = "contiguous"
    train_transform: TransformConfig = TransformConfig()
    val_transform: TransformConfig = TransformConfig()
    num_loader_workers: int = Field(default=0, ge=0)  # processes per worker; 0: load in the worker's process
    limit_images: PositiveInt | None = None  # use only the first images of each split; None: all
    on_corrupt: OnCorrupt = "raise"  # what to do with a corrupt sample
    max_corrupt: int | None = Field(default=None, ge=0)  # corrupt samples before a run stops; None: 1%, or 10
    synthetic: Literal["easy", "hard"] | None = None  # write synthetic shards to `train`, `val` if missing
    remote: RemoteConfig = RemoteConfig()

    @model_validator(mode="after")
    def _check_micro_batch_size(self) -> Self:
        if self.micro_batch_size is not None and self.micro_batch_size >= self.batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} has no effect with batch_size {self.batch_size}: omit it"
            )
        return self

    @model_validator(mode="after")
    def _check_val_transform(self) -> Self:
        for name in self.val_transform.non_default(AUGMENTATION):
            raise ValueError(
                f"val_transform.{name} {getattr(self.val_transform, name)} is augmentation, and evaluation "
                "needs the original image: omit it"
            )
        if len(self.val_transform.short_sides) > 1:
            raise ValueError(
                f"val_transform.short_sides {list(self.val_transform.short_sides)}: one of them would be drawn for "
                "each image, and AP would be random: give one"
            )
        return self

    @model_validator(mode="after")
    def _check_effects(self) -> Self:
        if self.max_corrupt is not None and self.on_corrupt == "raise":
            raise ValueError(f"max_corrupt {self.max_corrupt} has no effect with on_corrupt=raise")
        ignored = self.remote.non_default(tuple(RemoteConfig.model_fields))
        if ignored and not is_remote(self.train) and not is_remote(self.val):
            raise ValueError(
                f"{', '.join(f'remote.{name}' for name in ignored)} has no effect: {self.train} and {self.val} "
                "are local; omit it"
            )
        return self


class OptimConfig(Section):
    """AdamW, its schedule, gradient clipping and the EMA of the weights."""

    epochs: PositiveInt
    lr: float = Field(gt=0)
    lr_backbone: float = Field(gt=0)
    lr_sampling: float = Field(gt=0)  # sampling offsets and reference points (Deformable DETR, A.4)
    weight_decay: NonNegativeFloat = 1e-4
    decay_norms_and_biases: bool = True  # the official code decays every parameter
    schedule: Literal["step", "cosine"] = "step"
    warmup_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)  # of all steps, linear from 0
    lr_drop_epochs: tuple[PositiveInt, ...] = ()  # "step": lr is multiplied by 0.1 after each of these
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)  # "cosine": lr of the last step over lr
    clip_max_norm: float | None = Field(default=0.1, gt=0)  # None: no clipping
    ema_decay: float | None = Field(default=None, gt=0, lt=1)  # None: no EMA
    precision: Precision = "fp32"  # of the model; losses and boxes are always float32
    # Compute activations again in the backward pass: slower, less memory
    activation_checkpointing: bool = False
    max_skipped_steps: int = Field(default=10, ge=0)  # steps with NaN or infinity before a run stops

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.schedule == "cosine" and self.lr_drop_epochs:
            raise ValueError(f"lr_drop_epochs {list(self.lr_drop_epochs)} has no effect with schedule=cosine")
        if self.schedule == "step" and self.min_lr_ratio:
            raise ValueError(f"min_lr_ratio {self.min_lr_ratio} has no effect with schedule=step")
        if list(self.lr_drop_epochs) != sorted(set(self.lr_drop_epochs)):
            raise ValueError(f"lr_drop_epochs {list(self.lr_drop_epochs)} must ascend, each epoch once")
        return self


class InitConfig(Section):
    """The weights that a run starts from."""

    # A checkpoint of a run, or the output of `raydetr import-checkpoint`; None: random weights
    checkpoint: Location | None = None


class EvaluationConfig(Section):
    """The schedule of evaluations on the validation split, and what scores them."""

    every_epochs: PositiveInt = 1  # the last epoch is always evaluated
    # What computes AP; both give the same numbers, pycocotools in far more time and memory
    engine: Engine = "hotcoco"
    report: bool = True  # write what explains the AP of every evaluation, beside its scores


class ClusterConfig(Section):
    """The Ray cluster, and the workers of the run."""

    address: str | None = None  # None: the cluster of this job, or else a new one on this machine
    num_workers: PositiveInt = 1
    use_gpu: bool = False
    # On GPUs, the same run ends in the same bits, as on CPUs; slower
    deterministic: bool = False
    cpus_per_worker: PositiveInt = 1
    max_failures: int = Field(default=3, ge=-1)  # of the workers, without progress in between; -1: unlimited
    min_workers: PositiveInt | None = (
        None  # while nodes are missing; None: num_workers, however long it takes
    )
    wait_minutes: float = Field(
        default=10.0, ge=0
    )  # for missing nodes, before the run goes on with fewer workers
    stall_minutes: float = Field(
        default=60.0, gt=0
    )  # without progress, after which the workers are started again
    bf16_gradients: bool = False  # send gradients in bfloat16: half the bytes, rounded before they are summed

    @model_validator(mode="after")
    def _check_effects(self) -> Self:
        if self.deterministic and not self.use_gpu:
            raise ValueError("deterministic has no effect without use_gpu: CPUs are deterministic; omit it")
        if self.bf16_gradients and self.num_workers == 1:
            raise ValueError("bf16_gradients has no effect with num_workers 1: omit it")
        if self.min_workers is not None and self.min_workers >= self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} has no effect with num_workers {self.num_workers}: give fewer, or "
                "omit it"
            )
        return self


class StorageConfig(Section):
    """The storage of runs: a folder, which with several nodes all of them must mount, or a URL."""

    path: Location = "runs"
    keep_checkpoints: PositiveInt = 2  # the newest ones; the one with the best AP is kept beside them
    checkpoint_minutes: float | None = Field(
        default=10.0, gt=0
    )  # None: at evaluations, and every checkpoint_steps
    checkpoint_steps: PositiveInt | None = None  # None: at evaluations, and every checkpoint_minutes
    # A run whose checkpoints cannot be written goes on, and tries again, for this long; then it stops
    max_minutes_without_checkpoint: float = Field(default=60.0, gt=0)

    @field_validator("path")
    @classmethod
    def _check_writable(cls, path: str) -> str:
        if (scheme_of(path) or "").startswith("http"):
            raise ValueError(
                f"{path}: runs cannot be written to a web server: give a folder, s3://, gs:// or az://"
            )
        return path


class TrackingConfig(Section):
    """The MLflow server or database, and the interval between logged steps."""

    # None: MLFLOW_TRACKING_URI, or else sqlite in `storage.path`, or in runs/ if that is a URL
    uri: TrackingUri | None = None
    experiment: str | None = None  # None: MLFLOW_EXPERIMENT_NAME, or else raydetr
    log_every_steps: PositiveInt = 10
    upload: bool = True  # to MLflow, during the run; False: later, with `raydetr track sync`
    register_model: bool = True  # the best checkpoint, in MLflow's registry, under the name of the recipe


class RunConfig(Section):
    """A complete run, as returned by recipes. It alone determines what is trained."""

    recipe: str
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    model: ModelConfig = Field(discriminator="architecture")
    optim: OptimConfig
    init: InitConfig = InitConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("model")
    @classmethod
    def _check_finite(cls, model: ModelConfig) -> ModelConfig:
        """Verify what the sections verify of their own numbers; the model's settings are plain dataclasses."""
        values = dataclasses.asdict(model)
        for name, value in {
            **values,
            **{f"loss.{name}": value for name, value in values["loss"].items()},
        }.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}: give a finite number")
            if isinstance(value, int) and abs(value) >= MAX_INTEGER:
                raise ValueError(f"{name} is {value}: give a number below {MAX_INTEGER:,}")
        return model
