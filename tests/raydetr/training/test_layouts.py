"""Test that a step does not depend on how its global batch is divided, for the models of all papers, in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import small_models
from detrs import zoo
from raydetr.config import ConfigError, RunConfig, from_dict, override, to_dict
from raydetr.data.batch import Batch, Sample, blank_batch, collate, to_model
from raydetr.data.layout import Layout
from raydetr.data.transforms.pixels import LazyImage
from raydetr.training.loop import Training
from raydetr.training.world import World
from tiny_runs import tiny_config

pytestmark = pytest.mark.xdist_group("layouts")  # the processes of two workers start once

ARCHITECTURES = ("detr", "conditional", "dab", "deformable_refine", "deformable_two_stage", "dino")
# Boxes per image; two global batches of six, and one with a different maximum in each half
COUNTS = ((3, 0, 1, 5, 0, 2), (0, 0, 0, 12, 1, 1), (0, 0, 0, 0, 0, 0))
STEPS = len(COUNTS)
BATCH = len(COUNTS[0])
SIZE = (32, 64)


def sample(position: int) -> Sample:
    """An image with its boxes; all have one size, so that none is padded differently in a smaller batch."""
    rng = np.random.default_rng(position)
    count = COUNTS[position // BATCH][position % BATCH]
    corners = rng.uniform([2, 2], [30, 15], (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 15, (count, 2))], axis=1)
    pixels = rng.integers(0, 256, (*SIZE, 3), np.uint8)
    labels = rng.integers(0, 4, count)
    return Sample(LazyImage.unresized(pixels), labels, boxes, position, SIZE, position)


def micro_batches(layout: Layout, rank: int, start: int) -> list[Batch]:
    parts = [[sample(start + place) for place in part] for part in layout.micro_batches(rank)]
    return [collate(part, start) if part else blank_batch(start) for part in parts]


def make_training(config: RunConfig, name: str, world: World, norm: str) -> Training:
    made = small_models.CONFIGS[name]
    backbone = dataclasses.replace(made.backbone, norm=norm)
    config = config.model_copy(update={"model": dataclasses.replace(made, backbone=backbone)})
    torch.manual_seed(0)
    model = zoo.build(config.model)
    model.detector.double()
    model.detector.register_forward_pre_hook(to_double)
    return Training(config, model, num_samples=100, world=world)


def to_double(_: object, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Compute with float64, also the noise of the target boxes: float32 depends on a number's place in a vector."""
    images, targets, *others = inputs
    images = dataclasses.replace(images, pixels=images.pixels.double())
    return images, dataclasses.replace(targets, boxes=targets.boxes.double()), *others


def take_steps(config: RunConfig, name: str, layout: Layout, world: World, norm: str) -> dict[str, Any]:
    """Return the losses of some steps, and the state of the model after them."""
    training = make_training(config, name, world, norm)
    training.detector.train()
    losses = []
    for step in range(STEPS):
        terms = training.train_step(*micro_batches(layout, world.rank, step * BATCH))
        assert isinstance(terms, dict), terms
        losses.append({key: value for key, value in mean_terms(training, terms).items() if "loss" in key})
    return {"losses": losses, "state": {k: v.clone() for k, v in training.detector.state_dict().items()}}


