"""The losses of the images of a batch are those of each image alone, one after the other."""

from __future__ import annotations

import pytest
import torch

from detrs.criterion import Criterion, LossConfig
from detrs.structures import Outputs, Predictions, Targets

CRITERIA = {
    "focal": Criterion(LossConfig("focal"), giou_eps=1e-6),
    "focal, other settings": Criterion(
        LossConfig("focal", alpha=0.6, gamma=1.5), giou_eps=0.0, cost_alpha=0.3
    ),
    "with denoising": Criterion(LossConfig("focal"), giou_eps=1e-6, denoising=True, first_stage="interm"),
    "mal": Criterion(LossConfig("mal", gamma=1.5), giou_eps=1e-6),
    "cross entropy": Criterion(LossConfig("cross_entropy"), giou_eps=0.0),
    "weights": Criterion(
        LossConfig("cross_entropy", class_weight=3.0, box_weight=0.7, giou_weight=1.3, no_object_weight=0.3),
        giou_eps=0.0,
    ),
}


def losses_one_by_one(criterion: Criterion, outputs: Outputs, targets: Targets) -> list[float]:
    """Compute the total of the last layer for batches of one image."""
    logits, boxes = outputs.predictions.logits[-1:], outputs.predictions.boxes[-1:]
    labels = torch.split(targets.labels, list(targets.counts))
    target_boxes = torch.split(targets.boxes, list(targets.counts))
    losses = []
    for index, count in enumerate(targets.counts):
        one = Outputs(Predictions(logits[:, index : index + 1], boxes[:, index : index + 1]))
        alone = Targets(labels[index], target_boxes[index], (count,))
        losses.append(criterion(one, alone, float(max(count, 1))).total.item())
    return losses


def made(
    counts: tuple[int, ...], num_queries: int, dtype: torch.dtype = torch.float64
) -> tuple[Outputs, Targets]:
    generator = torch.Generator().manual_seed(0)
    num_boxes = sum(counts)

    def boxes(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, 4, generator=generator, dtype=torch.float64).mul(0.4).add(0.1).to(dtype)

    logits = torch.randn(2, len(counts), num_queries, 5, generator=generator, dtype=torch.float64)
    outputs = Outputs(Predictions(logits.mul(2).to(dtype), boxes(2, len(counts), num_queries)))
    labels = torch.randint(0, 4, (num_boxes,), generator=generator)
    return outputs, Targets(labels, boxes(num_boxes), counts)


@pytest.mark.parametrize("counts", [(3, 0, 2, 7, 1), (0, 0), (1,), (25, 2)])
@pytest.mark.parametrize("name", list(CRITERIA))
def test_the_losses_are_those_of_each_image_alone(name: str, counts: tuple[int, ...]) -> None:
    """With images without objects, and with more objects than queries."""
    criterion = CRITERIA[name]
    outputs, targets = made(counts, num_queries=20)
    found = criterion.by_image(outputs, targets)
    expected = torch.tensor(losses_one_by_one(criterion, outputs, targets), dtype=torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found > 0).all()


def test_half_precision_is_converted_first() -> None:
    criterion = CRITERIA["focal"]
    outputs, targets = made((3, 0, 2), 20, torch.bfloat16)
    targets = Targets(targets.labels, targets.boxes.float(), targets.counts)
    found = criterion.by_image(outputs, targets)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(losses_one_by_one(criterion, outputs, targets), rel=1e-5)
