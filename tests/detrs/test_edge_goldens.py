"""Test criterion, matcher, postprocessing and denoising against the official code on synthetic predictions.

The cases: no targets, more targets than queries, saturated logits, boxes without area, and others.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import goldens
import parity
from detrs.denoising import Denoising, denoising_attn_mask
from detrs.structures import FirstStage, Outputs, Predictions
from goldens import Golden

CASES = [
    (name, case["name"]) for name in goldens.names("edge") for case in goldens.read(name).manifest["cases"]
]
NOISED = [
    (name, case["prefix"])
    for name in goldens.names("edge")
    for case in goldens.read(name).manifest.get("cdn", [])
]


@parity.DTYPES
@pytest.mark.parametrize(("name", "case_name"), CASES)
def test_case(name: str, case_name: str, dtype: torch.dtype) -> None:
    golden, tolerance = goldens.read(name), parity.TOLERANCES[dtype]
    case = next(x for x in golden.manifest["cases"] if x["name"] == case_name)
    model = goldens.build_edge(golden, case)
    outputs, leaves = synthetic_outputs(golden, case, dtype)
    targets = goldens.packed_targets(golden.arrays, len(case["n_targets"]), dtype, f"{case_name}/")
    losses = model.criterion(outputs, targets, float(max(sum(targets.counts), 1)))
    parity.check_losses(model.criterion, losses, case, tolerance)
    found = parity.matched_pairs(model, outputs, targets)
    assert found == parity.expected_pairs(case["matcher_indices"])
    losses.total.backward()
    # The goldens hold the gradients of the logits in float32.
    check_gradients(golden, case, leaves, 1e-7 if dtype == torch.float64 else 1e-4)
    if f"{case_name}/post_scores" in golden.arrays:
        sizes = torch.tensor(case["orig_sizes_hw"])
        for i, image in enumerate(model.postprocess(outputs.predictions, sizes)):
            parity.check_detection(golden, f"{case_name}/", i, image, tolerance)


def synthetic_outputs(
    golden: Golden, case: dict[str, Any], dtype: torch.dtype
) -> tuple[Outputs, dict[str, Tensor]]:
    leaves = {
        key.split("/")[1]: golden.tensor(key, dtype).requires_grad_()
        for key in golden.arrays
        if key.startswith(f"{case['name']}/") and "_pred_" in key and "grad" not in key
    }
    layers = [*sorted({key.split("_pred")[0] for key in leaves if key.startswith("aux")}), "final"]
    logits = torch.stack([leaves[f"{layer}_pred_logits"] for layer in layers])
    boxes = torch.stack([leaves[f"{layer}_pred_boxes"] for layer in layers])
    first = None
    for name in ("enc", "interm"):
        if f"{name}_pred_logits" in leaves:
            encoder = Predictions(leaves[f"{name}_pred_logits"][None], leaves[f"{name}_pred_boxes"][None])
            first = FirstStage(encoder, leaves[f"{name}_pred_boxes"].detach())
    return Outputs(Predictions(logits, boxes), first), leaves


def check_gradients(
    golden: Golden, case: dict[str, Any], leaves: dict[str, Tensor], tolerance: float
) -> None:
    for name, leaf in leaves.items():
        expected = golden.tensor(f"{case['name']}/{name.replace('_pred_', '_grad_pred_')}")
        assert leaf.grad is not None, name
        limit = tolerance * max(expected.abs().max().item(), 1.0)
        assert parity.distance(leaf.grad, expected) <= limit, name


@pytest.mark.parametrize(("name", "prefix"), NOISED)
def test_noised_queries(name: str, prefix: str) -> None:
    golden = goldens.read(name)
    case = next(x for x in golden.manifest["cdn"] if x["prefix"] == prefix)
    denoising = Denoising(
        case["num_classes"],
        case["hidden_dim"],
        num_denoising=case["dn_number"],
        label_noise=float(case["label_noise_ratio"]),
        box_noise=float(case["box_noise_scale"]),
        group_rule="official",
    ).double()
    weight = goldens.rule_weight("label_enc.weight", tuple(denoising.label_embed.weight.shape))
    denoising.label_embed.weight.data.copy_(weight)
    targets = goldens.packed_targets(golden.arrays, len(case["n_targets"]), torch.float64, prefix)
    draws = goldens.draws(golden, prefix)
    assert draws is not None
    noised = denoising(targets, draws)
    assert (noised.num_queries, noised.num_groups) == (case["pad_size"], case["num_dn_group"])
    assert torch.equal(noised.labels, golden.tensor(f"{prefix}known_labels"))
    torch.testing.assert_close(
        noised.content, golden.tensor(f"{prefix}input_query_label"), rtol=0, atol=1e-12
    )
    boxes = golden.tensor(f"{prefix}input_query_bbox").sigmoid()
    torch.testing.assert_close(noised.reference, boxes, rtol=0, atol=1e-12)
    attn_mask = denoising_attn_mask(noised, case["num_queries"], torch.device("cpu"))
    assert torch.equal(attn_mask, golden.tensor(f"{prefix}attn_mask"))


@pytest.mark.parametrize(("name", "prefix"), NOISED)
def test_noise_is_drawn_in_the_official_order(name: str, prefix: str) -> None:
    golden = goldens.read(name)
    case = next(x for x in golden.manifest["cdn"] if x["prefix"] == prefix)
    expected = goldens.draws(golden, prefix)
    denoising = Denoising(
        case["num_classes"],
        case["hidden_dim"],
        num_denoising=case["dn_number"],
        label_noise=float(case["label_noise_ratio"]),
        box_noise=float(case["box_noise_scale"]),
        group_rule="official",
    )
    targets = goldens.packed_targets(golden.arrays, len(case["n_targets"]), torch.float32, prefix)
    repeats = 2 * case["num_dn_group"]
    torch.manual_seed(0)
    found = denoising.draw(targets.labels.repeat(repeats))
    assert expected is not None
    if denoising.label_noise > 0:
        assert torch.equal(found.label_chance, expected.label_chance)
        assert torch.equal(found.new_labels, expected.new_labels)
    if denoising.box_noise > 0:
        assert torch.equal(found.signs, expected.signs)
        assert torch.equal(found.fractions, expected.fractions)
