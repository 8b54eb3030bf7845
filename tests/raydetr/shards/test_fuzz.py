"""A thousand random corruptions: each leaves every sample unchanged, or is reported with file, shard and key."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corruptions import (
    CORRUPTIONS,
    Corruption,
    exchange_two_members,
    flip_bits_in_a_shard,
    fresh_copy,
    samples_of,
    wrongly_written_image,
    wrongly_written_json,
)
from made_coco import write_coco
from raydetr.config import TransformConfig
from raydetr.data.layout import Layout
from raydetr.data.stream import train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.shards.reader import ShardError, open_shards
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source

NUM_CORRUPTIONS = 1100
MAX_SECONDS = 5.0  # per corruption, which takes 10 ms on an idle machine
NUM_SAMPLES = 9
IN_SAMPLES = [flip_bits_in_a_shard, exchange_two_members, wrongly_written_image, wrongly_written_json]
NUM_IN_PROCESSES = 4
Content = dict[int, tuple[Any, ...]]  # of each image id


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine samples in three shards."""
    root = tmp_path_factory.mktemp("fuzz")
    write_source(
        coco_source(*write_coco(root / "coco", NUM_SAMPLES, seed=3)), root / "shards", samples_per_shard=3
    )
    return root / "shards"


def everything(folder: Path, num_workers: int = 0) -> Content:
    """Return all that training and evaluation read from a folder of shards."""
    shards = open_shards(folder)
    stream = train_batches(
        shards, seed=0, position=0, layout=Layout(shards.num_samples),
        transform=Transform(TransformConfig()), num_workers=num_workers,
    )  # fmt: skip
    batch = next(stream)
    stream.close()
    coco = shards.coco()
    content: Content = {}
    ends = np.cumsum(batch.counts)
    for i, image_id in enumerate(batch.image_ids.tolist()):
        height, width = batch.sizes[i].tolist()
        objects = slice(ends[i] - batch.counts[i], ends[i])
        assert image_id not in content
        content[image_id] = (
            batch.pixels[i, :, :height, :width].numpy().tobytes(),
            batch.original_sizes[i].tolist(),
            batch.labels[objects].tolist(),
            batch.boxes[objects].tolist(),
            [record for record in coco["images"] if record["id"] == image_id],
            [record for record in coco["annotations"] if record["image_id"] == image_id],
            coco["categories"],
        )
    return content


def corrupt_keys(original: Path, folder: Path) -> set[str]:
    """Return the keys of the samples whose bytes, index rows or manifest entries are not the original ones."""
    before, after, valid = samples_of(original), samples_of(folder), open_shards(original)
    names = sorted(path.name for path in original.glob("*.tar"))
    keys = {int(row["image_id"]): valid.key(number) for number, row in enumerate(before)}
    ids = set()
    for number, row in enumerate(before):
        part = slice(int(row["offset"]), int(row["offset"]) + int(row["length"]))
        contents = [(path / names[row["shard"]]).read_bytes()[part] for path in (original, folder)]
        if number >= len(after) or after[number] != row or contents[0] != contents[1]:
            ids |= {int(row["image_id"]), *after["image_id"][number : number + 1].tolist()}
    return {keys.get(image_id, f"{image_id:012d}") for image_id in ids}


def outcome(original: Path, folder: Path, expected: Content, num_workers: int = 0) -> str:
    """Return the effect of a corruption; fail if it is neither harmless nor reported correctly."""
    try:
        assert everything(folder, num_workers) == expected
    except ValueError as error:  # nothing else may be raised
        message, is_sample = str(error), isinstance(error, ShardError)
    else:
        return "harmless"
    assert str(folder) in message
    if not is_sample:
        assert any(name in message for name in ("manifest.json", "index.npz", ".tar"))
        assert any(remedy in message for remedy in ("write the shards again", "write them with"))
        return "folder"
    (shard,) = {path.name for path in original.glob("*.tar") if path.name in message}
    (key,) = {key for key in corrupt_keys(original, folder) if f"sample {key} at byte" in message}
    assert f"{folder / shard}: sample {key}" in message
    return "sample"


def corruptions(numbers: range) -> Iterator[tuple[Corruption, np.random.Generator]]:
    for i in numbers:
        yield CORRUPTIONS[i % len(CORRUPTIONS)], np.random.default_rng(i)


def ends_of(original: Path, folder: Path, numbers: range) -> dict[str, Counter[str]]:
    """Count the outcomes of each kind of corruption."""
    expected = everything(original)
    assert len(expected) == NUM_SAMPLES
    seen: dict[str, Counter[str]] = {}
    for i, (corrupt, rng) in zip(numbers, corruptions(numbers), strict=True):
        fresh_copy(original, folder)
        corrupt(folder, rng)
        began = time.monotonic()
        try:
            found = outcome(original, folder, expected)
        except BaseException as error:
            error.add_note(f"corruption {i}: {corrupt.__name__}")
            raise
        assert time.monotonic() - began < MAX_SECONDS, (i, corrupt.__name__)
        seen.setdefault(corrupt.__name__, Counter())[found] += 1
    return seen


@pytest.mark.filterwarnings("ignore:Reading .*Python 2:UserWarning")  # a bit in the version of an npz
def test_corruptions_are_harmless_or_reported(original: Path, tmp_path: Path) -> None:
    seen = ends_of(original, tmp_path / "copy", range(NUM_CORRUPTIONS))
    # The corruptions do corrupt, and all three outcomes occur.
    total = sum(seen.values(), Counter[str]())
    assert total["sample"] > NUM_CORRUPTIONS / 4
    assert total["folder"] > NUM_CORRUPTIONS / 4
    assert total["harmless"] > 5
    for name in ("wrongly_written_json", "wrongly_written_image", "exchange_two_members"):
        assert set(seen[name]) == {"sample"}, (name, seen[name])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:Reading .*Python 2:UserWarning")
def test_more_corruptions(original: Path, tmp_path: Path) -> None:
    assert ends_of(original, tmp_path / "copy", range(10_000, 13_000))


def test_corruptions_do_not_kill_loader_processes(original: Path, tmp_path: Path) -> None:
    expected = everything(original)
    ends = Counter[str]()
    for number in range(NUM_IN_PROCESSES):
        folder = fresh_copy(original, tmp_path / "copy")
        IN_SAMPLES[number % len(IN_SAMPLES)](folder, np.random.default_rng(number))
        ends[outcome(original, folder, expected, num_workers=2)] += 1
    assert ends["sample"] >= NUM_IN_PROCESSES // 2
