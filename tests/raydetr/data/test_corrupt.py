"""Test what replaces corrupt samples, and how they are reported."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corrupt_shards import corrupt_sample
from raydetr.config import TransformConfig
from raydetr.data.batch import Batch, collate
from raydetr.data.corrupt import CorruptSample, OnCorrupt
from raydetr.data.layout import Layout
from raydetr.data.samples import load_sample
from raydetr.data.stream import evaluation_batches, make_order, train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.shards.files import LocalFiles, Span
from raydetr.shards.reader import ShardError, Shards, open_shards
from raydetr.shards.validation import InvalidDataError, RawSample

SEED = 5
TRANSFORM = Transform(TransformConfig(short_sides=(24, 32, 40), max_side=64, horizontal_flip=0.5))
CORRUPT = (33, 7, 8)  # indices; one image, two JSON records
TOPOLOGIES = [(1, 0, 4), (2, 2, 2), (1, 0, 53), (3, 0, 1)]  # ranks, loader processes, samples per rank
Found = dict[int, tuple[int, bytes, bytes]]  # position -> image id, pixels, targets


@pytest.fixture
def corrupt(shards: Shards, tmp_path: Path) -> Shards:
    """Copy the 53 samples and corrupt three of them."""
    copy = open_shards(shutil.copytree(shards.path, tmp_path / "copy"))
    for index in CORRUPT:
        corrupt_sample(copy, index, part="image" if index == 33 else "json")
    return copy


def stream(
    shards: Shards,
    policy: OnCorrupt,
    rank: int,
    topology: tuple[int, int, int],
    position: int = 0,
    transform: Transform = TRANSFORM,
) -> Iterator[Batch]:
    world_size, workers, batch_size = topology
    return train_batches(
        shards, seed=SEED, position=position, layout=Layout(world_size * batch_size, world_size), rank=rank,
        transform=transform, num_workers=workers, on_corrupt=policy,
    )  # fmt: skip


def take(
    shards: Shards,
    policy: OnCorrupt,
    topology: tuple[int, int, int],
    num_samples: int,
    position: int = 0,
    transform: Transform = TRANSFORM,
) -> tuple[Found, list[CorruptSample]]:
    """Return the content of the positions of a run, without masked ones, and all rows, in order."""
    world_size, _, batch_size = topology
    steps = -(-num_samples // (world_size * batch_size))
    found: Found = {}
    rows: list[CorruptSample] = []
    for rank in range(world_size):
        batches = stream(shards, policy, rank, topology, position, transform)
        for batch in itertools.islice(batches, steps):
            own = batch.position + rank * batch_size
            masked = {row.position for row in batch.corrupt if row.action == "masked"}
            left = [place for place in range(own, own + batch_size) if place not in masked]
            assert batch.is_blank == (not left)
            rows += batch.corrupt
            found |= zip(left, () if batch.is_blank else contents(batch), strict=True)
        batches.close()
    end = position + num_samples
    in_order = sorted((row for row in rows if row.position < end), key=lambda row: row.position)
    return {place: content for place, content in found.items() if place < end}, in_order


def contents(batch: Batch) -> Iterator[tuple[int, bytes, bytes]]:
    ends = np.cumsum(batch.counts)
    for i, (height, width) in enumerate(batch.sizes.tolist()):
        objects = slice(ends[i] - batch.counts[i], ends[i])
        targets = batch.boxes[objects].numpy().tobytes() + batch.labels[objects].numpy().tobytes()
        pixels = batch.pixels[i, :, :height, :width].contiguous().numpy().tobytes()
        yield batch.image_ids[i].item(), pixels, targets


def expected_rows(shards: Shards, action: str, num_epochs: int) -> list[tuple[Any, ...]]:
    """Derive the rows from the order of each epoch and the index."""
    rows = []
    for epoch in range(num_epochs):
        order = make_order(shards, SEED).order(epoch).tolist()
        for index in CORRUPT:
            row = shards.samples[index]
            shard = str(shards.path / f"shard-{row['shard']:05d}.tar")
            place = epoch * len(order) + order.index(index)
            rows.append((place, shard, f"{row['image_id']:012d}", int(row["offset"]), action))
    return sorted(rows)


def short(rows: list[CorruptSample]) -> list[tuple[Any, ...]]:
    return [(row.position, row.shard, row.key, row.offset, row.action) for row in rows]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_masked_samples_are_missing_and_all_others_are_unchanged(
    shards: Shards, corrupt: Shards, topology: tuple[int, int, int]
) -> None:
    intact, none = take(shards, "mask", topology, 106)
    found, rows = take(corrupt, "mask", topology, 106)
    assert none == []
    assert short(rows) == expected_rows(corrupt, "masked", 2)
    masked = {row.position for row in rows}
    assert len(masked) == 6
    assert found == {place: content for place, content in intact.items() if place not in masked}
    assert all("crc32" in row.reason for row in rows)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_previous_sample_is_the_substitute(
    shards: Shards, corrupt: Shards, topology: tuple[int, int, int]
) -> None:
    intact, _ = take(shards, "raise", topology, 106)
    found, rows = take(corrupt, "substitute", topology, 106)
    assert short(rows) == expected_rows(corrupt, "substituted", 2)
    wrong = {row.position for row in rows}
    assert {place: found[place] for place in found.keys() - wrong} == {
        place: intact[place] for place in intact.keys() - wrong
    }
    for place in wrong:
        epoch, i = divmod(place, 53)
        order = make_order(shards, SEED).order(epoch).tolist()
        before = (order[(i - back) % 53] for back in range(1, 53))
        index = next(index for index in before if index not in CORRUPT)
        assert found[place][0] == shards.samples["image_id"][index]
        assert found[place] == content_of(shards, index, place)  # with this position's augmentation


def content_of(shards: Shards, index: int, position: int) -> tuple[int, bytes, bytes]:
    sample = load_sample(shards, index, TRANSFORM, seed=SEED, position=position)
    return next(contents(collate([sample], position)))


@pytest.mark.parametrize("policy", ["mask", "substitute"])
def test_a_resumed_stream_gives_the_same_samples_and_rows(corrupt: Shards, policy: OnCorrupt) -> None:
    found, rows = take(corrupt, policy, (1, 0, 4), 104)
    resumed, then = take(corrupt, policy, (2, 0, 2), 52, position=52)
    assert resumed == {place: content for place, content in found.items() if place >= 52}
    assert then == [row for row in rows if row.position >= 52]


@pytest.mark.parametrize("workers", [0, 2])
def test_raise_names_shard_and_key(corrupt: Shards, workers: int) -> None:
    row = corrupt.samples[33]
    first = make_order(corrupt, SEED).order(0).tolist().index(33)
    with pytest.raises(
        ShardError, match=rf"shard-00002.tar: sample {row['image_id']:012d} at byte"
    ) as caught:
        next(stream(corrupt, "raise", 0, (1, workers, 1), position=first))
    assert caught.value.key == f"{row['image_id']:012d}"
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("policy", ["mask", "substitute"])
def test_mosaics_with_a_corrupt_image_are_replaced_too(
    shards: Shards, corrupt: Shards, policy: OnCorrupt
) -> None:
    mosaics = Transform(TRANSFORM.config.model_copy(update={"mosaic_probability": 1.0}))
    intact, _ = take(shards, policy, (1, 0, 4), 53, transform=mosaics)
    found, rows = take(corrupt, policy, (1, 0, 4), 53, transform=mosaics)
    assert (found, rows) == take(corrupt, policy, (2, 2, 2), 53, transform=mosaics)
    # A mosaic has four images: about four times as many are affected, and each row names the corrupt image
    assert 6 < len(rows) < 20
    assert {row.key for row in rows} == {shards.key(index) for index in CORRUPT}
    hit = {row.position for row in rows}
    assert all(found[place] == intact[place] for place in intact.keys() - hit)
    assert hit.isdisjoint(found) if policy == "mask" else hit <= found.keys()


class Flaky(LocalFiles):
    """Files that return wrong bytes on the first read, as a cache or a network may."""

    def __init__(self, files: LocalFiles) -> None:
        super().__init__(files.paths)
        self.num_rereads = 0

    def start(self, spans: Sequence[Span]) -> Callable[[], list[bytes | OSError]]:
        """Return a wrong last byte for each sample."""
        return lambda: [self.read(*span)[:-1] + b"!" for span in spans]

    def reread(self, shard: int, offset: int, length: int) -> bytes:
        """Count the calls."""
        self.num_rereads += 1
        return super().reread(shard, offset, length)


@pytest.mark.parametrize("policy", ["raise", "mask", "substitute"])
def test_a_second_read_past_the_cache_suffices(shards: Shards, policy: OnCorrupt) -> None:
    assert isinstance(shards.files, LocalFiles)
    files = Flaky(shards.files)
    flaky = dataclasses.replace(shards, files=files)
    assert take(flaky, policy, (1, 0, 4), 12) == take(shards, policy, (1, 0, 4), 12)
    assert files.num_rereads == 12


def test_the_search_ends_when_all_samples_are_corrupt(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> RawSample:
        raise InvalidDataError("it is broken")

    monkeypatch.setattr("raydetr.shards.reader.parse_sample", broken)
    with pytest.raises(ShardError, match=r"it is broken.*none of the 52 samples before it can replace it"):
        next(stream(shards, "substitute", 0, (1, 0, 4)))
    batch = next(stream(shards, "mask", 0, (1, 0, 4)))
    assert batch.is_blank
    assert [row.position for row in batch.corrupt] == [0, 1, 2, 3]
    assert (len(batch.labels), batch.counts, int(batch.pixels.sum())) == (0, (0,), 0)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2)])
@pytest.mark.parametrize("policy", ["mask", "substitute"])
def test_evaluation_omits_corrupt_images(
    shards: Shards, corrupt: Shards, policy: OnCorrupt, world_size: int, workers: int
) -> None:
    ids: list[int] = []
    rows: list[CorruptSample] = []
    numbers = set()
    for rank in range(world_size):
        batches = list(
            evaluation_batches(
                corrupt,
                rank=rank,
                world_size=world_size,
                batch_size=1,
                transform=Transform(TransformConfig()),
                num_workers=workers,
                on_corrupt=policy,
            )
        )
        numbers.add(len(batches))
        for batch in batches:
            if batch is not None:
                ids += [] if batch.is_blank else batch.image_ids.tolist()
                rows += batch.corrupt
    assert len(numbers) == 1
    everything = set(shards.samples["image_id"].tolist())
    assert sorted(ids) == sorted(everything - {int(shards.samples["image_id"][index]) for index in CORRUPT})
    assert sorted(row.key for row in rows) == sorted(shards.key(index) for index in CORRUPT)
