"""Parameter groups, schedules and the moving average, against their formulas."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from raydetr.config import OptimConfig
from raydetr.recipes.deformable import deformable_detr_r50_two_stage_50ep
from raydetr.recipes.dino import dino_r50_4scale_12ep
from raydetr.training.optim import Ema, lr_factor, parameter_groups


def optim(**changes: object) -> OptimConfig:
    values = {"epochs": 10, "lr": 1e-3, "lr_backbone": 1e-4, "lr_sampling": 1e-5}
    return OptimConfig.model_validate({**values, **changes})


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.sampling_offsets = nn.Linear(4, 2)
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Linear(4, 2).requires_grad_(False)


def rates(model: nn.Module, config: OptimConfig) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model.named_parameters(), config)
        for parameter in group["params"]
    }


def test_each_trainable_parameter_is_in_one_group_with_the_rate_of_its_kind() -> None:
    got = rates(Small(), optim(weight_decay=0.1))
    assert got == {
        "backbone.0.weight": (1e-4, 0.1),
        "backbone.0.bias": (1e-4, 0.1),
        "backbone.1.weight": (1e-4, 0.1),
        "backbone.1.bias": (1e-4, 0.1),
        "sampling_offsets.weight": (1e-5, 0.1),
        "sampling_offsets.bias": (1e-5, 0.1),
        "head.weight": (1e-3, 0.1),
        "head.bias": (1e-3, 0.1),
    }


def test_norms_and_biases_can_be_excluded_from_the_decay_with_few_groups() -> None:
    config = optim(weight_decay=0.1, decay_norms_and_biases=False)
    got = rates(Small(), config)
    assert {name for name, (_, decay) in got.items() if decay == 0} == {
        "backbone.0.bias", "backbone.1.weight", "backbone.1.bias", "sampling_offsets.bias", "head.bias",
    }  # fmt: skip
    assert len(parameter_groups(Small().named_parameters(), config)) == 6


def test_cosine_schedule_with_warm_up() -> None:
    config = optim(schedule="cosine", warmup_fraction=0.1, min_lr_ratio=0.02)
    factors = [lr_factor(config, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) == factors[9] == 1.0
    assert factors[-1] == pytest.approx(0.02)
    expected = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (54 - 10) / 89))
    assert factors[54] == pytest.approx(expected)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))


def test_step_schedule_drops_tenfold_after_the_given_epochs() -> None:
    config = optim(lr_drop_epochs=(4, 8))
    factors = [lr_factor(config, step, 100) for step in (0, 39, 40, 79, 80, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_ema_follows_its_formula_in_float64_and_keeps_counters() -> None:
    torch.manual_seed(0)
    model = Small().double()
    ema = Ema(model, 0.5)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for update in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.backbone(torch.randn(8, 3, 2, 2).double())  # updates the running statistics
        ema.update()
        decay = min(0.5, (1 + update) / (10 + update))
        for name, value in model.state_dict().items():
            old = expected[name]
            floating = value.is_floating_point()
            expected[name] = decay * old + (1 - decay) * value if floating else value.clone()
    for name, value in ema.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_ema_does_not_touch_the_model() -> None:
    model = Small()
    before = copy.deepcopy(model.state_dict())
    Ema(model, 0.9).update()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_paper_recipes_have_the_official_rates() -> None:
    dino = dino_r50_4scale_12ep().optim
    assert (dino.lr, dino.lr_backbone, dino.lr_sampling) == (1e-4, 1e-5, 1e-4)
    deformable = deformable_detr_r50_two_stage_50ep().optim
    assert (deformable.lr, deformable.lr_backbone, deformable.lr_sampling) == (2e-4, 2e-5, 2e-5)
