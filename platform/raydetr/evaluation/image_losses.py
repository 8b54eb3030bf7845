"""Compute the loss of each image of a batch, to find those that a model does worst on."""

from __future__ import annotations

import torch

from detrs.criterion import Criterion
from detrs.structures import Outputs, Predictions, Targets


def image_losses(criterion: Criterion, outputs: Outputs, targets: Targets) -> list[float]:
    """Return the loss of the last decoder layer for each image alone, divided by the number of its objects, or by 1.

    Args:
        criterion: of the model.
        outputs: for b images.
        targets: of the same images.

    Raises:
        NonFiniteError: predictions are not finite.
    """
    logits, boxes = outputs.predictions.logits[-1:], outputs.predictions.boxes[-1:]
    labels = torch.split(targets.labels, list(targets.counts))
    target_boxes = torch.split(targets.boxes, list(targets.counts))
    losses = []
    for index, count in enumerate(targets.counts):
        one = Outputs(Predictions(logits[:, index : index + 1], boxes[:, index : index + 1]))
        alone = Targets(labels[index], target_boxes[index], (count,))
        losses.append(criterion(one, alone, float(max(count, 1))).total.item())
    return losses
