"""Two processes with a real gloo group, compared with one process on the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detrs import zoo
from raydetr.config import RunConfig, from_dict, override, to_dict
from raydetr.data.layout import Layout
from raydetr.data.splits import open_splits
from raydetr.data.stream import train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.training.loop import EvaluationReport, Training, train
from raydetr.training.world import World

STEPS = 3


@pytest.fixture
def plain_run(tiny_run: RunConfig) -> RunConfig:
    """A run without what depends on how a batch is split: batch statistics and denoising draws."""
    return override(
        tiny_run, {"model.num_classes": 4, "model.backbone.norm": "frozen", "model.num_denoising": 0}
    )


def take_steps(config: RunConfig, world: World) -> list[dict[str, Any]]:
    """The mean terms of the first steps, and the weights after them."""
    train_shards, _ = open_splits(config.data)
    torch.manual_seed(0)
    training = Training(config, zoo.build(config.model), train_shards.num_samples, world)
    batches = train_batches(
        train_shards, seed=0, position=0,
        layout=Layout(config.data.batch_size, world.size), rank=world.rank,
        transform=Transform(config.data.train_transform),
    )  # fmt: skip
    steps = []
    for batch, _ in zip(batches, range(STEPS), strict=False):
        steps.append(training.mean_terms(training.train_step(batch)))
    weights = {name: value.clone() for name, value in training.detector.state_dict().items()}
    return [{"terms": steps, "weights": weights, "buffers": buffers_of(training)}]


def buffers_of(training: Training) -> dict[str, Any]:
    """Whether buffers are sent before a forward pass, how many there are, and the types of the batch norms."""
    replica = training.replica
    return {
        "are_sent": isinstance(replica, DistributedDataParallel) and replica.will_sync_module_buffers(),
        "number": len(list(replica.buffers())),
        "norms": sorted({type(m).__name__ for m in replica.modules() if isinstance(m, nn.BatchNorm2d)}),
    }


def worker(rank: int, size: int, values: dict[str, Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    try:
        outcome = take_steps(from_dict(values), World(rank, size, torch.device("cpu")))
        torch.save(outcome, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_workers_take_the_same_steps_as_one_on_the_same_global_batch(
    plain_run: RunConfig, tmp_path: Path
) -> None:
    mp.spawn(worker, args=(2, to_dict(plain_run), str(tmp_path)), nprocs=2)
    (first,), (second,) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.set_num_threads(1)
    (single,) = take_steps(plain_run, World.single_process())
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    # DistributedDataParallel would send the frozen statistics before every forward pass
    assert first["buffers"]["number"] > 0
    assert first["buffers"] == {**first["buffers"], "are_sent": False, "norms": []}
    counts = [len(batch) for batch in first["terms"]]
    assert counts == [len(single["terms"][0])] * STEPS
    # Normalizing per worker instead of over the global batch would be wrong by several percent, because the workers
    # have different numbers of boxes. Later steps start from different weights: Adam's first updates depend on the sign
    # of gradients, which rounding can change.
    for step, (terms, expected) in enumerate(zip(first["terms"], single["terms"], strict=True)):
        for name in ("loss", "loss_bbox", "loss_giou", "loss_ce", "loss_ce_interm", "grad_norm"):
            assert terms[name] == pytest.approx(expected[name], rel=1e-5 if step == 0 else 5e-3), (step, name)


def test_the_workers_have_different_numbers_of_boxes_in_the_first_batches(plain_run: RunConfig) -> None:
    """Otherwise the test above could not fail."""
    train_shards, _ = open_splits(plain_run.data)
    boxes = []
    for rank in range(2):
        batches = train_batches(
            train_shards, seed=0, position=0, layout=Layout(8, 2), rank=rank,
            transform=Transform(plain_run.data.train_transform),
        )  # fmt: skip
        boxes.append([len(batch.labels) for batch, _ in zip(batches, range(STEPS), strict=False)])
    assert boxes[0] != boxes[1]


def evaluate_worker(rank: int, size: int, values: dict[str, Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    try:
        config = from_dict(values)
        train_shards, val_shards = open_splits(config.data)
        torch.manual_seed(0)
        world = World(rank, size, torch.device("cpu"))
        training = Training(config, zoo.build(config.model), train_shards.num_samples, world)
        for report in train(training, train_shards, val_shards):
            if isinstance(report, EvaluationReport):
                buffers = dict(training.weights.named_buffers())
                results = report.detections.results().to_coco()
                found = {"results": results, "buffers": buffers, "norms": buffers_of(training)["norms"]}
                torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_every_worker_evaluates_the_same_model(tiny_run: RunConfig, tmp_path: Path) -> None:
    """Running statistics of batch norm, also those of the moving average, are those of the images of all workers."""
    config = override(tiny_run, {"model.num_classes": 4, "optim.epochs": 1})
    mp.spawn(evaluate_worker, args=(2, to_dict(config), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert any("running_mean" in name for name in first["buffers"])
    assert first["norms"] == ["SyncBatchNorm2d"]  # every one of them
    for name, value in first["buffers"].items():
        assert torch.equal(value, second["buffers"][name]), name
    # Each worker has its own images; together they are those of the split
    images = [{row["image_id"] for row in part["results"]} for part in (first, second)]
    assert not images[0] & images[1]
    assert images[0] | images[1] == set(open_splits(config.data)[1].samples["image_id"].tolist())


def stopped_worker(rank: int, size: int, values: dict[str, Any], folder: str) -> None:
    """Evaluate, while only the last worker is asked to stop."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    try:
        config = from_dict(values)
        train_shards, val_shards = open_splits(config.data)
        torch.manual_seed(0)
        world = World(rank, size, torch.device("cpu"))
        training = Training(config, zoo.build(config.model), train_shards.num_samples, world)
        training.should_stop = lambda: rank == size - 1
        detections = training.evaluate(val_shards)
        torch.save((detections is None, training.is_stopping), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_an_evaluation_ends_on_all_workers_if_one_is_asked_to_stop(
    plain_run: RunConfig, tmp_path: Path
) -> None:
    mp.spawn(stopped_worker, args=(2, to_dict(plain_run), str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == (True, True)
