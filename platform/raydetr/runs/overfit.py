"""Learning a few images by heart: the quickest test that data, labels and model fit together."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from raydetr.config import RunConfig, override, to_dict
from raydetr.config.paths import is_remote
from raydetr.runs import run


@dataclass(frozen=True)
class Overfit:
    """AP on the very images that were trained on; `seconds` of wall time, start-up included."""

    AP: float
    AP50: float
    seconds: float
    images: int
    steps: int
    picture: str
    run: str

    def to_text(self) -> str:
        """Return the numbers and the verdict."""
        verdict = (
            "the model learns these images: data, labels and set-up fit together"
            if self.AP50 >= 0.8
            else "the model did not learn them: look at the picture; are the boxes where the objects are?"
        )
        return (
            f"{self.images} images, {self.steps} steps, {self.seconds:.0f} s: AP {self.AP:.3f}, AP50 {self.AP50:.3f}\n"
            f"{verdict}\npicture  {self.picture}\nrun      {self.run}"
        )


def overfit(
    config: RunConfig, data: str | None, *, num_images: int, num_steps: int, long_side: int, out: Path
) -> Overfit:
    """Train `config`'s model on the first `num_images` of `data` and evaluate on the same ones.

    All of them make one batch; nothing is augmented. Runs in this process, on all its CPUs. Writes
    `overfit.json` and `overfit.png` into `out`.

    Args:
        config: model and optimizer; `epochs` becomes `num_steps`.
        data: where shards are; None: the recipe's training shards.
        num_images: how many images.
        num_steps: optimizer steps.
        long_side: pixels; images are resized so that their long side has them.
        out: folder for the results.
    """
    result = run.start(_few_images(config, data, num_images, num_steps, long_side), local=True, warn=False)
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "overfit.png"
    shutil.copyfile(result.folder / "predictions.png", picture)
    outcome = Overfit(
        AP=result.metrics["AP"],
        AP50=result.metrics["AP50"],
        seconds=round(result.seconds, 1),
        images=num_images,
        steps=num_steps,
        picture=str(picture),
        run=str(result.folder),
    )
    (out / "overfit.json").write_text(json.dumps(asdict(outcome), indent=1))
    return outcome


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
    if not is_remote(shards):
        values["data"] |= {"remote": {}}
    values["optim"] |= {"epochs": num_steps}
    values["evaluation"] |= {"every_epochs": num_steps}
    values["cluster"] |= {
        "num_workers": 1,
        "cpus_per_worker": os.cpu_count() or 1,
        "use_gpu": torch.cuda.is_available(),
    }
    values["recipe"] = f"overfit-{config.recipe}"
    return override(RunConfig.model_validate(values), {})
