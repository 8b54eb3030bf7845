"""Convert boxes and measure their overlap. Boxes are cxcywh unless a name ends in `_xyxy`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def to_xyxy(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Convert (cx, cy, w, h) to (x1, y1, x2, y2)."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((center - half, center + half), dim=-1)


def to_cxcywh(boxes_xyxy: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Convert (x1, y1, x2, y2) to (cx, cy, w, h)."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def iou_and_giou(
    first: Float[Tensor, "*n 4"], second: Float[Tensor, "*m 4"], eps: float = 0.0
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Return intersection over union and its generalized form, elementwise with broadcasting.

    `eps` is added to both denominators. The official code of DAB-DETR and DINO uses 1e-6, that of the other papers 0.
    Source: Rezatofighi et al. 2019, "Generalized Intersection over Union", algorithm 1.
    """
    a, b = to_xyxy(first), to_xyxy(second)
    intersection = _area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    hull = _area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - intersection
    iou = intersection / (union + eps)
    return iou, iou - (hull - union) / (hull + eps)


def _area(low: Float[Tensor, "*n 2"], high: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n"]:
    sides = (high - low).clamp(min=0)
    return sides[..., 0] * sides[..., 1]
