from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raydetr.config import TransformConfig
from raydetr.data.batch import Batch
from raydetr.data.layout import Layout
from raydetr.data.stream import evaluation_batches, make_order, train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.shards.reader import ShardError, Shards, open_shards

TRANSFORM = Transform(TransformConfig(short_sides=(24, 32, 40), max_side=64, horizontal_flip=0.5))


def batches(
    shards: Shards,
    position: int,
    rank: int,
    world_size: int,
    batch_size: int,
    workers: int = 0,
    seed: int = 5,
) -> Iterator[Batch]:
    return train_batches(
        shards,
        seed=seed,
        position=position,
        layout=Layout(world_size * batch_size, world_size),
        rank=rank,
        transform=TRANSFORM,
        num_workers=workers,
    )


def take(
    shards: Shards, position: int, steps: int, world_size: int, batch_size: int, workers: int = 0
) -> dict[int, tuple[int, bytes, bytes]]:
    """Return the content of each position of the run: image id, pixels, boxes."""
    found = {}
    for rank in range(world_size):
        stream = batches(shards, position, rank, world_size, batch_size, workers)
        for step, batch in enumerate(itertools.islice(stream, steps)):
            assert batch.position == position + step * world_size * batch_size
            for slot, content in enumerate(contents(batch)):
                found[batch.position + rank * batch_size + slot] = content
        stream.close()
    return found


def contents(batch: Batch) -> Iterator[tuple[int, bytes, bytes]]:
    ends = np.cumsum(batch.counts)
    for i, (height, width) in enumerate(batch.sizes.tolist()):
        objects = slice(ends[i] - batch.counts[i], ends[i])
        targets = batch.boxes[objects].numpy().tobytes() + batch.labels[objects].numpy().tobytes()
        yield (
            batch.image_ids[i].item(),
            batch.pixels[i, :, :height, :width].contiguous().numpy().tobytes(),
            targets,
        )


@pytest.mark.parametrize(
    ("world_size", "workers", "batch_size"),
    [(2, 0, 2), (4, 2, 2), (3, 0, 2), (1, 2, 4), (5, 2, 1), (1, 0, 60)],
)
def test_one_stream_for_all_ranks_workers_and_batches(
    shards: Shards, world_size: int, workers: int, batch_size: int
) -> None:
    steps = 120 // (world_size * batch_size)
    reference = take(shards, 0, 120, 1, 1)
    assert take(shards, 0, steps, world_size, batch_size, workers) == {
        position: content
        for position, content in reference.items()
        if position < steps * world_size * batch_size
    }
    ids = [reference[position][0] for position in range(106)]
    everything = sorted(shards.samples["image_id"].tolist())
    assert sorted(ids[:53]) == sorted(ids[53:]) == everything
    assert ids[:53] != ids[53:]


def test_a_run_resumes_with_another_topology(shards: Shards) -> None:
    reference = take(shards, 0, 100, 1, 1)
    first = take(shards, 0, 5, 4, 2)
    then = take(shards, 40, 10, 3, 2, workers=1)
    assert {**first, **then} == reference


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3),
)
def test_any_topologies_one_after_another_give_one_run(
    shards: Shards, position: int, topologies: list[tuple[int, int, int]]
) -> None:
    """For any ranks, images per rank and steps: the same pixels and boxes at the same positions."""
    found, at = {}, position
    for world_size, batch_size, steps in topologies:
        found |= take(shards, at, steps, world_size, batch_size)
        at += steps * world_size * batch_size
    assert found == take(shards, position, at - position, 1, 1)


def test_all_ranks_share_one_scale_per_step(shards: Shards) -> None:
    transform = Transform(TransformConfig(short_sides=tuple(range(24, 48)), max_side=500, scale_per="step"))
    streams = [
        train_batches(
            shards, seed=0, position=3, layout=Layout(6, 3), rank=rank, transform=transform,
            num_workers=rank % 2,
        )
        for rank in range(3)
    ]  # fmt: skip
    drawn = []
    for _ in range(12):
        sizes = torch.cat([next(stream).sizes for stream in streams])
        assert len(sizes.amin(1).unique()) == 1
        drawn.append(sizes.min().item())
    assert len(set(drawn)) > 4


