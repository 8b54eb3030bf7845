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
# Of the variants, some are tested in float64 and one form only, and others only among the slow tests
FLOAT64 = {
    "conditional_detr_learned_dc5", "dab_deformable_detr_narrow", "dab_detr_learned_prenorm_dc5",
    "dab_detr_no_self_attn", "detr_learned_prenorm_dc5", "dino_encoder_heads_shared_narrow",
    "dino_no_two_stage_narrow_train_dn",
}  # fmt: skip
SLOW = {
    "conditional_detr_gelu", "dab_deformable_detr_narrow_opts", "dab_detr_no_update", "dab_detr_points",
    "dab_detr_points_no_update", "dab_detr_scalar_random", "deformable_detr_single_scale_dc5",
    "deformable_detr_two_stage_no_refine_narrow", "detr_focal_dc5", "detr_learned", "dino_box_heads_narrow",
    "dino_class_heads_narrow", "dino_look_forward_once_narrow", "dino_no_dn_narrow", "dino_no_two_stage_narrow",
    "dino_pure_selection_narrow",
}  # fmt: skip


def case(name: str, fused: bool, dtype: torch.dtype) -> Any:
    is_slow = name in SLOW or (name in FLOAT64 and not (fused and dtype == torch.float64))
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
