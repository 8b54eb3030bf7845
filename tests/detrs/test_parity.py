"""Test the models against the official ones: with the same weights, all numbers are equal.

All settings are read from the manifests of the goldens, so that other goldens of the same format can be used.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import goldens
import parity
from detrs.attention import DeformableAttention
from parity import Run

NAMES = goldens.names("model")
DEFORMABLE = [name for name in NAMES if goldens.read(name).architecture in ("deformable_detr", "dino")]
# Of their variants, some are tested in one form only, and others only among the slow tests
DEFORMABLE_MAIN = {
    "deformable_detr", "deformable_detr_refine", "deformable_detr_single_scale", "deformable_detr_two_stage",
    "deformable_detr_two_stage_narrow", "dino_4scale", "dino_4scale_narrow", "dino_4scale_narrow_train_dn",
    "dino_4scale_train_dn",
}  # fmt: skip
ONE_FORM = {
    "dab_deformable_detr_narrow",
    "dino_encoder_heads_shared_narrow",
    "dino_no_two_stage_narrow_train_dn",
}


def case(name: str, fused: bool, dtype: torch.dtype) -> Any:
    is_main = name not in DEFORMABLE or name in DEFORMABLE_MAIN
    is_fast = is_main or (name in ONE_FORM and fused and dtype == torch.float64)
    marks = [] if is_fast else [pytest.mark.slow]
    return pytest.param(name, fused, dtype, id=f"{name}-{fused}-{dtype}", marks=marks)

# Of the variants of the dense models, most are tested only among the slow tests
SLOW_DENSE = {
    "conditional_detr_gelu", "dab_detr_no_update", "dab_detr_points", "dab_detr_points_no_update",
    "dab_detr_scalar_random", "detr_focal_dc5", "detr_learned",
}  # fmt: skip
FLOAT64_DENSE = {
    "conditional_detr_learned_dc5",
    "dab_detr_learned_prenorm_dc5",
    "dab_detr_no_self_attn",
    "detr_learned_prenorm_dc5",
}


def case(name: str, fused: bool, dtype: torch.dtype) -> Any:
    is_slow = name in SLOW_DENSE or (name in FLOAT64_DENSE and dtype != torch.float64)
    marks = [pytest.mark.slow] if is_slow else []
    return pytest.param(name, fused, dtype, id=f"{name}-{fused}-{dtype}", marks=marks)


@pytest.mark.parametrize(
    ("name", "fused", "dtype"),
    [case(name, True, dtype) for name in NAMES for dtype in parity.TOLERANCES]
    + [case(name, False, dtype) for name in DEFORMABLE for dtype in parity.TOLERANCES],
)
def test_model(name: str, fused: bool, dtype: torch.dtype) -> None:
    """Deformable attention is tested in both forms; the models use the fused one."""
    this, tolerance = run(name, dtype, fused), parity.TOLERANCES[dtype]
    assert torch.equal(this.images.padding_mask, this.golden.tensor("mask"))
    parity.check_outputs(this, tolerance)
    parity.check_losses(this.model.criterion, this.losses, this.golden.manifest, tolerance)
    parity.check_matches(this)
    parity.check_detections(this, tolerance)
    parity.check_gradients(this, tolerance)


def run(name: str, dtype: torch.dtype, fused: bool) -> Run:
    golden = goldens.read(name)
    config = goldens.config_of(
        golden.manifest["args"], golden.architecture, golden.manifest["constructor_options"]
    )
    model = goldens.build_filled(config, dtype)
    if not fused:
        for module in model.detector.modules():
            if isinstance(module, DeformableAttention):
                module.fused = False
    images, targets, sizes = goldens.inputs(golden.manifest, dtype)
    draws = goldens.draws(golden)
    model.detector.train(draws is not None)
    outputs = model.detector(images, targets if draws else None, draws)
    losses = model.criterion(outputs, targets, float(sum(targets.counts)))
    losses.total.backward()
    return Run(golden, config, model, images, targets, sizes, outputs, losses)