def test_late_positions_start_at_once(shards: Shards) -> None:
    far = 100_000 * shards.num_samples + 17
    batch = next(batches(shards, far, 1, 2, 3))
    expected = shards.samples["image_id"][make_order(shards, 5).order(100_000)[20:23]]
    assert batch.position == far
    assert batch.image_ids.tolist() == expected.tolist()


def test_a_world_may_be_larger_than_the_data(shards: Shards) -> None:
    few = shards.head(3)
    found = take(few, 0, 3, 4, 2)
    assert len(found) == 24
    ids = [found[position][0] for position in range(24)]
    for epoch in range(8):
        assert sorted(ids[epoch * 3 : epoch * 3 + 3]) == sorted(few.samples["image_id"].tolist())


def test_another_seed_gives_another_order_and_other_augmentation(shards: Shards) -> None:
    one, other = (next(batches(shards, 0, 0, 1, 53, seed=seed)) for seed in (0, 1))
    assert one.image_ids.tolist() != other.image_ids.tolist()
    sizes = [dict(zip(b.image_ids.tolist(), b.sizes.tolist(), strict=True)) for b in (one, other)]
    assert sizes[0] != sizes[1]


@pytest.mark.parametrize(
    ("world_size", "workers", "batch_size"), [(1, 0, 8), (3, 0, 8), (4, 2, 8), (9, 0, 8)]
)
def test_evaluation_shows_every_image_once_in_fixed_batches(
    shards: Shards, world_size: int, workers: int, batch_size: int
) -> None:
    ranks = [
        list(
            evaluation_batches(
                shards,
                rank=rank,
                world_size=world_size,
                batch_size=batch_size,
                transform=Transform(TransformConfig(short_sides=(32,))),
                num_workers=workers,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    in_turn = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    present = [batch for batch in in_turn if batch is not None]
    assert in_turn[len(present) :] == [None] * (len(in_turn) - len(present))
    assert [batch.image_ids.tolist() for batch in present] == [
        shards.samples["image_id"][start : start + 8].tolist() for start in range(0, 53, 8)
    ]


def test_loading_does_not_change_the_global_random_state(shards: Shards) -> None:
    state = torch.get_rng_state()
    for workers in (0, 1):
        take(shards, 0, 2, 1, 2, workers)
    assert torch.equal(torch.get_rng_state(), state)


def test_loader_processes_end_with_the_stream(shards: Shards) -> None:
    take(shards, 0, 2, 1, 2, 1)  # a fork server that this starts stays
    before = set(psutil.Process().children(recursive=True))
    stream = batches(shards, 0, 0, 1, 2, workers=2)
    next(stream)
    children = [child for child in psutil.Process().children(recursive=True) if child not in before]
    assert len(children) == 2
    stream.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_sample_stops_the_stream_and_is_named(shards: Shards, tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(shards.path, folder)
    row = shards.samples[33]
    path = folder / shards.manifest.shards[row["shard"]].name
    content = bytearray(path.read_bytes())
    content[int(row["offset"]) + 700] ^= 16
    path.write_bytes(content)
    seen: list[int] = []
    place = f"{path.name}: sample {row['image_id']:012d} at byte {row['offset']} is corrupt"
    with pytest.raises(ShardError, match=place):
        seen.extend(batch.image_ids.item() for batch in batches(open_shards(folder), 0, 0, 1, 1, workers))
    assert row["image_id"] not in seen
    expected = shards.samples["image_id"][make_order(shards, 5).order(0)].tolist()
    assert seen == expected[: len(seen)]


def test_an_undecodable_image_with_a_matching_crc_is_named(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = dataclasses.replace(shards.read(0), image=b"no image")
    monkeypatch.setattr("raydetr.shards.reader.parse_sample", lambda *_: sample)
    with pytest.raises(ShardError, match="is corrupt: its image cannot be decoded"):
        next(batches(shards, 0, 0, 1, 1))
