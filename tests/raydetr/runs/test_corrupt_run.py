"""Corrupt samples in training: they add no gradient, all of them are logged, too many stop the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import small_models
from corrupt_shards import corrupt_sample
from detrs import zoo
from raydetr.config import ConfigError, RunConfig, from_dict, override, to_dict
from raydetr.data.batch import Batch, blank_batch, collate, to_model
from raydetr.data.corrupt import CorruptSample, CorruptSampleLog, TooManyCorruptError
from raydetr.data.layout import Layout
from raydetr.data.samples import load_sample
from raydetr.data.splits import open_splits
from raydetr.data.stream import make_order, train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.runs import run
from raydetr.runs.evaluate import evaluate_checkpoint
from raydetr.shards.reader import ShardError, open_shards
from raydetr.tracking.events import Metrics, read_events
from raydetr.training import checkpoint
from raydetr.training.loop import Training
from raydetr.training.world import World

CORRUPT = (4, 17, 40)  # training images of the tiny data
CORRUPT_VAL = (3, 11)


@pytest.fixture
def corrupt_run(tiny_run: RunConfig, tmp_path: Path) -> RunConfig:
    """Two epochs on copies of the tiny data with three corrupt training images and two corrupt validation images."""
    for split, indices in (("train", CORRUPT), ("val", CORRUPT_VAL)):
        folder = Path(str(getattr(tiny_run.data, split)))
        shards = open_shards(shutil.copytree(folder, tmp_path / split))
        for index in indices:
            corrupt_sample(shards, index)
    return override(
        tiny_run,
        {"data.train": str(tmp_path / "train"), "data.val": str(tmp_path / "val"), "optim.epochs": 2},
    )


# --- gradients ---


def gradients(training: Training, batch: Batch) -> dict[str, Tensor]:
    """The gradients of a step, without the update."""
    kept: dict[str, Tensor] = {}

    def keep() -> None:
        for name, parameter in training.detector.named_parameters():
            assert parameter.grad is not None, name
            kept[name] = parameter.grad.clone()

    training._update = keep  # type: ignore[method-assign]
    assert isinstance(training.train_step(batch), dict)
    return kept


def make_training(config: RunConfig, world: World | None = None) -> Training:
    torch.manual_seed(0)
    training = Training(config, zoo.build(config.model), 48, world or World.single_process())
    training.detector.train()
    return training


def masked_batch(config: RunConfig, rank: int = 0, size: int = 1, position: int = 0) -> Batch:
    return next(
        train_batches(
            open_splits(config.data)[0], seed=0, position=position,
            layout=Layout(config.data.batch_size, size), rank=rank, transform=Transform(config.data.train_transform),
            on_corrupt="mask",
        )
    )  # fmt: skip


def batch_without(config: RunConfig, corrupt: set[int], position: int = 0) -> Batch:
    """The batch of the valid images, built without the loader."""
    shards, order = open_splits(config.data)[0], make_order(open_splits(config.data)[0], 0)
    indices = order.samples(position, config.data.batch_size).tolist()
    transform = Transform(config.data.train_transform)
    samples = [
        load_sample(shards, index, transform, seed=0, position=position + slot)
        for slot, index in enumerate(indices)
        if index not in corrupt
    ]
    assert 0 < len(samples) < config.data.batch_size
    return collate(samples, position)


def first_corrupt_step(config: RunConfig) -> int:
    order = make_order(open_splits(config.data)[0], 0).order(0).tolist()
    return min(order.index(index) for index in CORRUPT) // config.data.batch_size * config.data.batch_size


@pytest.mark.parametrize("name", ["detr", "dab", "dino_quickstart", "deformable_two_stage"])
def test_the_gradient_is_that_of_the_batch_without_the_image(corrupt_run: RunConfig, name: str) -> None:
    config = override(corrupt_run, {"optim.clip_max_norm": None, "model.num_classes": 4})
    config = config.model_copy(update={"model": small_models.CONFIGS[name]})
    position = first_corrupt_step(config)
    masked = masked_batch(config, position=position)
    assert masked.corrupt
    assert not masked.is_blank
    expected = batch_without(config, set(CORRUPT), position)
    found = gradients(make_training(config), masked)
    # Computed here, without the loop
    training = make_training(config)
    torch.manual_seed(training.random_seed(expected.positions[0]))
    images, targets = to_model(expected, "cpu")
    draws = None
    if training.detector.denoising is not None:
        seeds = [training.random_seed(position) for position in expected.positions]
        draws = training.detector.denoising.draw_by_image(targets.counts, max(targets.counts), seeds)
    outputs = training.detector(images, targets, draws)
    losses = training.criterion(outputs, targets, float(len(targets.labels)))
    losses.total.backward()
    for key, parameter in training.detector.named_parameters():
        assert torch.equal(found[key], parameter.grad), key


def test_a_false_background_would_show(corrupt_run: RunConfig) -> None:
    """Otherwise the test above could not fail: an image without its objects has another gradient."""
    config = override(corrupt_run, {"optim.clip_max_norm": None, "model.num_classes": 4})
    batch = batch_without(config, set(CORRUPT), first_corrupt_step(config))
    blank = blank_batch(batch.position)
    grown = collate_with_blank(batch, blank)
    without, with_blank = (gradients(make_training(config), each) for each in (batch, grown))
    assert any((without[key] - with_blank[key]).abs().max() > 1e-4 for key in without)


def collate_with_blank(batch: Batch, blank: Batch) -> Batch:
    height, width = batch.pixels.shape[-2:]
    pixels = torch.cat([batch.pixels, blank.pixels[:, :, :height, :width]])
    size = torch.tensor([[height, width]])
    return Batch(
        pixels, torch.cat([batch.sizes, size]), batch.labels, batch.boxes, (*batch.counts, 0),
        torch.cat([batch.image_ids, blank.image_ids]), torch.cat([batch.original_sizes, size]),
        batch.position, positions=(*batch.positions, batch.position),
    )  # fmt: skip


@pytest.mark.parametrize("name", small_models.CONFIGS)
def test_a_blank_batch_has_no_gradient(tiny_run: RunConfig, name: str) -> None:
    config = tiny_run.model_copy(update={"model": small_models.CONFIGS[name]})
    training = make_training(config)
    before = [buffer.clone() for buffer in training.detector.buffers()]
    kept = gradients(training, blank_batch(0))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in kept.values())
    assert all(torch.equal(a, b) for a, b in zip(before, training.detector.buffers(), strict=True))
    assert training.position == config.data.batch_size


# --- two processes ---


def two_workers(rank: int, size: int, values: dict[str, Any], folder: str) -> None:
    """The second worker has no image in its first step, and one image less in its second step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    try:
        config = from_dict(values)
        training = make_training(config, World(rank, size, torch.device("cpu")))
        steps, rows = [], []
        for position in (0, 8):
            batch = masked_batch(config, rank, size, position)
            assert batch.is_blank == ((position, rank) == (0, 1))
            steps.append(gradients(training, batch))
            rows.append([(row.position, row.key) for row in training.corrupt])
        torch.save({"steps": steps, "rows": rows}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.timeout(200)
def test_a_worker_without_images_takes_part(tiny_run: RunConfig, tmp_path: Path) -> None:
    shards = open_shards(shutil.copytree(Path(str(tiny_run.data.train)), tmp_path / "train"))
    config = override(
        tiny_run,
        {
            "data.train": str(tmp_path / "train"), "optim.clip_max_norm": None,
            # Disable what depends on how a batch is split: batch statistics and denoising draws
            "model.num_classes": 4, "model.backbone.norm": "frozen", "model.num_denoising": 0,
        },
    )  # fmt: skip
    order = make_order(shards, 0).order(0).tolist()
    corrupt = [*order[4:8], order[13]]
    keys = [corrupt_sample(shards, index)[1] for index in corrupt]
    mp.spawn(two_workers, args=(2, to_dict(config), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    # Each worker has the corrupt samples of all workers, in order
    expected = [[(4 + i, keys[i]) for i in range(4)], [(13, keys[4])]]
    assert first["rows"] == second["rows"] == expected
    for step, position in enumerate((0, 8)):
        training = make_training(config)
        training.position = position
        single = gradients(training, batch_without(config, set(corrupt), position))
        for name, gradient in single.items():
            assert torch.equal(first["steps"][step][name], second["steps"][step][name]), name
            torch.testing.assert_close(first["steps"][step][name], gradient, rtol=1e-3, atol=1e-5)


# --- complete runs ---


def with_policy(config: RunConfig, policy: str, **more: Any) -> RunConfig:
    return override(config, {"data.on_corrupt": policy, **more})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "corrupt_samples.jsonl").read_text().splitlines()]


def expected_rows(config: RunConfig, action: str) -> list[tuple[Any, ...]]:
    """Computed from the order: the training images of an epoch, then those of its evaluation."""
    train, val = open_splits(config.data)
    rows: list[tuple[Any, ...]] = []
    for epoch in range(config.optim.epochs):
        order = make_order(train, config.seed).order(epoch).tolist()
        rows += sorted((epoch * 48 + order.index(i), str(train.path), train.key(i), action) for i in CORRUPT)
        rows += [((epoch + 1) * 48, str(val.path), val.key(i), "not predicted") for i in CORRUPT_VAL]
    return rows


@pytest.mark.parametrize(
    ("policy", "action", "loaders"), [("substitute", "substituted", 0), ("mask", "masked", 2)]
)
def test_a_run_continues_and_logs_corrupt_samples(
    corrupt_run: RunConfig, policy: str, action: str, loaders: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_policy(corrupt_run, policy, **{"data.num_loader_workers": loaders})
    result = run.start(config, local=True)
    rows = rows_of(result.folder)
    assert [
        (r["position"], str(Path(r["shard"]).parent), r["key"], r["action"]) for r in rows
    ] == expected_rows(config, action)
    assert all("crc32" in row["reason"] and row["offset"] % 512 == 0 for row in rows)
    assert result.metrics["corrupt_samples"] == 5  # those of the second epoch are the same as in the first
    assert result.metrics["unpredicted_images"] == 2
    logged = [row for row in Metrics(read_events(result.folder)).rows if "corrupt_samples" in row]
    assert logged[-1]["corrupt_samples"] == 5
    assert CorruptSampleLog.from_dicts(rows).rows == state_of(result.checkpoint)
    errors = capsys.readouterr().err
    assert "warning: corrupt: " in errors
    assert "corrupt 5" in errors
    text = result.to_text()
    assert "2 corrupt validation images have no predictions" in text
    assert f"5 samples were corrupt; {result.folder}/corrupt_samples.jsonl lists them" in text
    # The ground truth still has the objects of the corrupt images
    again = evaluate_checkpoint(result.checkpoint, None, local=True)
    assert again["AP"] == result.metrics["AP"]
    assert "2 corrupt validation images have no predictions" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_does_not_end_a_run(
    corrupt_run: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CorruptSampleLog, "write", fail)
    result = run.start(with_policy(corrupt_run, "mask"), local=True)
    assert result.metrics["corrupt_samples"] == 5
    assert len(state_of(result.checkpoint)) == len(expected_rows(with_policy(corrupt_run, "mask"), "masked"))
    err = " ".join(capsys.readouterr().err.split())
    assert "corrupt_samples.jsonl cannot be written: [Errno 28] No space left on device" in err


def state_of(folder: Path) -> list[CorruptSample]:
    """Those of the training, and those of the evaluation at this checkpoint."""
    rows = torch.load(folder / "state.pt", weights_only=True)["corrupt_samples"]
    return CorruptSampleLog.from_dicts([*rows, *checkpoint.read_metrics(folder)["corrupt_rows"]]).rows


def test_by_default_the_first_corrupt_sample_stops_a_run(corrupt_run: RunConfig) -> None:
    shards = open_splits(corrupt_run.data)[0]
    order = make_order(shards, 0).order(0).tolist()
    first = next(index for index in order if index in CORRUPT)
    with pytest.raises(ShardError, match=rf"{shards.path}/shard-\d+.tar: sample {shards.key(first)} at byte"):
        run.start(corrupt_run, local=True)
    (folder,) = Path(corrupt_run.storage.path).glob("quickstart-*")
    assert not (folder / "corrupt_samples.jsonl").exists()


def test_a_resumed_run_keeps_the_corrupt_log(corrupt_run: RunConfig) -> None:
    config = with_policy(corrupt_run, "substitute")
    unbroken = run.start(config, local=True)
    corrupt_log = (unbroken.folder / "corrupt_samples.jsonl").read_text()
    shutil.rmtree(unbroken.checkpoint)
    with (unbroken.folder / "corrupt_samples.jsonl").open("a") as file:
        file.write('{"cut o')  # as after a kill
    resumed = run.resume(unbroken.folder, local=True)
    assert (resumed.folder / "corrupt_samples.jsonl").read_text() == corrupt_log
    assert resumed.metrics["corrupt_samples"] == 5
    assert state_of(resumed.checkpoint) == CorruptSampleLog.from_dicts(rows_of(unbroken.folder)).rows


@pytest.mark.parametrize(("limit", "last"), [(0, 1), (3, 4)])
def test_too_many_stop_the_run(corrupt_run: RunConfig, limit: int, last: int) -> None:
    config = with_policy(corrupt_run, "mask", **{"data.max_corrupt": limit})
    with pytest.raises(TooManyCorruptError) as caught:
        run.start(config, local=True)
    (folder,) = Path(config.storage.path).glob("quickstart-*")
    rows = rows_of(folder)
    assert len({row["key"] for row in rows}) > limit
    message = str(caught.value)
    assert f"and data.max_corrupt allows {limit}; {folder}/corrupt_samples.jsonl lists them" in message
    assert all(f"{row['shard']}: sample {row['key']} at byte {row['offset']}" in message for row in rows)
    assert "Copy these shards again" in message
    assert [event["kind"] for event in read_events(folder)].count("failed") == 1
    assert len(rows) >= last


def test_a_limit_without_effect_is_refused(corrupt_run: RunConfig) -> None:
    with pytest.raises(ConfigError, match="data: max_corrupt 3 has no effect with on_corrupt=raise"):
        override(corrupt_run, {"data.max_corrupt": 3})


def test_unreadable_records_are_reported(corrupt_run: RunConfig) -> None:
    shards = open_splits(corrupt_run.data)[1]
    row = shards.samples[7]
    path = shards.path / f"shard-{row['shard']:05d}.tar"
    content = bytearray(path.read_bytes())
    begin = int(row["offset"]) + int(row["json_offset"])
    content[begin : begin + int(row["json_length"])] = bytes(int(row["json_length"]))
    path.write_bytes(content)
    result = run.start(with_policy(corrupt_run, "mask", **{"optim.epochs": 1}), local=True)
    assert (result.metrics["unpredicted_images"], result.metrics["unreadable_records"]) == (3, 1)
    assert "the annotations of 1 of them cannot be read" in result.to_text()
