"""Verify every byte of a folder of shards, and that its parts are consistent: `raydetr shards check`."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from raydetr.process_pool import Advance, Progress, run_tasks
from raydetr.shards.coco import Problems
from raydetr.shards.files import LocalFolder
from raydetr.shards.images import check_image
from raydetr.shards.manifest import MANIFEST, Manifest, label_maps
from raydetr.shards.reader import ShardError, Shards, load_shards
from raydetr.shards.tar_samples import tar_samples
from raydetr.shards.validation import InvalidDataError

Part = tuple[int, Shards]  # the number of a shard, and the shards with only its samples


def check_shards(folder: Path, *, workers: int = 1, progress: Progress | None = None) -> Manifest:
    """Check size and sha256 of every shard, crc32, key, records and image of every sample, and tars against index.

    Args:
        folder: local folder of the shards.
        workers: number of processes.
        progress: called with (images checked, total images).

    Raises:
        ValueError: there are problems; the message counts them and lists the first ten with shard and key.
    """
    shards = load_shards(LocalFolder(folder))
    manifest = shards.manifest
    problems = Problems(folder, "problem")
    _check_folder(folder, manifest, problems)
    bounds = np.searchsorted(shards.samples["shard"], np.arange(len(manifest.shards) + 1))
    parts = [replace(shards, samples=shards.samples[begin:end]) for begin, end in pairwise(bounds)]
    ids: list[int] = []
    workers, total = min(workers, len(parts)), shards.num_samples
    checked = run_tasks(check_shard, enumerate(parts), workers=workers, progress=progress, total=total)
    with closing(checked) as results:
        for found, annotation_ids in results:
            problems.add_all(found)
            ids += annotation_ids
    if len(set(ids)) < len(ids):
        problems.add(f"{len(ids) - len(set(ids))} annotations repeat the id of another one")
    problems.raise_if_any()
    return manifest


def check_shard(part: Part, advance: Advance) -> tuple[Problems, list[int]]:
    """Check one shard and its samples; return its problems and the ids of its annotations."""
    number, shards = part
    path = shards.path / shards.manifest.shards[number].name
    problems = Problems(path.name, "problem")
    annotation_ids: list[int] = []
    if not path.is_file():
        problems.add("is missing: copy it again")
        advance(shards.num_samples)
        return problems, annotation_ids
    _check_bytes(path, part, problems)
    _check_members(path, part, problems)
    for index in range(shards.num_samples):
        try:
            raw, row = shards.read(index), shards.samples[index]
            annotation_ids += [annotation["id"] for annotation in raw.annotations]
            check_image(raw.image, (int(row["width"]), int(row["height"])))
        except ShardError as error:
            problems.add(f"sample {error.key} at byte {error.offset}: {error.reason}")
        except ValueError as error:
            problems.add(f"sample {shards.key(index)}: its image: {error}")
        advance(1)
    return problems, annotation_ids


def _check_folder(folder: Path, manifest: Manifest, problems: Problems) -> None:
    extra = {path.name for path in folder.glob("*.tar")} - {shard.name for shard in manifest.shards}
    for name in sorted(extra):
        problems.add(f"{name} is not in {MANIFEST}: remove it, or write the shards again")
    if manifest.label_maps != label_maps([category["id"] for category in manifest.categories]):
        problems.add(f"{MANIFEST}: its label maps do not match its categories: write the shards again")


def _check_bytes(path: Path, part: Part, problems: Problems) -> None:
    number, shards = part
    file = shards.manifest.shards[number]
    size = path.stat().st_size
    if size != file.size:
        problems.add(f"has {size} bytes instead of {file.size}: copy it again")
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != file.sha256:
        problems.add(f"its sha256 is {digest[:12]}..., the manifest has {file.sha256[:12]}...: copy it again")


def _check_members(path: Path, part: Part, problems: Problems) -> None:
    """Check that the tar holds exactly the samples of the index, at the offsets in the index."""
    number, shards = part
    index = 0
    try:
        for sample in tar_samples(path):
            if index == shards.num_samples:
                problems.add(f"sample {sample.key} is not in the index")
                return
            found = (sample.key, number, *sample.place())
            if found != (shards.key(index), *shards.samples[index].item()[:7]):
                problems.add(
                    f"sample {sample.key} at byte {sample.begin}: the index has sample {shards.key(index)} "
                    f"at byte {shards.samples['offset'][index]} there, with other members"
                )
                return
            index += 1
    except InvalidDataError as error:
        problems.add(str(error))
        return
    if index < shards.num_samples:
        problems.add(f"sample {shards.key(index)} is in the index but not in the tar")
