"""A thousand random corruptions: each leaves every sample as it was, or is reported with file, shard and key."""

from __future__ import annotations

import io
import json
import tarfile
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
from raydetr.data.stream import train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.shards.reader import ShardError, open_shards
from raydetr.shards.third_party.index import index_folder
from raydetr.shards.writer import write_shards

NUM_CORRUPTIONS = 1100
MOST_SECONDS = 5.0  # of one, which takes 10 ms alone
NUM_FOREIGN = 300
NUM_SAMPLES = 9
IN_SAMPLES = [flip_bits_in_a_shard, exchange_two_members, wrongly_written_image, wrongly_written_json]
NUM_IN_PROCESSES = 4
Content = dict[int, tuple[Any, ...]]  # of each image id


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine samples in three shards."""
    root = tmp_path_factory.mktemp("fuzz")
    write_shards(*write_coco(root / "coco", NUM_SAMPLES, seed=3), root / "shards", samples_per_shard=3)
    return root / "shards"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples as somebody else packed them, with an index of ours."""
    root = tmp_path_factory.mktemp("foreign")
    images, annotations = write_coco(root / "coco", NUM_SAMPLES, seed=3)
    data = json.loads(annotations.read_text())
    names = {record["id"]: record["name"] for record in data["categories"]}
    (root / "shards").mkdir()
    for number in range(3):
        with tarfile.open(root / "shards" / f"shard-0000{number}.tar", "w") as tar:
            for image in data["images"][number::3]:
                own = [a for a in data["annotations"] if a["image_id"] == image["id"]]
                objects = [{"bbox": a["bbox"], "category": names[a["category_id"]]} for a in own]
                path = images / image["file_name"]
                for suffix, content in (
                    (path.suffix, path.read_bytes()),
                    (".json", json.dumps({"objects": objects}).encode()),
                ):
                    member = tarfile.TarInfo(f"photo-{image['id']}{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    index_folder(root / "shards", box_format="xywh")
    return root / "shards"


def everything(folder: Path, num_workers: int = 0) -> Content:
    """All that training and evaluation get from a folder of shards."""
    shards = open_shards(folder)
    stream = train_batches(
        shards, seed=0, position=0, rank=0, world_size=1, batch_size=shards.num_samples,
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


def damaged_keys(original: Path, folder: Path) -> set[str]:
    """Keys of the samples whose bytes, rows in the index or lines in the manifest are not the original ones."""
    texts = [(path / "manifest.json").read_bytes() for path in (original, folder)]
    foreign = [json.loads(text).get("foreign") for text in texts]
    if foreign[0] != foreign[1]:  # the keys themselves, and what all records are
        return {*foreign[0]["keys"], *foreign[1]["keys"]}
    before, after, sound = samples_of(original), samples_of(folder), open_shards(original)
    names = sorted(path.name for path in original.glob("*.tar"))
    keys = {int(row["image_id"]): sound.key(number) for number, row in enumerate(before)}
    ids = set()
    for number, row in enumerate(before):
        part = slice(int(row["offset"]), int(row["offset"]) + int(row["length"]))
        contents = [(path / names[row["shard"]]).read_bytes()[part] for path in (original, folder)]
        if number >= len(after) or after[number] != row or contents[0] != contents[1]:
            ids |= {int(row["image_id"]), *after["image_id"][number : number + 1].tolist()}
    return {keys.get(image_id, f"{image_id:012d}") for image_id in ids}


def outcome(original: Path, folder: Path, whole: Content, num_workers: int = 0) -> str:
    """What became of a corruption; fails where it is neither harmless nor reported as it must be."""
    try:
        assert everything(folder, num_workers) == whole
    except ValueError as error:  # nothing else may be raised
        said, is_sample = str(error), isinstance(error, ShardError)
    else:
        return "harmless"
    assert str(folder) in said
    if not is_sample:
        assert any(name in said for name in ("manifest.json", "index.npz", ".tar"))
        assert any(remedy in said for remedy in ("write the shards again", "write them with", "index them"))
        return "folder"
    (shard,) = {path.name for path in original.glob("*.tar") if path.name in said}
    (key,) = {key for key in damaged_keys(original, folder) if f"sample {key} at byte" in said}
    assert f"{folder / shard}: sample {key}" in said
    return "sample"


def corruptions(numbers: range) -> Iterator[tuple[Corruption, np.random.Generator]]:
    for i in numbers:
        yield CORRUPTIONS[i % len(CORRUPTIONS)], np.random.default_rng(i)


def ends_of(original: Path, folder: Path, numbers: range) -> dict[str, Counter[str]]:
    """How often each kind of corruption ended how."""
    whole = everything(original)
    assert len(whole) == NUM_SAMPLES
    seen: dict[str, Counter[str]] = {}
    for i, (corrupt, rng) in zip(numbers, corruptions(numbers), strict=True):
        fresh_copy(original, folder)
        corrupt(folder, rng)
        began = time.monotonic()
        try:
            what = outcome(original, folder, whole)
        except BaseException as error:
            error.add_note(f"corruption {i}: {corrupt.__name__}")
            raise
        assert time.monotonic() - began < MOST_SECONDS, (i, corrupt.__name__)
        seen.setdefault(corrupt.__name__, Counter())[what] += 1
    return seen


@pytest.mark.filterwarnings("ignore:Reading .*Python 2:UserWarning")  # a bit in the version of an npz
def test_corruptions_are_harmless_or_reported(original: Path, tmp_path: Path) -> None:
    seen = ends_of(original, tmp_path / "copy", range(NUM_CORRUPTIONS))
    # the corruptions do corrupt, and all three ends are met
    total = sum(seen.values(), Counter[str]())
    assert total["sample"] > NUM_CORRUPTIONS / 4
    assert total["folder"] > NUM_CORRUPTIONS / 4
    assert total["harmless"] > 5
    for name in ("wrongly_written_json", "wrongly_written_image", "exchange_two_members"):
        assert set(seen[name]) == {"sample"}, (name, seen[name])


@pytest.mark.filterwarnings("ignore:Reading .*Python 2:UserWarning")
def test_corruptions_of_shards_that_others_wrote(foreign: Path, tmp_path: Path) -> None:
    seen = ends_of(foreign, tmp_path / "copy", range(NUM_FOREIGN))
    total = sum(seen.values(), Counter[str]())
    assert total["sample"] > NUM_FOREIGN / 4
    assert total["folder"] > NUM_FOREIGN / 4


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:Reading .*Python 2:UserWarning")
def test_more_corruptions(original: Path, foreign: Path, tmp_path: Path) -> None:
    for folder in (original, foreign):
        assert ends_of(folder, tmp_path / "copy", range(10_000, 13_000))


def test_corruptions_do_not_kill_loader_processes(original: Path, tmp_path: Path) -> None:
    whole = everything(original)
    ends = Counter[str]()
    for number in range(NUM_IN_PROCESSES):
        folder = fresh_copy(original, tmp_path / "copy")
        IN_SAMPLES[number % len(IN_SAMPLES)](folder, np.random.default_rng(number))
        ends[outcome(original, folder, whole, num_workers=2)] += 1
    assert ends["sample"] >= NUM_IN_PROCESSES // 2
