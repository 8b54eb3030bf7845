"""Test mixed precision: large products in half precision, boxes and losses in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import small_models
from detrs.query_position import QueryPosition
from detrs.structures import Outputs, Predictions, Queries
from detrs.zoo import build

NAMES = list(small_models.CONFIGS)
HALVES = [torch.bfloat16, torch.float16]


def tensors_of(outputs: Outputs) -> Iterator[tuple[str, Tensor]]:
    """Yield all boxes of the outputs of a detector."""
    yield "boxes", outputs.predictions.boxes
    if outputs.first_stage is not None:
        yield "first stage", outputs.first_stage.predictions.boxes
        yield "proposals", outputs.first_stage.proposals
    if outputs.denoised is not None:
        yield "denoised", outputs.denoised.predictions.boxes


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_losses_are_near_those_of_float32(name: str, half: torch.dtype) -> None:
    """A rounding error is at most u = 2^-8 (bf16) or 2^-11 (fp16) of a value. Errors of both signs average out over
    the many boxes of a loss: it is off by less than 2u (measured: a quarter of u). If queries are the best tokens of
    the encoder, rounding also changes the choice while all scores are still similar, and other queries are matched:
    an error of some percent in any precision.
    """
    torch.manual_seed(0)
    model = build(small_models.CONFIGS[name])
    model.detector.train()
    images, targets = small_models.batch((2, 3))
    results = []
    for enabled in (False, True):
        torch.manual_seed(7)  # for denoising
        with torch.autocast("cpu", half, enabled=enabled):
            outputs = model.detector(images, targets)
        losses = model.criterion(outputs, targets, 5.0)
        results.append((outputs, losses))
    (exact_outputs, exact), (outputs, losses) = results
    assert outputs.predictions.logits.dtype == half
    for (what, boxes), (_, exact_boxes) in zip(tensors_of(outputs), tensors_of(exact_outputs), strict=True):
        assert boxes.dtype == exact_boxes.dtype == torch.float32, what
    assert {term.dtype for term in (losses.total, *losses.terms.values())} == {torch.float32}
    tolerance = torch.finfo(half).eps if outputs.first_stage is None else 0.1  # eps is 2u
    torch.testing.assert_close(losses.total, exact.total, rtol=tolerance, atol=0)
    losses.total.backward()
    gradients = [parameter.grad for parameter in model.detector.parameters()]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", NAMES)
def test_references_stay_in_float32_from_layer_to_layer(name: str) -> None:
    model = build(small_models.CONFIGS[name])
    found: list[torch.dtype] = []

    def record(module: nn.Module, arguments: tuple[object, ...], position: QueryPosition) -> None:
        queries = arguments[2]
        assert isinstance(queries, Queries)
        found.extend(x.dtype for x in (queries.reference, position.reference) if x is not None)

    model.detector.decoder.query_position.register_forward_hook(record)
    with torch.autocast("cpu", torch.bfloat16):
        model.detector.train()(*small_models.batch((2, 3)))
    assert set(found) == (set() if name.startswith("detr") else {torch.float32})
    assert len(found) == (0 if name.startswith("detr") else 4)


@pytest.mark.parametrize("name", ["dab", "dab_scalar", "dab_patterns"])
def test_zero_deltas_leave_the_anchors_equal_bit_by_bit(name: str) -> None:
    """Anchors are parameters and the box heads start at zero: any rounding to bf16 between them would show."""
    torch.manual_seed(0)
    detector = build(small_models.CONFIGS[name]).detector.eval()
    images, _ = small_models.batch((1,))
    with torch.no_grad():
        exact = detector(images).predictions.boxes
        with torch.autocast("cpu", torch.bfloat16):
            found = detector(images).predictions.boxes
    assert torch.equal(found, exact)
    assert not torch.equal(exact, exact.bfloat16().float())


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_are_matched_and_scored_as_float32(name: str, half: torch.dtype) -> None:
    model = build(small_models.CONFIGS[name])
    images, targets = small_models.batch((2, 3))
    with torch.no_grad():
        outputs = model.detector.eval()(images)
    rounded = outputs.predictions.logits.to(half)
    totals = []
    for logits in (rounded, rounded.float()):
        predictions = Predictions(logits, outputs.predictions.boxes)
        losses = model.criterion(dataclasses.replace(outputs, predictions=predictions), targets, 5.0)
        totals.append([losses.total, *losses.terms.values()])
    for ours, theirs in zip(*totals, strict=True):
        assert torch.equal(ours, theirs)
