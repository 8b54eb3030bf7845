"""The losses of single images add up to that of the batch."""

from __future__ import annotations

import pytest
import torch

from detrs import zoo
from detrs.structures import Outputs, Predictions, Targets
from raydetr import recipes
from raydetr.config import override
from raydetr.evaluation.image_losses import image_losses


@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0), (1,)])
def test_the_losses_of_images_add_up_to_that_of_the_batch(counts: tuple[int, ...]) -> None:
    config = override(recipes.quickstart(), {"model.num_classes": 4}).model
    criterion = zoo.build(config).criterion
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, len(counts), 20, 4, generator=generator)
    boxes = torch.rand(2, len(counts), 20, 4, generator=generator).mul(0.4).add(0.1)
    num_boxes = sum(counts)
    targets = Targets(
        torch.randint(0, 4, (num_boxes,), generator=generator),
        torch.rand(num_boxes, 4, generator=generator).mul(0.4).add(0.1),
        counts,
    )
    outputs = Outputs(Predictions(logits, boxes))
    found = image_losses(criterion, outputs, targets)
    assert len(found) == len(counts)
    last = Outputs(Predictions(logits[-1:], boxes[-1:]))
    together = criterion(last, targets, 1.0).total.item()  # sums, not divided by the number of boxes
    assert sum(loss * max(count, 1) for loss, count in zip(found, counts, strict=True)) == pytest.approx(
        together
    )
    # An image's loss does not depend on the other images
    if counts == (3, 0, 2):
        first = Outputs(Predictions(logits[:, :1], boxes[:, :1]))
        alone = Targets(targets.labels[:3], targets.boxes[:3], (3,))
        assert image_losses(criterion, first, alone) == pytest.approx(found[:1])
