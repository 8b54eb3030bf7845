"""One-to-one assignment of targets to queries (DETR, section 3.1).

The costs of all prediction layers are computed as one tensor that holds only the pairs that can match: a
target with the queries of its own image. It goes to the host once, the assignment comes back once.
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

from detrs.boxes import iou_and_giou
from detrs.structures import Predictions, Targets


@dataclass(frozen=True)
class Costs:
    """Weights of the matching cost and the details that differ between the papers."""

    kind: Literal["focal", "softmax"]
    class_weight: float
    box_weight: float
    giou_weight: float
    giou_eps: float
    alpha: float = 0.25
    gamma: float = 2.0


@dataclass(frozen=True)
class Matches:
    """The matched pairs of every layer: query `queries[n, j]` with packed target `targets[n, j]`."""

    queries: Int64[Tensor, "n m"]
    targets: Int64[Tensor, "n m"]


def match(
    groups: Sequence[tuple[Predictions, Int64[Tensor, " t"]]], targets: Targets, costs: Costs
) -> list[Matches]:
    """Match each layer of each group of predictions on its own.

    Args:
        groups: predictions (groups may differ in number of queries) with the labels to use for the targets.
        targets: where an image has more targets than queries, only as many as queries are matched.
        costs: the weights.

    Raises:
        ValueError: predictions or target boxes are not finite; names layer and image.
    """
    image_of = image_index(targets)
    with torch.no_grad():
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


def image_index(targets: Targets) -> Int64[Tensor, " t"]:
    """The image of each packed target."""
    images = [i for i, count in enumerate(targets.counts) for _ in range(count)]
    return torch.tensor(images, dtype=torch.int64).to(targets.labels.device)


def pair_costs(
    predictions: Predictions,
    labels: Int64[Tensor, " t"],
    targets: Targets,
    image_of: Int64[Tensor, " t"],
    costs: Costs,
) -> Float[Tensor, "n t q"]:
    """Cost of each target with each query of its image."""
    boxes = predictions.boxes[:, image_of]
    wanted = targets.boxes[:, None]
    l1 = (boxes - wanted).abs().sum(-1)
    _, giou = iou_and_giou(boxes, wanted, costs.giou_eps)
    if costs.kind == "softmax":
        logits = predictions.logits.softmax(-1)[:, image_of, :, labels].transpose(0, 1)
        class_cost = -logits
    else:
        class_cost = _focal_cost(predictions.logits[:, image_of, :, labels].transpose(0, 1), costs)
    return costs.box_weight * l1 + costs.class_weight * class_cost - costs.giou_weight * giou


def _focal_cost(logits: Float[Tensor, "n t q"], costs: Costs) -> Float[Tensor, "n t q"]:
    # 1 - score from the logit itself: in float32 the difference has too few digits near a score of 1
    score, rest = logits.sigmoid(), (-logits).sigmoid()
    negative = (1 - costs.alpha) * score**costs.gamma * -(rest + 1e-8).log()
    positive = costs.alpha * rest**costs.gamma * -(score + 1e-8).log()
    return positive - negative


def _finite(predictions: Predictions) -> Float[Tensor, "n b"]:
    # a sum is not finite when one of its terms is not: one number for each layer and image
    return predictions.logits.sum((2, 3)) + predictions.boxes.sum((2, 3))


def _assign(costs: npt.NDArray[np.floating], counts: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """[2, n, m]: queries and packed targets of the matched pairs, images in order."""
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
    start = 0
    for number, (predictions, _) in enumerate(groups):
        shape = predictions.logits.shape[:2]
        bad = np.argwhere(~np.isfinite(sums[start : start + shape.numel()].reshape(shape)))
        start += shape.numel()
        if len(bad):
            layer, image = (int(x) for x in bad[0])
            name = f"decoder layer {layer}" if number == 0 else "the encoder"
            raise ValueError(
                f"the predictions of {name} for image {image} of the batch are not finite; "
                "lower the learning rate, or look at this batch"
            )
    for row, image in enumerate(image_index(targets).tolist()):
        if not targets.boxes[row].isfinite().all():
            raise ValueError(
                f"a target box of image {image} of the batch is not finite; check the annotations"
            )
    raise ValueError("a matching cost is not finite: a predicted and a target box both have no area")
