"""Baseline of the stream's benchmark: a Pillow float pipeline that works like the official DETR code.

Decode, targets as a dictionary of tensors, flip, crop, resize, float32 in [0, 1], normalize, boxes relative to the
image, and one padded batch with its mask. The drawn parameters are ours, so that both sides do the same work.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raydetr.data.transforms.geometry import Crop, resized_size
from raydetr.data.transforms.transform import Transform, TransformParams
from raydetr.shards.validation import RawSample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Target = dict[str, Tensor]


def float_batch(
    raws: list[RawSample], transform: Transform, position: int
) -> tuple[Tensor, Tensor, list[Target]]:
    """Return pixels [b, 3, h, w], their padding mask [b, h, w], and a target per image."""
    images, targets = [], []
    for slot, raw in enumerate(raws):
        image = Image.open(io.BytesIO(raw.image)).convert("RGB")
        target = _target(image, raw.record["id"], raw.annotations)
        image, target = _augment(
            image, target, transform.draw(0, position + slot, image.size), transform.config.max_side
        )
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        images.append(_normalize(pixels))
        targets.append(_relative(target, image))
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for pixels, canvas, mask in zip(images, batch, padding, strict=True):
        canvas[:, : pixels.shape[1], : pixels.shape[2]].copy_(pixels)
        mask[: pixels.shape[1], : pixels.shape[2]] = False
    return batch, padding, targets


def _target(image: Image.Image, image_id: int, annotations: list[dict[str, Any]]) -> Target:
    objects = [a for a in annotations if not a.get("iscrowd")]
    boxes = torch.as_tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2].clamp_(min=0, max=image.width)
    boxes[:, 1::2].clamp_(min=0, max=image.height)
    keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
    return {
        "boxes": boxes[keep],
        "labels": torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)[keep],
        "area": torch.tensor([a["area"] for a in objects])[keep],
        "iscrowd": torch.tensor([a["iscrowd"] for a in objects])[keep],
        "image_id": torch.tensor([image_id]),
        "orig_size": torch.as_tensor([image.height, image.width]),
        "size": torch.as_tensor([image.height, image.width]),
    }


def _augment(
    image: Image.Image, target: Target, params: TransformParams, max_side: int
) -> tuple[Image.Image, Target]:
    if params.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = target["boxes"][:, [2, 1, 0, 3]] * torch.as_tensor([-1, 1, -1, 1])
        target = {**target, "boxes": boxes + torch.as_tensor([image.width, 0, image.width, 0])}
    if params.crop is not None:
        assert params.crop.short_side is not None
        image, target = _resize(image, target, params.crop.short_side, None)
        image, target = _crop(image, target, params.crop)
    assert params.short_side is not None
    return _resize(image, target, params.short_side, max_side)


def _resize(
    image: Image.Image, target: Target, short_side: int, max_side: int | None
) -> tuple[Image.Image, Target]:
    size = resized_size(*image.size, short_side, max_side)
    x, y = (after / before for after, before in zip(size, image.size, strict=True))
    target = {
        **target,
        "boxes": target["boxes"] * torch.as_tensor([x, y, x, y]),
        "area": target["area"] * (x * y),
        "size": torch.tensor(size[::-1]),
    }
    return image.resize(size, Image.Resampling.BILINEAR), target


def _crop(image: Image.Image, target: Target, crop: Crop) -> tuple[Image.Image, Target]:
    cut = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    shifted = target["boxes"] - torch.as_tensor([crop.left, crop.top, crop.left, crop.top])
    corners = torch.min(shifted.reshape(-1, 2, 2), torch.as_tensor([crop.width, crop.height])).clamp(min=0)
    keep = torch.all(corners[:, 1] > corners[:, 0], dim=1)
    area = (corners[:, 1] - corners[:, 0]).prod(dim=1)
    target = {**target, "boxes": corners.reshape(-1, 4), "area": area, "size": torch.tensor(cut.size[::-1])}
    for field in ("boxes", "labels", "area", "iscrowd"):
        target[field] = target[field][keep]
    return cut, target


def _normalize(pixels: Tensor) -> Tensor:
    """Normalize a copy, like torchvision's `normalize`."""
    mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return pixels.clone().sub_(mean).div_(std)


def _relative(target: Target, image: Image.Image) -> Target:
    left, top, right, bottom = target["boxes"].unbind(-1)
    boxes = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], dim=-1)
    size = torch.tensor([image.width, image.height, image.width, image.height], dtype=torch.float32)
    return {**target, "boxes": boxes / size}
