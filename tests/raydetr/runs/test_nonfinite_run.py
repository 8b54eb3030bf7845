"""Steps with NaN or infinity: skipped by all workers, written to disk, counted, up to a limit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn

import small_models
from detrs import zoo
from detrs.criterion import Losses
from detrs.structures import Outputs, Targets
from mlflow_history import fetch_history
from raydetr.config import ConfigError, RunConfig, from_dict, override, to_dict
from raydetr.data.batch import Batch
from raydetr.data.layout import Layout
from raydetr.data.splits import open_splits
from raydetr.data.stream import train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.runs import run
from raydetr.runs.resolve import resolve
from raydetr.tracking.events import Metrics, read_events
from raydetr.training import checkpoint, loop
from raydetr.training.loop import Training
from raydetr.training.nonfinite import SkippedStep, compute_loss
from raydetr.training.world import World


def add_nan_to_boxes(batch: Batch) -> Batch:
    boxes = batch.boxes.clone()
    boxes[-1, 2] = torch.nan
    return dataclasses.replace(batch, boxes=boxes)


def add_nan_to_pixels(training: Training) -> None:
    """Add NaN to the first image of the next step: images are uint8, but normalized ones need not be finite."""

    def add(backbone: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        hook.remove()
        pixels = inputs[0].clone()
        pixels[0, 0, 5, 5] = torch.nan
        return (pixels,)

    hook = training.detector.backbone.register_forward_pre_hook(add)


def make_training(config: RunConfig, world: World | None = None) -> Training:
    torch.manual_seed(0)
    num_samples = open_splits(config.data)[0].num_samples
    training = Training(config, zoo.build(config.model), num_samples, world or World.single_process())
    training.detector.train()
    return training


def batches_of(config: RunConfig, world: World | None = None) -> Iterator[Batch]:
    world = world or World.single_process()
    return train_batches(
        open_splits(config.data)[0], seed=0, position=0,
        layout=Layout(config.data.batch_size, world.size), rank=world.rank,
        transform=Transform(config.data.train_transform),
    )  # fmt: skip


def state_of(training: Training) -> list[Any]:
    ema = training.ema
    assert ema is not None
    state = [training.detector.state_dict(), ema.model.state_dict(), ema.num_updates]
    leaves = torch.utils._pytree.tree_leaves([*state, training.optimizer.state_dict()["state"]])
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]


def same(first: list[Any], second: list[Any]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.fixture
def small_run(tiny_run: RunConfig) -> RunConfig:
    return override(tiny_run, {"model.num_classes": 4})


@pytest.mark.parametrize("kind", ["boxes", "pixels"])
def test_a_skipped_step_moves_the_position_and_nothing_else(small_run: RunConfig, kind: str) -> None:
    training, batches = make_training(small_run), batches_of(small_run)
    assert isinstance(training.train_step(next(batches)), dict)
    before = state_of(training)
    batch = next(batches)
    if kind == "pixels":
        add_nan_to_pixels(training)
    skipped = training.train_step(add_nan_to_boxes(batch) if kind == "boxes" else batch)
    assert isinstance(skipped, SkippedStep)
    assert same(state_of(training), before)
    assert (training.step, training.position, training.skipped_steps) == (2, 16, 1)
    (cause,) = skipped.causes
    assert "not finite" in cause.reason
    # Batch norm spreads NaN over all images, so that the matcher cannot name the first one
    assert ("target box of image" if kind == "boxes" else "predictions of decoder layer 0") in cause.reason
    assert cause.image_ids == tuple(batch.image_ids.tolist())
    outcome = training.train_step(next(batches))
    assert isinstance(outcome, dict)
    assert outcome["loss"].isfinite()
    assert all(value.isfinite().all() for value in training.weights.state_dict().values())


@pytest.mark.parametrize("name", small_models.CONFIGS)
@pytest.mark.parametrize("counts", [(2, 1), (0, 0)], ids=str)
def test_nan_reaches_every_gradient(name: str, counts: tuple[int, ...]) -> None:
    """Otherwise the other workers would wait for the gradient, or could not detect the NaN."""
    torch.manual_seed(0)
    model = zoo.build(small_models.CONFIGS[name])
    images, targets = small_models.batch(counts, size=(64, 64))
    pixels = images.pixels.clone()
    pixels[0, 0, 5, 5] = torch.nan
    outputs = model.detector.train()(dataclasses.replace(images, pixels=pixels), targets)
    loss = compute_loss(model.criterion, outputs, targets, torch.tensor(3.0))
    assert "image 0" in (loss.reason() or "")
    loss.total.backward()
    gradients = {name: parameter.grad for name, parameter in model.detector.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert not all(gradient.isfinite().all() for gradient in gradients.values())


def test_an_infinite_loss_with_a_finite_gradient_gives_a_gradient_of_nan() -> None:
    weight = torch.ones(3, requires_grad=True)

    def criterion(outputs: Outputs, targets: Targets, num_boxes: torch.Tensor, _: None) -> Losses:
        total = weight.sum() + torch.inf
        return Losses(total, {"loss_ce": total.detach(), "loss_bbox": torch.tensor(1.0)})

    loss = compute_loss(criterion, None, None, torch.tensor(1.0))
    loss.total.backward()
    assert weight.grad.isnan().all()
    assert loss.reason() == "the loss is not finite (loss_ce)"


# --- two processes ---


def two_processes(rank: int, size: int, values: dict[str, Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    try:
        config, world = from_dict(values), World(rank, size, torch.device("cpu"))
        training, batches = make_training(config, world), batches_of(config, world)
        causes: list[list[Any]] = []
        for step in range(4):
            batch = next(batches)
            if (step, rank) == (2, 0):
                add_nan_to_pixels(training)
            outcome = training.train_step(
                add_nan_to_boxes(batch) if (step, rank) in ((1, 1), (2, 1)) else batch
            )
            if isinstance(outcome, SkippedStep):
                outcome.dump(Path(folder), rank)
                causes.append([outcome.step, *((c.rank, c.reason, c.image_ids) for c in outcome.causes)])
        weights = [parameter.detach() for parameter in training.detector.parameters()]
        torch.save({"causes": causes, "weights": weights}, f"{folder}/{rank}.pt")
        assert all(buffer.isfinite().all() for buffer in training.detector.buffers())
    finally:
        dist.destroy_process_group()


@pytest.mark.timeout(200)
def test_all_workers_skip_what_one_cannot_use(small_run: RunConfig, tmp_path: Path) -> None:
    mp.spawn(two_processes, args=(2, to_dict(small_run), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["causes"] == second["causes"]
    ranks = [(step, [cause[0] for cause in causes]) for step, *causes in first["causes"]]
    assert ranks == [(2, [1]), (3, [0, 1])]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    assert all(weight.isfinite().all() for weight in first["weights"])
    kept = sorted(path.name for path in (tmp_path / "skipped-steps").iterdir())
    assert kept == ["step-000002-rank-1", "step-000003-rank-0", "step-000003-rank-1"]


# --- complete runs ---


@pytest.fixture
def nan_positions(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Positions of batches to which a target box with NaN is added."""
    positions: set[int] = set()
    original = loop.train_batches

    def batches_with_nan(*args: Any, **keywords: Any) -> Iterator[Batch]:
        for batch in original(*args, **keywords):
            yield add_nan_to_boxes(batch) if batch.position in positions else batch

    monkeypatch.setattr(loop, "train_batches", batches_with_nan)
    return positions


