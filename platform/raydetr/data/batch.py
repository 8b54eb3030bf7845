"""Collate samples to batches: uint8 images padded to one size, with packed targets, normalized on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from detrs.ops import normalize_images, padding_mask
from detrs.structures import Images, Targets
from raydetr.data.corrupt import CorruptSample
from raydetr.data.transforms.pixels import LazyImage

# Of ImageNet in RGB, in units of 1/255: the normalization that torchvision's backbones were trained with
MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
BLANK_SIDE = 128  # pixels

Canvas = npt.NDArray[np.uint8]  # [b, h, w, 3]


@dataclass(frozen=True)
class Sample:
    """One transformed image with its objects."""

    image: LazyImage
    labels: npt.NDArray[np.int64]  # [t]
    boxes_xyxy: npt.NDArray[np.float64]  # [t, 4] in pixels of `image`
    image_id: int
    original_size: tuple[int, int]  # (height, width) before the transform
    position: int = 0  # G, counted over the run; keys the random draws of training


@dataclass(frozen=True)
class Batch:
    """The images of one rank in one step. Image i owns the next `counts[i]` rows of labels and boxes."""

    pixels: UInt8[Tensor, "b 3 h w"]  # padded with 0 at the right and at the bottom; channels last in memory
    sizes: Int64[Tensor, "b 2"]  # (height, width) of each image without its padding
    labels: Int64[Tensor, " t"]
    boxes: Float32[Tensor, "t 4"]  # cxcywh in [0, 1], relative to `sizes`
    counts: tuple[int, ...]
    image_ids: Int64[Tensor, " b"]
    original_sizes: Int64[Tensor, "b 2"]  # (height, width) before the transform
    position: int  # of the first sample of the global batch, counted over the run
    corrupt: tuple[CorruptSample, ...] = ()  # samples of this batch that were substituted or masked
    positions: tuple[int, ...] = ()  # G of each sample of a training, counted over the run
    is_blank: bool = False  # all samples were masked; holds one black image, which must not be trained on


def collate(
    samples: list[Sample],
    position: int,
    *,
    out: Callable[[tuple[int, int, int, int]], Canvas] | None = None,
) -> Batch:
    """Pad images to the largest height and width and pack their targets.

    Args:
        samples: the images of one rank in one step.
        position: of the first sample of the global batch, counted over the run.
        out: returns an array of the shape (b, h, w, 3) to fill; its content is overwritten. None: a new array.
    """
    sizes = np.array([(sample.image.height, sample.image.width) for sample in samples], np.int64)
    height, width = sizes.max(0).tolist()
    shape = (len(samples), height, width, 3)
    pixels = np.empty(shape, np.uint8) if out is None else out(shape)
    for canvas, sample in zip(pixels, samples, strict=True):
        _fill(canvas, sample.image)
    counts = tuple(len(sample.labels) for sample in samples)
    boxes = np.concatenate([sample.boxes_xyxy for sample in samples])
    boxes /= np.repeat(sizes[:, [1, 0, 1, 0]], counts, axis=0)
    cxcywh = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
    return Batch(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        sizes=torch.from_numpy(sizes),
        labels=torch.from_numpy(np.concatenate([sample.labels for sample in samples])),
        boxes=torch.from_numpy(cxcywh.astype(np.float32)),
        counts=counts,
        image_ids=torch.tensor([sample.image_id for sample in samples]),
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        positions=tuple(sample.position for sample in samples),
        position=position,
    )


def blank_batch(position: int, *, out: Callable[[tuple[int, int, int, int]], Canvas] | None = None) -> Batch:
    """Return a batch of one black image, like `collate`: models and other ranks need a batch in every step."""
    black = LazyImage.unresized(np.zeros((BLANK_SIDE, BLANK_SIDE, 3), np.uint8))
    sample = Sample(black, np.zeros(0, np.int64), np.zeros((0, 4)), -1, (BLANK_SIDE, BLANK_SIDE), position)
    return replace(collate([sample], position, out=out), is_blank=True)


def _fill(canvas: Canvas, image: LazyImage) -> None:
    canvas[: image.height, : image.width] = image.pixels()
    canvas[image.height :] = 0
    canvas[: image.height, image.width :] = 0


def to_model(batch: Batch, device: torch.device | str) -> tuple[Images, Targets]:
    """Move a batch to the device and normalize it there; padding is 0 after the normalization."""
    pixels = batch.pixels.to(device, non_blocking=True)
    sizes = batch.sizes.to(device, non_blocking=True)
    normalized = normalize_images(pixels, sizes, MEAN, STD)
    targets = Targets(batch.labels.to(device), batch.boxes.to(device), batch.counts)
    return Images(normalized, padding_mask(sizes, *pixels.shape[2:])), targets
