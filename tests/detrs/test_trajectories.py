"""Test four AdamW steps against the official models: the loss before each step, the change of each parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import goldens
from detrs.official_names import official_names
from detrs.zoo import Model, ModelConfig

DTYPES = [
    pytest.param(torch.float64, 1e-8, id="float64"),
    pytest.param(torch.float32, 1e-4, id="float32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("name", goldens.names("traj"))
def test_trajectory(name: str, dtype: torch.dtype, tolerance: float) -> None:
    trajectory = goldens.read(name).manifest
    golden = goldens.read(trajectory["name"])
    config = goldens.config_of(
        golden.manifest["args"], golden.architecture, golden.manifest["constructor_options"]
    )
    model = goldens.build_filled(config, dtype)
    parameters = official_parameters(config, model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    steps = list(train(model, golden.manifest, trajectory, parameters, dtype))
    for (total, norm), expected in zip(steps, trajectory["trajectory_float64"], strict=True):
        assert total == pytest.approx(expected["total"], rel=tolerance)
        assert norm is None or norm == pytest.approx(expected["grad_total_norm"], rel=10 * tolerance)
    if dtype == torch.float64:
        check_changes(before, parameters, trajectory, golden.manifest)


def official_parameters(config: ModelConfig, model: Model) -> dict[str, nn.Parameter]:
    """Return the trained parameters by all their official names."""
    trained = {n: p for n, p in model.detector.named_parameters() if p.requires_grad}
    names = official_names(config, trained)
    return {official: trained[ours] for ours, group in names.items() for official in group}


def train(
    model: Model,
    manifest: dict[str, Any],
    trajectory: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    dtype: torch.dtype,
) -> Any:
    """Yield (total loss, gradient norm) of each step, and the loss after the last step."""
    images, targets, _ = goldens.inputs(manifest, dtype)
    optimizer = adamw(manifest["args"], trajectory, parameters)
    model.detector.eval()
    for _ in range(trajectory["steps"]):
        total = model.criterion(model.detector(images), targets, float(sum(targets.counts))).total
        optimizer.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(set(parameters.values()), trajectory["clip_max_norm"])
        optimizer.step()
        yield total.item(), norm.item()
    with torch.no_grad():
        total = model.criterion(model.detector(images), targets, float(sum(targets.counts))).total
    yield total.item(), None


def adamw(
    args: dict[str, Any], trajectory: dict[str, Any], parameters: dict[str, nn.Parameter]
) -> torch.optim.AdamW:
    rates: dict[nn.Parameter, float] = {}
    slow = {name: float(rate) for rate, names in trajectory["lr_group_small"].items() for name in names}
    for name, parameter in parameters.items():
        usual = args["lr_backbone"] if name.startswith("backbone") else args["lr"]
        rates[parameter] = slow.get(name, rates.get(parameter, usual))
    groups = [
        {"params": [p for p, own in rates.items() if own == rate], "lr": rate}
        for rate in sorted(set(rates.values()))
    ]
    assert sum(count for _, count in trajectory["lr_groups"]) == len(rates)
    return torch.optim.AdamW(groups, weight_decay=trajectory["weight_decay"])


def check_changes(
    before: dict[str, Tensor],
    after: dict[str, nn.Parameter],
    trajectory: dict[str, Any],
    manifest: dict[str, Any],
) -> None:
    # If a gradient is zero except for rounding, AdamW amplifies the rounding.
    noise = set(manifest["grad_numerically_zero"])
    for name, expected in trajectory["param_delta_norm_float64"].items():
        if name not in noise:
            change = (after[name].detach() - before[name]).norm().item()
            assert change == pytest.approx(expected, rel=1e-6, abs=1e-9), name
