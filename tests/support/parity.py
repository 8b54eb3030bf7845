"""Compare runs of our models with goldens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import goldens
from detrs.criterion import Criterion, Losses
from detrs.matcher import match
from detrs.official_names import official_names
from detrs.structures import Detections, Images, Outputs, Predictions, Targets
from detrs.zoo import Model, ModelConfig
from goldens import Golden

Pairs = dict[str, list[list[tuple[int, int]]]]  # for each prediction layer and image: (query, target)


@dataclass(frozen=True)
class Tolerance:
    """Tolerances, from the README of the goldens."""

    logits: float
    boxes: float
    loss: float  # relative
    loss_floor: float
    gradient: float  # relative
    pixels: float


TOLERANCES = {
    torch.float64: Tolerance(1e-9, 1e-10, 1e-9, 1e-12, 1e-8, 1e-6),
    torch.float32: Tolerance(5e-5, 5e-6, 1e-5, 1e-5, 2e-3, 5e-3),
}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)


@dataclass(frozen=True)
class Run:
    """One forward and backward pass of a golden's model on the golden's batch."""

    golden: Golden
    config: ModelConfig
    model: Model
    images: Images
    targets: Targets
    sizes: Tensor
    outputs: Outputs
    losses: Losses

    @property
    def has_aux_outputs(self) -> bool:
        """Whether the official model returned the predictions of all layers; some do not without aux_loss."""
        return self.config.aux_loss or "aux0_pred_boxes" in self.golden.arrays


def check_outputs(this: Run, tolerance: Tolerance) -> None:
    found, num_compared = {"": this.outputs.predictions}, 0
    if this.outputs.denoised is not None:
        found["dn_"] = this.outputs.denoised.predictions
    for prefix, predictions in found.items():
        num_layers = len(predictions.logits)
        for layer in range(num_layers):
            key = f"{prefix}aux{layer}_" if layer + 1 < num_layers else prefix
            if not this.has_aux_outputs and key != prefix:
                continue
            num_compared += 1
            check_predictions(this.golden, key, predictions, layer, tolerance)
    if this.outputs.first_stage is not None:
        first = this.outputs.first_stage
        key = "enc_" if "enc_pred_logits" in this.golden.arrays else "interm_"
        check_predictions(this.golden, key, first.predictions, 0, tolerance)
        if "interm_pre_pred_boxes" in this.golden.arrays:
            expected = this.golden.tensor("interm_pre_pred_boxes")
            assert distance(first.proposals, expected) <= tolerance.boxes
    assert len([key for key in this.golden.arrays if key.endswith("_pred_boxes") or key == "pred_boxes"]) == (
        num_compared
        + (0 if this.outputs.first_stage is None else 1)
        + ("interm_pre_pred_boxes" in this.golden.arrays)
    )


def check_predictions(
    golden: Golden, key: str, predictions: Predictions, layer: int, tolerance: Tolerance
) -> None:
    logits, boxes = golden.tensor(f"{key}pred_logits"), golden.tensor(f"{key}pred_boxes")
    # The goldens hold the logits of the encoder in float32.
    rounding = 1e-6 if golden.arrays[f"{key}pred_logits"].dtype == "float32" else 0
    assert distance(predictions.logits[layer], logits) <= tolerance.logits + rounding, key
    assert distance(predictions.boxes[layer], boxes) <= tolerance.boxes, key


def check_losses(
    criterion: Criterion, losses: Losses, expected: dict[str, Any], tolerance: Tolerance
) -> None:
    for name, value in expected["losses"].items():
        if not criterion.denoising and "_dn" in name:
            assert value == 0, name  # the official DINO has these terms also without denoising
            continue
        if not criterion.aux_loss and re.search(r"_\d+$", name):
            assert name not in expected["weight_dict"], name  # computed by the official DINO, without effect
            continue
        limit = tolerance.loss * abs(value) + tolerance.loss_floor
        assert abs(losses.terms[name].item() - value) <= limit, name
    # We log the parts of the box loss for all papers, the official code only for some.
    extra = {name for name in losses.terms if not name.startswith(("loss_xy", "loss_hw"))}
    assert extra <= expected["losses"].keys()
    total = expected["total_weighted_loss"]
    assert abs(losses.total.item() - total) <= tolerance.loss * abs(total) + tolerance.loss_floor


def check_matches(this: Run) -> None:
    expected = expected_pairs(this.golden.manifest["matcher_indices"])
    found = matched_pairs(this.model, this.outputs, this.targets)
    if not this.has_aux_outputs:
        found = {name: pairs for name, pairs in found.items() if not name.startswith("aux")}
    assert found == expected


def expected_pairs(indices: dict[str, Any]) -> Pairs:
    return {name: [sorted_pairs(*image) for image in images] for name, images in indices.items()}


def matched_pairs(model: Model, outputs: Outputs, targets: Targets) -> Pairs:
    groups = [(outputs.predictions, targets.labels)]
    name = model.criterion.first_stage
    if outputs.first_stage is not None:
        zero = model.criterion.first_stage_labels == "zero"
        groups.append(
            (outputs.first_stage.predictions, torch.zeros_like(targets.labels) if zero else targets.labels)
        )
    decoder, *first = match(groups, targets, model.criterion.costs)
    num_layers = len(decoder.queries)
    found: Pairs = {}
    for layer in range(0 if model.criterion.aux_loss else num_layers - 1, num_layers):
        key = f"aux{layer}" if layer + 1 < num_layers else "final"
        found[key] = by_image(decoder.queries[layer], decoder.targets[layer], targets.counts)
    for matches in first:
        found[name] = by_image(matches.queries[0], matches.targets[0], targets.counts)
    return found


def by_image(queries: Tensor, rows: Tensor, counts: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    pairs: list[list[tuple[int, int]]] = []
    start = 0
    for count in counts:
        inside = (rows >= start) & (rows < start + count)
        pairs.append(sorted_pairs(queries[inside].tolist(), (rows[inside] - start).tolist()))
        start += count
    return pairs


def sorted_pairs(queries: list[int], rows: list[int]) -> list[tuple[int, int]]:
    return sorted(zip(queries, rows, strict=True))


def check_detections(this: Run, tolerance: Tolerance) -> None:
    predictions = this.outputs.predictions
    detections = this.model.postprocess(predictions, this.sizes)
    for i, image in enumerate(detections):
        check_detection(this.golden, "", i, image, tolerance)


def check_detection(golden: Golden, prefix: str, i: int, image: Detections, tolerance: Tolerance) -> None:
    scores, labels, boxes = (golden.tensor(f"{prefix}post_{x}")[i] for x in ("scores", "labels", "boxes"))
    order = scores.sort(descending=True, stable=True).indices  # those of DETR are in the order of the queries
    assert distance(image.scores, scores[order]) <= tolerance.logits
    rows = torch.ones(len(order), dtype=torch.bool)
    if (
        image.scores.dtype == torch.float32
    ):  # scores closer than the tolerance have no order, as where they saturate
        is_close = scores[order].diff().abs() <= 2 * tolerance.logits
        rows[1:] &= ~is_close
        rows[:-1] &= ~is_close
    assert torch.equal(image.labels[rows], labels[order][rows])
    if rows.any():
        assert distance(image.boxes_xyxy[rows], boxes[order][rows]) <= tolerance.pixels


def check_gradients(this: Run, tolerance: Tolerance) -> None:
    manifest = this.golden.manifest
    parameters = dict(this.model.detector.named_parameters())
    official = official_names(this.config, parameters)
    found = {official[name][0]: parameter for name, parameter in parameters.items()}
    frozen = {name for name, parameter in found.items() if not parameter.requires_grad}
    assert frozen == set(manifest["frozen_params"])
    without = goldens.without_effect(this.config)
    assert found.keys() - frozen == (set(manifest["grad_names"]) | set(manifest["grad_none"])) - without
    norms, firsts = this.golden.tensor("grad_norm"), this.golden.tensor("grad_first5")
    floor = 1e-6 * norms.max()
    for name, norm, first in zip(manifest["grad_names"], norms, firsts, strict=True):
        if name in manifest["grad_numerically_zero"]:
            continue
        assert name not in without, name
        gradient = found[name].grad
        assert gradient is not None, name
        limit = tolerance.gradient * torch.maximum(norm, floor)
        assert (gradient.double().norm() - norm).abs() <= limit, name
        values = gradient.double().flatten()[:5]
        assert (values - first[: len(values)]).abs().max() <= limit, name


def distance(found: Tensor, expected: Tensor) -> float:
    return (found.double() - expected.double()).abs().max().item()
