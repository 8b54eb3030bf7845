"""What happens in a step with NaN or infinity: every worker skips it, and the guilty batch is kept.

A worker that left a step early would let the others wait forever for its gradient. So nobody leaves: a worker
with a fault goes on with a loss of NaN, and the sum of the gradients, which all workers receive anyway, tells
everyone. No collective is added to a step that is fine.
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
from detrs.matcher import NotFiniteError
from detrs.structures import Outputs, Targets
from raydetr.data.batch import Batch


@dataclass(frozen=True)
class Score:
    """The loss to minimise, all NaN when something was not finite; `error` where the matcher said what."""

    total: Tensor
    terms: dict[str, Tensor]
    error: str | None = None

    def cause(self) -> str | None:
        """What is wrong in this worker's share of the step, as far as the forward pass shows."""
        if self.error is not None or self.total.isfinite():
            return self.error
        bad = [name for name, term in self.terms.items() if not term.isfinite()]
        return f"the loss is not finite ({', '.join(bad) or 'only its sum'})"


@dataclass(frozen=True)
class NonFinite:
    """Why a step was skipped, from the view of one worker."""

    rank: int
    cause: str
    image_ids: tuple[int, ...]

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.cause}; images {', '.join(map(str, self.image_ids))}"


@dataclass(frozen=True)
class SkippedStep:
    """A step that changed nothing. `faults` are the same on every worker, the rest is this worker's share.

    Without faults the gradient has only outgrown float16, which happens when the scaler probes its range.
    """

    step: int  # counted from 1
    random_seed: int  # of this worker's random numbers in the step
    causes: tuple[NonFinite, ...]
    batch: Batch
    terms: Mapping[str, Tensor]

    def folder(self, run: Path, rank: int) -> Path:
        """Where the share of `rank` is kept."""
        return run / "bad-steps" / f"step-{self.step:06d}-rank-{rank}"

    def dump(self, run: Path, rank: int) -> None:
        """Keep this worker's batch, as the model saw it, if the fault is here."""
        for found in self.causes:
            if found.rank == rank:
                _dump(self.folder(run, rank), self, found)

    def describe(self, run: Path) -> str:
        """One sentence a fault, with the folder of its dump."""
        causes = [f"{found} (kept in {self.folder(run, found.rank)})" for found in self.causes]
        return f"step {self.step}: {'. '.join(causes)}"


class BatchNormSnapshot:
    """The running statistics of a model's batch norms, which a forward pass changes for good or ill."""

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._live = [buffer for norm in norms for buffer in norm.buffers()]
        self._kept = [buffer.clone() for buffer in self._live]

    def save(self) -> None:
        """Remember them."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    def restore(self) -> None:
        """Undo what happened since `keep`."""
        if self._live:
            torch._foreach_copy_(self._live, self._kept)


def score(
    criterion: Callable[[Outputs, Targets, Tensor], Losses],
    outputs: Outputs,
    targets: Targets,
    num_boxes: Tensor,
    *,
    is_blank: bool = False,
) -> Score:
    """The criterion's losses; NaN instead of an error, and instead of infinity, so that gradients tell.

    Those of a blank batch are 0, and so is their gradient: a worker without images takes part in the step all
    the same, because the others wait for its gradient.
    """
    try:
        losses = criterion(outputs, targets, num_boxes)
    except NotFiniteError as error:
        return Score(_nan_loss(outputs), {}, str(error))
    # a product and not a branch: the host need not wait for the device
    verdict = torch.where(losses.total.detach().isfinite(), 0.0 if is_blank else 1.0, math.nan)
    terms = {name: term * 0.0 for name, term in losses.terms.items()} if is_blank else losses.terms
    return Score(losses.total * verdict, terms)


def _nan_loss(outputs: Outputs) -> Tensor:
    """NaN, as a function of everything that the losses may be functions of."""
    parts = [outputs.predictions]
    if outputs.first_stage is not None:
        parts.append(outputs.first_stage.predictions)
    if outputs.denoised is not None:
        parts.append(outputs.denoised.predictions)
    sums = [x.float().sum() for part in parts for x in (part.logits, part.boxes)]
    return torch.stack(sums).sum() * math.nan


def _dump(folder: Path, skipped: SkippedStep, found: NonFinite) -> None:
    folder.mkdir(parents=True, exist_ok=True)
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
        "rank": found.rank,
        "cause": found.cause,
        "position": batch.position,
        "random_seed": skipped.random_seed,
        "losses": {name: _number(float(term)) for name, term in skipped.terms.items()},
        "images": images,
    }
    (folder / "step.json").write_text(json.dumps(record, indent=1))


def _number(value: float) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    return value if math.isfinite(value) else str(value)
