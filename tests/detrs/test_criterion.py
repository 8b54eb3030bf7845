"""Test the class losses against plain definitions, and the complete criterion."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detrs.criterion import Criterion, LossConfig, Matched, cross_entropy, focal_loss, mal_loss
from detrs.structures import Outputs, Predictions, Targets

SHAPE = (2, 3, 5, 4)  # layers, images, queries, classes
MATCHED = Matched(
    layer=torch.tensor([[0, 0, 0], [1, 1, 1]]),
    image=torch.tensor([[0, 0, 2], [0, 0, 2]]),
    query=torch.tensor([[1, 3, 0], [4, 0, 2]]),
    target=torch.tensor([[0, 1, 2], [1, 0, 2]]),
    label=torch.tensor([[2, 0, 3], [0, 2, 3]]),
)


def random_logits(scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def one_hot(values: Tensor | float = 1.0) -> Tensor:
    full = torch.zeros(SHAPE, dtype=torch.float64)
    full[MATCHED.layer, MATCHED.image, MATCHED.query, MATCHED.label] = values
    return full


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_focal_loss_is_its_definition(scale: float, gamma: float) -> None:
    logits = random_logits(scale).requires_grad_()
    target = one_hot()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    missed = torch.where(target == 1, (-logits).sigmoid(), logits.sigmoid())
    plain = (torch.where(target == 1, 0.25, 0.75).double() * entropy * missed**gamma).sum((1, 2, 3))
    ours = focal_loss(logits, MATCHED, 0.25, gamma)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    expected, found = (torch.autograd.grad(x[0] + 3 * x[1], logits)[0] for x in (plain, ours))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_focal_gradient_by_differences() -> None:
    logits = random_logits(2.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, MATCHED, 0.25, 2.0), (logits,))


def test_mal_loss_is_its_definition() -> None:
    logits, iou = random_logits(2.0), torch.tensor([[0.3, 0.9, 0.0], [1.0, 0.5, 0.7]], dtype=torch.float64)
    scores, quality, matched = logits.sigmoid().numpy(), one_hot(iou**1.5).numpy(), one_hot().numpy()
    expected = -np.where(
        matched == 1,
        quality * np.log(scores) + (1 - quality) * np.log(1 - scores),
        scores**1.5 * np.log(1 - scores),
    ).sum((1, 2, 3))
    torch.testing.assert_close(mal_loss(logits, MATCHED, iou, 1.5), torch.from_numpy(expected))


def test_cross_entropy_is_torchs() -> None:
    logits = random_logits(2.0)
    labels = torch.full(SHAPE[:3], 3)
    matched = dataclasses.replace(MATCHED, label=torch.tensor([[2, 0, 1], [0, 2, 1]]))
    labels[matched.layer, matched.image, matched.query] = matched.label
    weight = torch.tensor([1, 1, 1, 0.1], dtype=torch.float64)
    expected = [F.cross_entropy(logits[i].flatten(0, 1), labels[i].flatten(), weight) for i in range(2)]
    torch.testing.assert_close(cross_entropy(logits, matched, 0.1), torch.stack(expected))


def synthetic(counts: tuple[int, ...], num_classes: int = 4) -> tuple[Outputs, Targets]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, len(counts), 6, num_classes, generator=generator)
    boxes = 0.2 + 0.3 * torch.rand(2, len(counts), 6, 4, generator=generator)
    target_boxes = 0.2 + 0.3 * torch.rand(sum(counts), 4, generator=generator)
    labels = torch.randint(0, num_classes, (sum(counts),), generator=generator)
    return Outputs(Predictions(logits, boxes)), Targets(labels, target_boxes, counts)


@pytest.mark.parametrize("kind", ["focal", "mal"])
def test_a_batch_is_the_sum_of_its_images(kind: str) -> None:
    """Data-parallel training relies on this, with a common normalizer."""
    outputs, targets = synthetic((2, 0, 3))
    criterion = Criterion(LossConfig(kind), giou_eps=1e-6)
    parts = []
    for i, start in enumerate((0, 2, 2)):
        count = targets.counts[i]
        rows = slice(start, start + count)
        alone = Predictions(outputs.predictions.logits[:, i : i + 1], outputs.predictions.boxes[:, i : i + 1])
        one = Targets(targets.labels[rows], targets.boxes[rows], (count,))
        parts.append(criterion(Outputs(alone), one, 5.0).total)
    total = criterion(outputs, targets, torch.tensor(5.0)).total
    torch.testing.assert_close(torch.stack(parts).sum(), total)


def test_without_aux_loss_only_the_last_layer_counts() -> None:
    outputs, targets = synthetic((2, 1))
    last = Criterion(LossConfig(), giou_eps=0.0, aux_loss=False)(outputs, targets, 3.0)
    both = Criterion(LossConfig(), giou_eps=0.0)(outputs, targets, 3.0)
    assert {name for name in both.terms if name.endswith("_0")}
    assert not {name for name in last.terms if name.endswith("_0")}
    assert all(torch.equal(value, both.terms[name]) for name, value in last.terms.items())
    assert last.total < both.total


def test_one_class() -> None:
    outputs, targets = synthetic((2, 1), num_classes=1)
    losses = Criterion(LossConfig(), giou_eps=0.0)(outputs, targets, 3.0)
    assert losses.total.isfinite()
    assert losses.terms["class_error"] == 0