def mean_terms(training: Training, terms: dict[str, torch.Tensor]) -> dict[str, float]:
    """Like `Training.mean_terms`, which logs in float32."""
    stacked = torch.stack([term.detach().double() for term in terms.values()])
    means = training.world.all_reduce_async(stacked).wait() / training.world.size
    return dict(zip(terms, means.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how its steps are taken."""

    name: str
    layout: Layout
    norm: str = "frozen"
    bf16_gradients: bool = False


def take_steps_of(case: Case, config: RunConfig, world: World) -> dict[str, Any]:
    changes = {"num_workers": world.size, "bf16_gradients": case.bf16_gradients}
    cluster = config.cluster.model_copy(update=changes)
    config = config.model_copy(update={"cluster": cluster})
    return take_steps(config, case.name, case.layout, world, case.norm)


def worker(rank: int, values: dict[str, Any], cases: list[Case], folder: str) -> None:
    torch.set_num_threads(1)
    size = cases[0].layout.world_size
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    try:
        world = World(rank, size, torch.device("cpu"))
        found = [take_steps_of(case, from_dict(values), world) for case in cases]
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def steps_of_workers(config: RunConfig, cases: list[Case], folder: Path) -> dict[Case, list[dict[str, Any]]]:
    """Take the steps of all cases, which have the same number of workers; return those of each worker."""
    size = cases[0].layout.world_size
    mp.spawn(worker, args=(to_dict(config), cases, str(folder)), nprocs=size)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]
    return dict(zip(cases, map(list, zip(*found, strict=True)), strict=True))


@pytest.fixture(scope="module")
def config(tiny_data: Path) -> RunConfig:
    config = tiny_config(tiny_data, Path("unused"))
    data = config.data.model_copy(update={"batch_size": BATCH})
    return config.model_copy(update={"data": data})


TWO = Layout(BATCH, 2)
OF_TWO_WORKERS = {
    "frozen": [
        Case(name, layout) for layout in (TWO, Layout(BATCH, 2, micro_batch=1)) for name in ARCHITECTURES
    ],
    # One dense and one deformable model: their backbones have the same batch norms
    "batch": [Case(name, TWO, norm="batch") for name in ("detr", "dino")],
    "bf16": [Case("detr", TWO, bf16_gradients=True)],
}


@pytest.fixture(scope="module")
def two_workers(
    config: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[Case, list[dict[str, Any]]]:
    cases = [case for kind in OF_TWO_WORKERS.values() for case in kind]
    return steps_of_workers(config, cases, tmp_path_factory.mktemp("workers"))


def assert_same(found: dict[str, Any], expected: dict[str, Any], case: object) -> None:
    for step, (one, other) in enumerate(zip(found["losses"], expected["losses"], strict=True)):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert value == pytest.approx(other[key], rel=1e-9, abs=1e-12), (case, step, key)
    for key, value in found["state"].items():
        torch.testing.assert_close(value, expected["state"][key], rtol=1e-9, atol=1e-9, msg=f"{case} {key}")


@pytest.fixture(scope="module")
def single_process() -> dict[str, Any]:
    return {}


def expected_steps(cache: dict[str, Any], config: RunConfig, name: str) -> dict[str, Any]:
    if name not in cache:
        cache[name] = take_steps(config, name, Layout(BATCH), World.single_process(), "frozen")
    return cache[name]


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_accumulation_is_the_same_training(
    name: str, micro_batch: int, config: RunConfig, single_process: dict[str, Any]
) -> None:
    expected = expected_steps(single_process, config, name)
    layout = Layout(BATCH, micro_batch=micro_batch)
    found = take_steps(config, name, layout, World.single_process(), "frozen")
    assert_same(found, expected, (name, layout))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", OF_TWO_WORKERS["frozen"], ids=str)
def test_two_workers_are_the_same_training(
    case: Case,
    config: RunConfig,
    two_workers: dict[Case, list[dict[str, Any]]],
    single_process: dict[str, Any],
) -> None:
    for found in two_workers[case]:
        assert_same(found, expected_steps(single_process, config, case.name), case)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "layouts",
    [
        [Layout(BATCH, 4), Layout(BATCH, 4, micro_batch=1)],  # shares of 1 and 2 images
        [Layout(BATCH, 8)],  # more workers than images
    ],
)
def test_more_workers_are_the_same_training(
    layouts: list[Layout], config: RunConfig, tmp_path: Path, single_process: dict[str, Any]
) -> None:
    size = layouts[0].world_size
    has_none = any(not part for rank in range(size) for part in layouts[0].micro_batches(rank))
    assert has_none == (size > BATCH)
    cases = [Case(name, layout) for layout in layouts for name in ARCHITECTURES]
    for case, found in steps_of_workers(config, cases, tmp_path).items():
        for one in found:
            assert_same(one, expected_steps(single_process, config, case.name), case)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", OF_TWO_WORKERS["batch"], ids=str)
def test_trained_batch_norms_are_synchronized(
    case: Case, config: RunConfig, two_workers: dict[Case, list[dict[str, Any]]]
) -> None:
    """Also their running statistics are those of one process with all images."""
    expected = take_steps(config, case.name, Layout(BATCH), World.single_process(), "batch")
    assert any("running_mean" in key for key in expected["state"])
    for found in two_workers[case]:
        assert_same(found, expected, case)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activation_checkpointing_is_the_same_training(
    name: str, config: RunConfig, single_process: dict[str, Any]
) -> None:
    optim = config.optim.model_copy(update={"activation_checkpointing": True})
    recomputing = config.model_copy(update={"optim": optim})
    found = take_steps(recomputing, name, Layout(BATCH), World.single_process(), "frozen")
    assert_same(found, expected_steps(single_process, config, name), name)


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_activation_checkpointing_keeps_fewer_tensors(norm: str, config: RunConfig) -> None:
    kept = []
    for recompute in (False, True):
        training = make_training(config, "dino", World.single_process(), norm)
        if recompute:
            training.detector.enable_activation_checkpointing()
        numbers = []

        def count(tensor: torch.Tensor, numbers: list[int] = numbers) -> torch.Tensor:
            numbers.append(tensor.numel())
            return tensor

        training.detector.train()
        (batch,) = micro_batches(Layout(BATCH), 0, 0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            training.detector(*to_model(batch, "cpu"))
        kept.append(sum(numbers))
    assert kept[1] < 0.8 * kept[0]


def test_every_sample_of_a_step_belongs_to_one_worker() -> None:
    for global_batch in range(1, 20):
        for world_size in range(1, 24):
            for micro_batch in (None, 1, 2, 3, 7):
                layout = Layout(global_batch, world_size, micro_batch)
                shares = [layout.micro_batches(rank) for rank in range(world_size)]
                assert {len(parts) for parts in shares} == {layout.num_micro_batches}
                places = [place for parts in shares for part in parts for place in part]
                assert places == list(range(global_batch))
                sizes = [sum(map(len, parts)) for parts in shares]
                assert max(sizes) - min(sizes) <= 1
                if micro_batch is not None:
                    assert max(len(part) for parts in shares for part in parts) <= micro_batch


@pytest.mark.timeout(300)
def test_gradients_in_bfloat16_are_rounded_and_the_same_on_all_workers(
    config: RunConfig, two_workers: dict[Case, list[dict[str, Any]]], single_process: dict[str, Any]
) -> None:
    (case,) = OF_TWO_WORKERS["bf16"]
    first, second = two_workers[case]
    exact = expected_steps(single_process, config, "detr")
    assert first["losses"][0]["loss"] == pytest.approx(exact["losses"][0]["loss"], rel=1e-9)
    for step in (1, 2):
        assert first["losses"][step]["loss"] == pytest.approx(exact["losses"][step]["loss"], rel=0.02)
        assert first["losses"][step]["loss"] != pytest.approx(exact["losses"][step]["loss"], rel=1e-7)
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key


def test_settings_of_a_cluster_without_effect_are_refused(tiny_run: RunConfig) -> None:
    with pytest.raises(ConfigError, match="bf16_gradients has no effect with num_workers 1"):
        override(tiny_run, {"cluster.bf16_gradients": True})
    with pytest.raises(ConfigError, match="deterministic has no effect without use_gpu"):
        override(tiny_run, {"cluster.deterministic": True})
    with pytest.raises(ConfigError, match="min_workers 2 has no effect with num_workers 2"):
        override(tiny_run, {"cluster.num_workers": 2, "cluster.min_workers": 2})
    with pytest.raises(ConfigError, match="micro_batch_size 8 has no effect with batch_size 8"):
        override(tiny_run, {"data.micro_batch_size": 8})
