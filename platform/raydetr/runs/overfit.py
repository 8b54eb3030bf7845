"""Overfit a few images: the fastest check that data, labels and model fit together."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from raydetr.config import RunConfig, from_dict, to_dict
from raydetr.locations import is_remote
from raydetr.runs import run
from raydetr.tracking.description import PREDICTIONS

# Settings that `overfit` sets itself
OVERFIT_DECIDES = (
    "cluster.", "data.num_loader_workers", "data.batch_size", "data.limit_images", "data.train_transform.",
    "data.val_transform.", "optim.epochs", "evaluation.every_epochs",
)  # fmt: skip


@dataclass(frozen=True)
class OverfitResult:
    """AP on the training images; `seconds` is the wall time, with start-up."""

    AP: float
    AP50: float
    seconds: float
    images: int
    steps: int
    predictions: str | None  # image grid with true and predicted boxes; None: it could not be drawn
    run: str  # folder

    def to_text(self) -> str:
        """Return the numbers and what they mean."""
        conclusion = (
            "the model has learned these images: data, labels and settings fit together"
            if self.AP50 >= 0.8
            else "the model has not learned these images: look at the predictions; are the ground-truth boxes on the "
            "objects?"
        )
        return (
            f"{self.images} images, {self.steps} steps, {self.seconds:.0f} s: AP {self.AP:.3f}, AP50 {self.AP50:.3f}\n"
            f"{conclusion}\npredictions  {self.predictions or '-'}\nrun          {self.run}"
        )


def overfit(
    config: RunConfig, data: str | None, *, num_images: int, num_steps: int, long_side: int, out: Path
) -> OverfitResult:
    """Train `config`'s model on the first `num_images` of `data`, and evaluate it on the same images.

    All images are in one batch, without augmentation. Runs in this process, on all CPUs. Writes `overfit.json` and
    `overfit.png` into `out`.

    Args:
        config: model and optimizer; `epochs` becomes `num_steps`.
        data: folder or URL of shards; None: the training shards of `config`.
        num_images: number of images.
        num_steps: number of optimizer steps.
        long_side: pixels; long side of the resized images.
        out: folder for the results.

    Raises:
        ValueError: none of the images has an object, or the configuration or the shards cannot be used.
        OSError: the shards cannot be read, or `out` cannot be written.
        FloatingPointError: more steps than `optim.max_skipped_steps` were not finite.
        TrackingError: MLflow cannot be reached at the start.
    """
    result = run.start(_few_images(config, data, num_images, num_steps, long_side), local=True, warn=False)
    if "AP" not in result.metrics:
        raise ValueError(
            f"{config.data.train if data is None else data}: none of the first {num_images} images has an object that "
            "is evaluated, so AP is undefined: take more images (--images)"
        )
    out.mkdir(parents=True, exist_ok=True)
    drawn, grid = result.folder / PREDICTIONS, out / "overfit.png"
    is_drawn = drawn.exists()  # otherwise a warning has told why
    if is_drawn:
        grid.write_bytes(drawn.read_bytes())
    else:
        grid.unlink(missing_ok=True)
    overfit_result = OverfitResult(
        AP=result.metrics["AP"],
        AP50=result.metrics["AP50"],
        seconds=round(result.effort.seconds, 1),
        images=num_images,
        steps=num_steps,
        predictions=str(grid) if is_drawn else None,
        run=str(result.folder),
    )
    (out / "overfit.json").write_text(json.dumps(asdict(overfit_result), indent=1, allow_nan=False))
    return overfit_result


def _few_images(
    config: RunConfig, data: str | None, num_images: int, num_steps: int, long_side: int
) -> RunConfig:
    shards = data or config.data.train
    resize = {"short_sides": [long_side], "max_side": long_side, "horizontal_flip": 0.0}
    values = to_dict(config)
    values["data"] |= {
        "train": shards,
        "val": shards,
        "synthetic": config.data.synthetic if data is None else None,
        "batch_size": num_images,
        "limit_images": num_images,
        "train_transform": resize,
        "val_transform": resize,
        "num_loader_workers": 0,
    }
    if not is_remote(shards):  # remote settings are refused for local shards
        values["data"] |= {"remote": {}}
    values["optim"] |= {"epochs": num_steps}
    values["evaluation"] |= {"every_epochs": num_steps}
    values["cluster"] |= {
        "num_workers": 1,
        "cpus_per_worker": os.cpu_count() or 1,
        "use_gpu": torch.cuda.is_available(),
    }
    values["recipe"] = f"overfit-{config.recipe}"
    return from_dict(values)
