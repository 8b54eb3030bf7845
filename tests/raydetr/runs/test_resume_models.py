"""Every model resumes to the identical loss, with dropout and denoising, batch norm and averaged weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import small_models
from detrs import zoo
from raydetr.config import RunConfig, override
from raydetr.data.batch import Batch
from raydetr.data.layout import Layout
from raydetr.data.splits import open_splits
from raydetr.data.stream import train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.training import checkpoint
from raydetr.training.loop import Training
from raydetr.training.world import World


def new_training(config: RunConfig) -> Training:
    training = Training(config, zoo.build(config.model), 48, World.single_process())
    training.detector.train()
    return training


def losses(training: Training, num_steps: int) -> list[dict[str, float]]:
    """Train `num_steps` from the current position."""
    data = training.config.data
    batches = train_batches(
        open_splits(data)[0], seed=0, position=training.position,
        layout=Layout(data.batch_size), transform=Transform(data.train_transform),
    )  # fmt: skip
    return [one_step(training, batch) for batch, _ in zip(batches, range(num_steps), strict=False)]


def one_step(training: Training, batch: Batch) -> dict[str, float]:
    terms = training.train_step(batch)
    assert isinstance(terms, dict)
    return {name: term.item() for name, term in terms.items()}


@pytest.mark.parametrize("name", small_models.CONFIGS)
def test_resumes_to_the_identical_loss(name: str, tiny_run: RunConfig, tmp_path: Path) -> None:
    model = dataclasses.replace(small_models.CONFIGS[name], dropout=0.1)
    config = override(tiny_run, {"data.batch_size": 2}).model_copy(update={"model": model})
    shards = open_splits(config.data)[0]
    torch.manual_seed(0)
    unbroken = new_training(config)
    losses(unbroken, 2)
    checkpoint.write(tmp_path / "saved", *checkpoint.capture(unbroken, shards))
    torch.manual_seed(1)
    resumed = new_training(config)
    checkpoint.restore(tmp_path / "saved", resumed, shards)
    expected = losses(unbroken, 2)
    assert losses(resumed, 2) == expected
    weights, expected_weights = (x.weights.state_dict() for x in (resumed, unbroken))
    assert all(torch.equal(weights[key], expected_weights[key]) for key in expected_weights)
