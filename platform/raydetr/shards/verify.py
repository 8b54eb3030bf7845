"""Verify every byte of a folder of shards, and that its parts are consistent: `raydetr shards check`."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from raydetr.process_pool import Advance, Progress, run_tasks
from raydetr.shards.coco import MAX_REPORTED, Problems
from raydetr.shards.files import LocalFiles, LocalFolder
from raydetr.shards.images import check_image
from raydetr.shards.manifest import MANIFEST, Manifest, label_maps, make_label_map
from raydetr.shards.reader import ShardError, Shards, load_header
from raydetr.shards.tar_samples import TarSample, padded_end, tar_samples
from raydetr.shards.validation import InvalidDataError


@dataclass(frozen=True)
class CheckTask:
    """A shard to check, and the range of its samples in the index."""

    folder: Path
    number: int
    start: int
    stop: int


@dataclass
class ShardProblems:
    """The problems of a shard, and the ids of its annotations."""

    name: str
    annotation_ids: list[int] = field(default_factory=list)
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)  # the first ones

    def add(self, problem: str) -> None:
        """Count a problem; keep the first messages."""
        self.num_problems += 1
        if self.num_problems <= MAX_REPORTED:
            self.problems.append(f"{self.name}: {problem}")


def check_shards(folder: Path, *, workers: int = 1, progress: Progress | None = None) -> Manifest:
    """Check size and sha256 of every shard, crc32, key, records and image of every sample, and tars against index.

    Args:
        folder: local folder of the shards.
        workers: number of processes.
        progress: called with (images checked, total images).

    Raises:
        ValueError: there are problems; the message counts them and lists the first ten with shard and key.
    """
    manifest, samples = load_header(LocalFolder(folder), str(folder), reads=1)
    problems = Problems(folder, "problem")
    _check_folder(folder, manifest, problems)
    total = manifest.num_samples
    advance = (lambda done: progress(done, total)) if progress else None
    bounds = np.searchsorted(samples["shard"], np.arange(len(manifest.shards) + 1)).tolist()
    tasks = [
        CheckTask(folder, number, *bounds[number : number + 2]) for number in range(len(manifest.shards))
    ]
    ids: list[int] = []
    with closing(
        run_tasks(check_shard, tasks, workers=min(workers, len(tasks)), progress=advance)
    ) as results:
        for found in results:
            problems.add_many(found.problems, found.num_problems)
            ids += found.annotation_ids
    if len(set(ids)) < len(ids):
        problems.add(f"{len(ids) - len(set(ids))} annotations repeat the id of another one")
    problems.raise_if_any()
    return manifest


def check_shard(task: CheckTask, advance: Advance) -> ShardProblems:
    """Check one shard and its samples."""
    shards = _open_unchecked(task.folder)
    file = shards.manifest.shards[task.number]
    found = ShardProblems(file.name)
    path = task.folder / file.name
    if not path.is_file():
        found.add("is missing: copy it again")
        advance(task.stop - task.start)
        return found
    _check_bytes(path, shards, task.number, found)
    _check_members(path, shards, task, found)
    for index in range(task.start, task.stop):
        try:
            _check_sample(shards, index, found)
        except ShardError as error:
            found.add(f"sample {error.key} at byte {error.offset}: {error.reason}")
        except ValueError as error:
            found.add(f"sample {shards.key(index)}: {error}")
        advance(1)
    return found


def _check_folder(folder: Path, manifest: Manifest, problems: Problems) -> None:
    extra = {path.name for path in folder.glob("*.tar")} - {shard.name for shard in manifest.shards}
    for name in sorted(extra):
        problems.add(f"{name} is not in {MANIFEST}: remove it, or write the shards again")
    if manifest.label_maps != label_maps([category["id"] for category in manifest.categories]):
        problems.add(f"{MANIFEST}: its label maps do not match its categories: write the shards again")


def _open_unchecked(folder: Path) -> Shards:
    """Open the shards even if files are missing or have another size."""
    manifest, samples = load_header(LocalFolder(folder), str(folder), reads=1)
    files = LocalFiles([folder / shard.name for shard in manifest.shards])
    labels = make_label_map(manifest.categories, "contiguous")
    return Shards(str(folder), manifest, samples, labels, manifest.fingerprint, files)


def _check_bytes(path: Path, shards: Shards, number: int, found: ShardProblems) -> None:
    file = shards.manifest.shards[number]
    size = path.stat().st_size
    if size != file.size:
        found.add(f"has {size} bytes instead of {file.size}: copy it again")
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != file.sha256:
        found.add(f"its sha256 is {digest[:12]}..., the manifest has {file.sha256[:12]}...: copy it again")


def _check_members(path: Path, shards: Shards, task: CheckTask, found: ShardProblems) -> None:
    """Check that the tar holds exactly the samples of the index, at the offsets in the index."""
    index = task.start
    try:
        for sample in tar_samples(path):
            if index == task.stop:
                found.add(f"sample {sample.key} is not in the index")
                return
            if _place(sample, task.number) != tuple(
                shards.samples[index].item()[:7]
            ) or sample.key != shards.key(index):
                found.add(
                    f"sample {sample.key} at byte {sample.begin}: the index has sample {shards.key(index)} "
                    f"at byte {shards.samples['offset'][index]} there, with other members"
                )
                return
            index += 1
    except InvalidDataError as error:
        found.add(str(error))
        return
    if index < task.stop:
        found.add(f"sample {shards.key(index)} is in the index but not in the tar")


def _place(sample: TarSample, shard: int) -> tuple[int, ...]:
    """Return the first fields that a sample's row in the index must have."""
    members = [sample.members[extension] for extension in sorted(sample.members, key="json".__eq__)]
    begin = min(member.offset for member in members)
    length = max(padded_end(member) for member in members) - begin
    parts = [value for member in members for value in (member.offset_data - begin, member.size)]
    return (shard, begin, length, *parts)


def _check_sample(shards: Shards, index: int, found: ShardProblems) -> None:
    raw = shards.read(index)
    row = shards.samples[index]
    try:
        check_image(raw.image, (int(row["width"]), int(row["height"])))
    except ValueError as error:
        raise ValueError(f"its image: {error}") from None
    found.annotation_ids += [annotation["id"] for annotation in raw.annotations]
