"""Define the values that the parts of a detector exchange. All are frozen; shapes are in the types.

Boxes are cxcywh in [0, 1], relative to the image without its padding, unless a name ends in `_xyxy`. The batch is the
first dimension. Masks follow `torch.nn.MultiheadAttention`: True masks. `padding_mask` and `key_padding_mask` are True
where padded, `attn_mask[i, j]` is True where query i must not attend to query j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """A batch of normalized images, padded on the right and at the bottom to a common size."""

    pixels: Float[Tensor, "b 3 h w"]
    padding_mask: Bool[Tensor, "b h w"]  # True where padded

    def padded(self, height: int, width: int) -> Images:
        """Return the batch padded further, to at least this size in pixels."""
        right, bottom = max(0, width - self.pixels.shape[3]), max(0, height - self.pixels.shape[2])
        if not right and not bottom:
            return self
        amount = (0, right, 0, bottom)
        return Images(F.pad(self.pixels, amount), F.pad(self.padding_mask, amount, value=True))


@dataclass(frozen=True)
class Targets:
    """The objects of a batch, packed: the rows of image 0 come first, `counts[0]` of them, then those of image 1."""

    labels: Int64[Tensor, " t"]
    boxes: Float[Tensor, "t 4"]
    counts: tuple[int, ...]

    def indices(self) -> tuple[Int64[Tensor, " t"], Int64[Tensor, " t"]]:
        """Return the image of each row, and the row's index within that image."""
        # Built on the device from Python numbers: a copy from the host would wait for the device
        device = self.labels.device
        empty = [torch.zeros(0, dtype=torch.int64, device=device)]
        image = [torch.full((count,), i, device=device) for i, count in enumerate(self.counts)]
        index = [torch.arange(count, device=device) for count in self.counts]
        return torch.cat(empty + image), torch.cat(empty + index)


@dataclass(frozen=True)
class Memory:
    """The tokens of all feature levels, flattened and concatenated: what the decoder attends to."""

    tokens: Float[Tensor, "b s d"]
    pos: Float[Tensor, "b s d"]
    key_padding_mask: Bool[Tensor, "b s"]  # True where padded
    shapes: tuple[tuple[int, int], ...]  # (height, width) of each level
    valid_ratios: Float[Tensor, "b l 2"]  # fraction of each level's (width, height) that is not padding


@dataclass(frozen=True)
class Queries:
    """The input of the decoder. `reference` is a point (cx, cy) or a box (cx, cy, w, h) in [0, 1]."""

    content: Float[Tensor, "b q d"]
    pos: Float[Tensor, "b q d"] | None = None
    reference: Float[Tensor, "b q k"] | None = None
    attn_mask: Bool[Tensor, "q q"] | None = None  # True where query i must not attend to query j


@dataclass(frozen=True)
class Predictions:
    """Class logits and boxes of `n` prediction layers (decoder layers in order, the final one last)."""

    logits: Float[Tensor, "n b q c"]
    boxes: Float[Tensor, "n b q 4"]


@dataclass(frozen=True)
class Detections:
    """The detections of one image, best first. `boxes_xyxy` are in pixels of the original image."""

    scores: Float[Tensor, " k"]
    labels: Int64[Tensor, " k"]
    boxes_xyxy: Float[Tensor, "k 4"]
    queries: Int64[
        Tensor, " k"
    ]  # that the detections come from; with sigmoid scores, a query can have several classes


@dataclass(frozen=True)
class FirstStage:
    """The predictions of the encoder, as one layer; `proposals` are its boxes before regression."""

    predictions: Predictions
    proposals: Float[Tensor, "b q 4"]


@dataclass(frozen=True)
class Denoised:
    """Predictions of the denoising queries; see `detrs.denoising.NoisedQueries`."""

    predictions: Predictions
    num_groups: int
    group_size: int  # queries; the positives come first, in the order of an image's targets


@dataclass(frozen=True)
class Outputs:
    """All predictions of a detector for a batch."""

    predictions: Predictions
    first_stage: FirstStage | None = None
    denoised: Denoised | None = None
