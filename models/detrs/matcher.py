"""Assign targets to queries one to one (DETR, section 3.1).

The costs of all prediction layers are one tensor of the pairs that can match: each target with the queries of its own
image. There is one transfer to the host, and one back with the assignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detrs.boxes import to_xyxy
from detrs.structures import Predictions, Targets


class NonFiniteError(ValueError):
    """Predictions or targets hold NaN or infinity; the message names the layer and the image."""


@dataclass(frozen=True)
class Costs:
    """Weights of the matching cost, and details that differ between the papers."""

    kind: Literal["focal", "softmax"]
    class_weight: float
    box_weight: float
    giou_weight: float
    giou_eps: float
    alpha: float = 0.25
    gamma: float = 2.0


@dataclass(frozen=True)
class Matches:
    """Matched pairs of every layer: query `queries[n, j]` with packed target `targets[n, j]`."""

    queries: Int64[Tensor, "n m"]
    targets: Int64[Tensor, "n m"]


def match(
    groups: Sequence[tuple[Predictions, Int64[Tensor, " t"]]], targets: Targets, costs: Costs
) -> list[Matches]:
    """Match each layer of each group of predictions separately.

    Args:
        groups: predictions, with the labels to use for the targets. The number of queries may differ between groups.
        targets: if an image has more targets than queries, every query is matched, and some targets are not.
        costs: weights and details of the cost.

    Raises:
        NonFiniteError: predictions or target boxes are not finite; the message names the layer and the image.
    """
    image_of, _ = targets.indices()
    parts = [pair_costs(predictions, labels, targets, image_of, costs) for predictions, labels in groups]
    finite = [_finite(predictions) for predictions, _ in groups]
    host = torch.cat([x.flatten() for x in (*parts, *finite)]).cpu().numpy()
    if not np.isfinite(host).all():
        _raise_not_finite(host[sum(part.numel() for part in parts) :], groups, targets)
    pairs, start = [], 0
    for part in parts:
        pairs.append(_assign(host[start : start + part.numel()].reshape(part.shape), targets.counts))
        start += part.numel()
    packed = torch.from_numpy(np.concatenate([x.reshape(2, -1) for x in pairs], axis=1))
    packed = packed.to(targets.labels.device)
    columns = torch.split(packed, [x[0].size for x in pairs], dim=1)
    return [Matches(*column.reshape(x.shape).unbind(0)) for column, x in zip(columns, pairs, strict=True)]


@torch.no_grad()
def pair_costs(
    predictions: Predictions,
    labels: Int64[Tensor, " t"],
    targets: Targets,
    image_of: Int64[Tensor, " t"],
    costs: Costs,
) -> Float[Tensor, "n t q"]:
    """Return the cost of each target with each query of its image, without gradients."""
    l1 = _l1(predictions.boxes, targets.boxes, image_of)
    giou = _giou(predictions.boxes, targets.boxes, image_of, costs.giou_eps)
    if costs.kind == "softmax":
        class_cost = -predictions.logits.softmax(-1).transpose(2, 3)[:, image_of, labels]
    else:
        class_cost = _focal_cost(predictions.logits.transpose(2, 3)[:, image_of, labels], costs)
    total = l1.mul_(costs.box_weight).add_(class_cost, alpha=costs.class_weight)
    return total.add_(giou, alpha=-costs.giou_weight)


def _l1(
    boxes: Float[Tensor, "n b q 4"], target_boxes: Float[Tensor, "t 4"], image_of: Int64[Tensor, " t"]
) -> Float[Tensor, "n t q"]:
    # Coordinate by coordinate: contiguous planes are several times faster than rows of four
    pairs = zip(boxes.unbind(-1), target_boxes.unbind(-1), strict=True)
    planes = [(plane[:, image_of] - value[:, None]).abs_() for plane, value in pairs]
    return planes[0].add_(planes[1]).add_(planes[2]).add_(planes[3])


def _giou(
    boxes: Float[Tensor, "n b q 4"],
    target_boxes: Float[Tensor, "t 4"],
    image_of: Int64[Tensor, " t"],
    eps: float,
) -> Float[Tensor, "n t q"]:
    """Compute GIoU as `detrs.boxes.iou_and_giou` for all pairs, in planes and in place; sizes must not be negative."""
    x1, y1, x2, y2 = (plane[:, image_of] for plane in to_xyxy(boxes).unbind(-1))
    target_x1, target_y1, target_x2, target_y2 = (c[:, None] for c in to_xyxy(target_boxes).unbind(-1))
    overlap = (torch.minimum(x2, target_x2) - torch.maximum(x1, target_x1)).clamp_(min=0)
    overlap *= (torch.minimum(y2, target_y2) - torch.maximum(y1, target_y1)).clamp_(min=0)
    union = (boxes[..., 2] * boxes[..., 3])[:, image_of] + (target_boxes[:, 2] * target_boxes[:, 3])[:, None]
    union -= overlap
    hull = torch.maximum(x2, target_x2) - torch.minimum(x1, target_x1)
    hull *= torch.maximum(y2, target_y2) - torch.minimum(y1, target_y1)
    return overlap.div_(union + eps).sub_(hull.sub(union).div_(hull.add_(eps)))


def _focal_cost(logits: Float[Tensor, "n t q"], costs: Costs) -> Float[Tensor, "n t q"]:
    # 1 - score is computed from the logit: near a score of 1, the difference has too few digits in float32
    score, rest = logits.sigmoid(), (-logits).sigmoid()
    negative = (rest + 1e-8).log_().mul_(score**costs.gamma).mul_(costs.alpha - 1)
    positive = (score + 1e-8).log_().mul_(rest**costs.gamma).mul_(-costs.alpha)
    return positive.sub_(negative)


def _finite(predictions: Predictions) -> Float[Tensor, "n b"]:
    # A sum is not finite if one of its terms is not: one number per layer and image is copied to the host
    return predictions.logits.detach().sum((2, 3)) + predictions.boxes.detach().sum((2, 3))


def _assign(costs: npt.NDArray[np.floating], counts: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Return [2, n, m]: queries and packed targets of the matched pairs, in the order of the images."""
    num_layers, _, num_queries = costs.shape
    num_pairs = sum(min(count, num_queries) for count in counts)
    pairs = np.zeros((2, num_layers, num_pairs), dtype=np.int64)
    for layer in range(num_layers):
        start = column = 0
        for count in counts:
            rows, columns = linear_sum_assignment(costs[layer, start : start + count])
            stop = column + len(rows)
            pairs[0, layer, column:stop], pairs[1, layer, column:stop] = columns, rows + start
            start, column = start + count, stop
    return pairs


def _raise_not_finite(
    sums: npt.NDArray[np.floating],
    groups: Sequence[tuple[Predictions, Int64[Tensor, " t"]]],
    targets: Targets,
) -> NoReturn:
    # Targets first: with denoising, their NaN are in the predictions too
    for row, image in enumerate(targets.indices()[0].tolist()):
        if not targets.boxes[row].isfinite().all():
            raise NonFiniteError(
                f"a target box of image {image} of the batch is not finite; check the annotations"
            )
    start = 0
    for number, (predictions, _) in enumerate(groups):
        shape = predictions.logits.shape[:2]
        bad = np.argwhere(~np.isfinite(sums[start : start + shape.numel()].reshape(shape)))
        start += shape.numel()
        if len(bad):
            layer, image = (int(x) for x in bad[0])
            name = f"decoder layer {layer}" if number == 0 else "the encoder"
            raise NonFiniteError(
                f"the predictions of {name} for image {image} of the batch are not finite; "
                "lower the learning rate, or check this batch"
            )
    raise NonFiniteError("a matching cost is not finite: a predicted and a target box both have no area")