def test_a_run_writes_the_batch_counts_the_step_and_continues(
    tiny_run: RunConfig, nan_positions: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    nan_positions |= {8, 40}
    result = run.start(override(tiny_run, {"optim.epochs": 2, "tracking.upload": True}), local=True)
    assert result.metrics["skipped_steps"] == 2
    tracked = fetch_history(result.tracking_uri, result.mlflow_run_id)
    assert tracked["data/skipped_steps"] == [(2, 1.0), (6, 2.0)]
    assert [step for step, _ in tracked["loss/loss"]] == [4, 8, 10, 12]
    rows = Metrics(read_events(result.folder)).rows
    assert [row["skipped_steps"] for row in rows if "skipped_steps" in row] == [1, 2]
    assert "warning: skipped step 2: rank 0: a target box of image" in capsys.readouterr().err
    check_dump(result.folder / "skipped-steps" / "step-000002-rank-0", tiny_run)


def check_dump(folder: Path, config: RunConfig) -> None:
    """Check that the dump has the input of the model."""
    batches = batches_of(config)
    next(batches)
    batch = next(batches)
    record = json.loads((folder / "step.json").read_text())
    assert (record["step"], record["rank"], record["position"]) == (2, 0, batch.position)
    assert record["random_seed"] == hash((config.seed, 8)) & (2**63 - 1)
    assert [image["image_id"] for image in record["images"]] == batch.image_ids.tolist()
    boxes = np.array([box for image in record["images"] for box in image["boxes_cxcywh"]], float)
    np.testing.assert_array_equal(boxes, add_nan_to_boxes(batch).boxes.double().numpy())
    assert [label for image in record["images"] for label in image["labels"]] == batch.labels.tolist()
    for i, image in enumerate(record["images"]):
        height, width = batch.sizes[i].tolist()
        pixels = np.asarray(Image.open(folder / image["file"]))
        np.testing.assert_array_equal(pixels, batch.pixels[i, :, :height, :width].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("limit", "last_step"), [(0, 2), (1, 4)])
def test_beyond_the_limit_the_run_stops_and_names_the_dump(
    tiny_run: RunConfig, nan_positions: set[int], limit: int, last_step: int
) -> None:
    nan_positions |= {8, 24, 40}
    config = override(tiny_run, {"optim.max_skipped_steps": limit})
    with pytest.raises(FloatingPointError) as caught:
        run.start(config, local=True)
    (folder,) = Path(config.storage.path).glob("quickstart-*")
    dump = folder / "skipped-steps" / f"step-{last_step:06d}-rank-0"
    ids = [image["image_id"] for image in json.loads((dump / "step.json").read_text())["images"]]
    assert f"step {last_step}: " in str(caught.value)
    assert f"images {', '.join(map(str, ids))}" in str(caught.value)
    assert str(dump) in str(caught.value)
    assert f"optim.max_skipped_steps is {limit}" in str(caught.value)
    assert len(list((folder / "skipped-steps").iterdir())) == limit + 1
    assert [event["kind"] for event in read_events(folder)].count("failed") == 1


def test_a_resumed_run_with_skipped_steps_ends_in_the_same_bits(
    tiny_run: RunConfig, nan_positions: set[int]
) -> None:
    nan_positions |= {8, 56}  # one in each epoch
    config = override(tiny_run, {"optim.epochs": 2})
    unbroken, broken = run.start(config, local=True), run.start(config, local=True)
    broken.checkpoint.rename(broken.folder / "gone")
    resumed = run.resume(broken.folder, local=True)
    states = [torch.load(r.checkpoint / "state.pt", weights_only=True) for r in (resumed, unbroken)]
    assert [state["skipped_steps"] for state in states] == [2, 2]
    assert same(*(torch.utils._pytree.tree_leaves(state) for state in states))


# --- mixed precision ---


def test_bf16_learns_and_keeps_its_weights_in_float32(small_run: RunConfig) -> None:
    config = override(small_run, {"optim.precision": "bf16", "optim.clip_max_norm": None})
    training, batch = make_training(config), next(batches_of(config))
    losses = [training.train_step(batch) for _ in range(12)]
    assert all(isinstance(terms, dict) for terms in losses)
    assert losses[-1]["loss_bbox"] < 0.8 * losses[0]["loss_bbox"]
    assert {term.dtype for term in losses[0].values()} == {torch.float32}
    dtypes = {p.dtype for p in training.detector.parameters()}
    assert dtypes == {torch.float32}


def test_bf16_steps_stay_near_those_of_float32(small_run: RunConfig) -> None:
    """The first step sees the same weights; rounding changes which encoder tokens become queries."""
    terms = []
    for precision in ("fp32", "bf16"):
        config = override(small_run, {"optim.precision": precision})
        terms.append(make_training(config).train_step(next(batches_of(config))))
    exact, rounded = terms
    assert exact["loss"] != rounded["loss"]  # bf16 was in use
    for name in ("loss", "loss_bbox", "loss_giou", "loss_ce"):
        assert rounded[name].item() == pytest.approx(exact[name].item(), rel=0.1), name


def test_fp16_overflow_lowers_the_scale_without_a_cause_and_the_scale_is_checkpointed(
    small_run: RunConfig, tmp_path: Path
) -> None:
    """Runs refuse float16 on a CPU, where it is slow; the loop is the same."""
    config = override(
        small_run,
        {"optim.precision": "fp16", "optim.warmup_fraction": 0.0, "optim.lr": 1e-3, "data.batch_size": 2},
    )
    training, batch = make_training(config), next(batches_of(config))
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)  # too much for a gradient in float16
    before = state_of(training)
    skipped = training.train_step(batch)
    assert isinstance(skipped, SkippedStep)
    assert (skipped.causes, training.skipped_steps) == ((), 0)
    assert training.scaler.get_scale() == 2.0**17
    assert same(state_of(training), before)
    outcomes = [training.train_step(batch) for _ in range(10)]
    losses = [outcome["loss"] for outcome in outcomes if isinstance(outcome, dict)]
    assert losses[-1] < 0.9 * losses[0]
    # A NaN in the data has a cause, and does not change the scale
    scale = training.scaler.get_scale()
    assert training.train_step(add_nan_to_boxes(batch)).causes
    assert (training.scaler.get_scale(), training.skipped_steps) == (scale, 1)
    shards = open_splits(config.data)[0]
    checkpoint.write(tmp_path / "saved", *checkpoint.capture(training, shards))
    resumed = make_training(config)
    checkpoint.restore(tmp_path / "saved", resumed, shards)
    assert (resumed.scaler.get_scale(), resumed.skipped_steps) == (scale, 1)


def test_a_gradient_that_no_scale_helps_is_counted(small_run: RunConfig) -> None:
    config = override(small_run, {"optim.precision": "fp16"})
    training, batch = make_training(config), next(batches_of(config))
    training.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    weight = training.detector.decoder.class_heads[0].weight
    handle = weight.register_hook(lambda gradient: gradient * torch.nan)
    skipped = training.train_step(batch)
    handle.remove()
    assert isinstance(skipped, SkippedStep)
    assert [cause.reason for cause in skipped.causes] == [
        "the loss is finite, but not the gradient of all workers"
    ]
    assert training.skipped_steps == 1


def test_fp16_without_a_gpu_is_refused(tiny_run: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"optim\.precision=fp16 is for GPUs.*bf16"):
        resolve(override(tiny_run, {"optim.precision": "fp16"}))
