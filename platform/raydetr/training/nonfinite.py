"""Skip steps with NaN or infinity: all workers skip together, and the batch of each cause is written to disk.

If one worker raised an error in the middle of a step, the others would wait forever in the all-reduce of the gradient.
It therefore finishes the step with a loss of NaN. The NaN reaches every rank through the gradient, which all
ranks receive anyway, so that a step without problems needs no additional collective.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from detrs.criterion import Losses
from detrs.matcher import NonFiniteError
from detrs.structures import Outputs, Targets
from raydetr.data.batch import Batch
from raydetr.store.folders import Folder, local_output


@dataclass(frozen=True)
class StepLoss:
    """Loss of one step: NaN if anything was not finite, with the matcher's message in `error` if it has one."""

    total: Tensor
    terms: dict[str, Tensor]
    error: str | None = None

    def reason(self) -> str | None:
        """Return what is not finite in this worker's forward pass; None if everything is finite."""
        if self.error is not None or self.total.isfinite():
            return self.error
        bad = [name for name, term in self.terms.items() if not term.isfinite()]
        return f"the loss is not finite ({', '.join(bad) or 'only its sum'})"


@dataclass(frozen=True)
class NonFiniteCause:
    """The reason why a step was skipped, on one worker."""

    rank: int
    reason: str
    image_ids: tuple[int, ...]

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.reason}; images {', '.join(map(str, self.image_ids))}"


@dataclass(frozen=True)
class SkippedStep:
    """A step that changed nothing but the position.

    `causes` are the same on every worker; batch, seed and loss terms are those of this worker. Without causes the
    gradient has only overflowed float16, which is normal while the gradient scaler searches for its scale.
    """

    step: int  # counted from 1
    random_seed: int  # of this worker's random numbers in the step
    causes: tuple[NonFiniteCause, ...]
    batch: Batch
    terms: Mapping[str, Tensor]

    def folder(self, run: Folder, rank: int) -> Folder:
        """Return the folder in which `rank` writes its part of the step."""
        return run / "skipped-steps" / f"step-{self.step:06d}-rank-{rank}"

    def dump(self, run: Folder, rank: int) -> None:
        """Write this worker's batch, as the model got it, if this worker is one of the causes.

        Raises:
            OSError: the files cannot be written.
        """
        for cause in self.causes:
            if cause.rank == rank:
                with local_output(self.folder(run, rank)) as folder:
                    _dump(folder, self, cause)

    def describe(self, run: Folder) -> str:
        """Return one sentence per cause, with the folder of its dump."""
        causes = [f"{cause} (kept in {self.folder(run, cause.rank)})" for cause in self.causes]
        return f"step {self.step}: {'. '.join(causes)}"


class BatchNormSnapshot:
    """Running statistics of a model's batch norms, to undo a forward pass.

    A forward pass in training mode updates them at once, before it is known whether the step is used.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._live = [buffer for norm in norms for buffer in norm.buffers()]
        self._saved = [buffer.clone() for buffer in self._live]

    def save(self) -> None:
        """Copy the current statistics."""
        if self._live:  # _foreach_copy_ refuses empty lists
            torch._foreach_copy_(self._saved, self._live)

    def restore(self) -> None:
        """Reset the statistics to those of the last `save`."""
        if self._live:
            torch._foreach_copy_(self._live, self._saved)


def compute_loss(
    criterion: Callable[[Outputs, Targets, Tensor, Tensor | None], Losses],
    outputs: Outputs,
    targets: Targets,
    num_boxes: Tensor,
    class_weight: Tensor | None = None,
    *,
    is_blank: bool = False,
) -> StepLoss:
    """Apply the criterion; return a loss of NaN where it raises NonFiniteError or is infinite.

    An infinite loss can have a finite gradient, a loss of NaN cannot: the gradient shows every problem. The loss of a
    blank batch is 0, and so is its gradient: a worker without images still takes part in the step, because the other
    workers wait for its gradient.
    """
    try:
        losses = criterion(outputs, targets, num_boxes, class_weight)
    except NonFiniteError as error:
        return StepLoss(_nan_loss(outputs), {}, str(error))
    # A product instead of a branch: a branch would make the host wait for the device
    factor = torch.where(losses.total.detach().isfinite(), 0.0 if is_blank else 1.0, math.nan)
    terms = {name: term * 0.0 for name, term in losses.terms.items()} if is_blank else losses.terms
    return StepLoss(losses.total * factor, terms)


def _nan_loss(outputs: Outputs) -> Tensor:
    """Return NaN as a function of all outputs that a loss can depend on.

    Every parameter then gets a gradient. DistributedDataParallel waits for the gradients of all parameters.
    """
    parts = [outputs.predictions]
    if outputs.first_stage is not None:
        parts.append(outputs.first_stage.predictions)
    if outputs.denoised is not None:
        parts.append(outputs.denoised.predictions)
    sums = [x.float().sum() for part in parts for x in (part.logits, part.boxes)]
    return torch.stack(sums).sum() * math.nan


def _dump(folder: Path, skipped: SkippedStep, cause: NonFiniteCause) -> None:
    batch = skipped.batch
    ends = torch.tensor(batch.counts).cumsum(0).tolist()
    images = []
    for i, (image_id, end) in enumerate(zip(batch.image_ids.tolist(), ends, strict=True)):
        height, width = batch.sizes[i].tolist()
        name = f"image-{i:02d}-id-{image_id}.png"
        pixels = batch.pixels[i, :, :height, :width].permute(1, 2, 0).to(torch.uint8)
        Image.fromarray(pixels.contiguous().numpy()).save(folder / name)
        rows = slice(end - batch.counts[i], end)
        images.append(
            {
                "file": name,
                "image_id": image_id,
                "original_size": batch.original_sizes[i].tolist(),
                "labels": batch.labels[rows].tolist(),
                "boxes_cxcywh": [[_number(x) for x in box] for box in batch.boxes[rows].tolist()],
            }
        )
    record = {
        "step": skipped.step,
        "rank": cause.rank,
        "cause": cause.reason,
        "position": batch.position,
        "random_seed": skipped.random_seed,
        "losses": {name: _number(float(term)) for name, term in skipped.terms.items()},
        "images": images,
    }
    (folder / "step.json").write_text(json.dumps(record, indent=1, allow_nan=False))


def _number(value: float) -> Any:
    """Return the number, or its text if it is NaN or infinite, which JSON cannot hold."""
    return value if math.isfinite(value) else str(value)
