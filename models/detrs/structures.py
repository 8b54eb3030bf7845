"""The values that travel between the parts of a detector. All frozen; shapes are in the types.

Boxes are cxcywh in [0, 1], relative to the image without its padding, unless a name ends in `_xyxy`.
`padding` is True where padded, `blocked` is True where not attended; the batch always comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """A batch of normalised images, padded at the right and at the bottom to one size."""

    pixels: Float[Tensor, "b 3 h w"]
    padding: Bool[Tensor, "b h w"]


@dataclass(frozen=True)
class Targets:
    """The objects of a batch, packed: image i owns the next `counts[i]` rows."""

    labels: Int64[Tensor, " t"]
    boxes: Float[Tensor, "t 4"]
    counts: tuple[int, ...]

    def places(self) -> tuple[Int64[Tensor, " t"], Int64[Tensor, " t"]]:
        """The image of each row, and the row's number within it; made on the device, without a transfer."""
        device = self.labels.device
        empty = [torch.zeros(0, dtype=torch.int64, device=device)]
        image = [torch.full((count,), i, device=device) for i, count in enumerate(self.counts)]
        place = [torch.arange(count, device=device) for count in self.counts]
        return torch.cat(empty + image), torch.cat(empty + place)


@dataclass(frozen=True)
class Memory:
    """What the decoder looks at: the tokens of all feature levels, flattened and concatenated."""

    tokens: Float[Tensor, "b s d"]
    pos: Float[Tensor, "b s d"]
    padding: Bool[Tensor, "b s"]
    shapes: tuple[tuple[int, int], ...]  # (height, width) of each level
    valid_ratios: Float[Tensor, "b l 2"]  # share of each level's (width, height) that is not padding


@dataclass(frozen=True)
class Queries:
    """What the decoder starts from. `reference` is a point (cx, cy) or a box (cx, cy, w, h) in [0, 1]."""

    content: Float[Tensor, "b q d"]
    pos: Float[Tensor, "b q d"] | None = None
    reference: Float[Tensor, "b q k"] | None = None
    blocked: Bool[Tensor, "q q"] | None = None


@dataclass(frozen=True)
class Predictions:
    """Class logits and boxes of `n` prediction layers (decoder layers in order, the final one last)."""

    logits: Float[Tensor, "n b q c"]
    boxes: Float[Tensor, "n b q 4"]


@dataclass(frozen=True)
class Detections:
    """The detections of one image, best first. `boxes_xyxy` in pixels of the original image."""

    scores: Float[Tensor, " k"]
    labels: Int64[Tensor, " k"]
    boxes_xyxy: Float[Tensor, "k 4"]


@dataclass(frozen=True)
class FirstStage:
    """What the encoder predicted, as one layer; `proposals` are its boxes before regression."""

    predictions: Predictions
    proposals: Float[Tensor, "b q 4"]


@dataclass(frozen=True)
class Denoised:
    """Predictions of denoising queries: `num_groups` groups of `block` positives and `block` negatives."""

    predictions: Predictions
    num_groups: int
    block: int


@dataclass(frozen=True)
class Outputs:
    """Everything a detector predicts for a batch."""

    predictions: Predictions
    first_stage: FirstStage | None = None
    denoised: Denoised | None = None
