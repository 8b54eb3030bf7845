"""Compare a training step of each paper's model on a GPU with the same step on the CPU in float64."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import small_models
from detrs.denoising import Draws
from detrs.structures import Images, Targets
from detrs.zoo import (
    ConditionalDetrConfig,
    DabDetrConfig,
    DeformableDetrConfig,
    DetrConfig,
    DinoConfig,
    Model,
    ModelConfig,
    build,
)

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
LR, CLIP, NUM_BOXES = 1e-4, 0.1, 5.0
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the GPU is used; for deterministic steps

SMALL = [pytest.param(config, (64, 96), id=name) for name, config in small_models.CONFIGS.items()]
FULL = [
    pytest.param(config, (192, 224), id=f"full {name}", marks=pytest.mark.slow)
    for name, config in {
        "detr": DetrConfig(num_classes=91),
        "conditional": ConditionalDetrConfig(num_classes=91),
        "dab": DabDetrConfig(num_classes=91),
        "deformable": DeformableDetrConfig(num_classes=91, refinement=True),
        "two-stage": DeformableDetrConfig(num_classes=91, refinement=True, two_stage=True),
        "dino": DinoConfig(num_classes=91),
    }.items()
]


@dataclass(frozen=True)
class Step:
    """The results of a step: loss, gradients and new weights."""

    loss: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def train_step(
    model: Model, images: Images, targets: Targets, draws: Draws | None, device: str, dtype: torch.dtype
) -> Step:
    """Do one step: forward, losses, backward, clipping, AdamW."""
    detector = copy.deepcopy(model.detector).to(device, dtype).train()
    images = Images(images.pixels.to(device, dtype), images.padding_mask.to(device))
    targets = Targets(targets.labels.to(device), targets.boxes.to(device, dtype), targets.counts)
    outputs = detector(images, targets, None if draws is None else draws.to(torch.device(device)))
    loss = model.criterion(outputs, targets, NUM_BOXES).total
    loss.backward()
    named = {name: p for name, p in detector.named_parameters() if p.grad is not None}
    torch.nn.utils.clip_grad_norm_(named.values(), CLIP)
    gradients = {name: p.grad.detach().cpu().double() for name, p in named.items()}
    torch.optim.AdamW(named.values(), lr=LR, fused=True).step()
    weights = {name: p.detach().cpu().double() for name, p in named.items()}
    return Step(loss.detach().cpu().double(), gradients, weights)


@pytest.mark.parametrize(("config", "size"), [*SMALL, *FULL])
def test_a_step_equals_that_on_the_cpu_in_float64(config: ModelConfig, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = build(replace(config, dropout=0.0))
    for name, parameter in model.detector.named_parameters():
        if "sampling_offsets" in name:  # initially they point to centers of pixels, where gradients jump
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    images, targets = small_models.batch((2, 3), size=size)
    denoising = model.detector.denoising
    draws = None if denoising is None else denoising.draw_by_image(targets.counts, 3, seeds=(0, 1))
    arguments = (model, images, targets, draws)
    expected = train_step(*arguments, "cpu", torch.float64)

    found = train_step(*arguments, DEVICE, torch.float64)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-9, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-6, atol=1e-8 * largest)
        # AdamW's first step is the learning rate times the sign of the gradient
        clear = gradient.abs() > 1e-6 * largest
        torch.testing.assert_close(
            found.weights[name][clear], expected.weights[name][clear], rtol=0, atol=1e-6 * LR
        )

    # In float32, the two-stage models may choose other tokens as queries, whose scores are similar
    single = train_step(*arguments, DEVICE, torch.float32)
    chooses = model.detector.min_tokens > 0
    torch.testing.assert_close(single.loss, expected.loss, rtol=0.1 if chooses else 1e-4, atol=0)
    assert all(gradient.isfinite().all() for gradient in single.gradients.values())
    if not chooses:
        one, other = (
            torch.cat([g.flatten() for g in step.gradients.values()]) for step in (single, expected)
        )
        assert float((one - other).norm() / other.norm()) < 1e-2


@pytest.mark.parametrize(("config", "size"), [*SMALL, *FULL])
def test_deterministic_steps_end_in_the_same_bits(config: ModelConfig, size: tuple[int, int]) -> None:
    """As with `cluster.deterministic`: an operation without a fixed order is an error of torch."""
    torch.manual_seed(0)
    model = build(config)
    images, targets = small_models.batch((2, 3), size=size)
    denoising = model.detector.denoising
    draws = None if denoising is None else denoising.draw_by_image(targets.counts, 3, seeds=(0, 1))
    steps = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            torch.manual_seed(1)  # of dropout
            steps.append(train_step(model, images, targets, draws, DEVICE, torch.float32))
    finally:
        torch.use_deterministic_algorithms(False)
    for step in steps[1:]:
        assert torch.equal(step.loss, steps[0].loss)
        for name, gradient in steps[0].gradients.items():
            assert torch.equal(step.gradients[name], gradient), name
            assert torch.equal(step.weights[name], steps[0].weights[name]), name
