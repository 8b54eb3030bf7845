"""Write a data set as WebDataset shards: plain tars, an index of their samples and a manifest.

A sample is the original image file (`jpg` or `png`) and `json` = {"image": ..., "annotations": [...]}, COCO's
records. The same input gives the same bytes, with any number of processes and after any number of interruptions. The
index is read back from the finished tars.

An interrupted run can be resumed: a shard is finished when its record, `<name>.json`, lies next to it. The record
holds the sha256 of the shard and a digest of the input, so a corrupt shard, or one with other input, is rewritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from webdataset.writer import TarWriter

from raydetr.process_pool import Advance, Progress, run_tasks
from raydetr.shards.coco import Problems, Record, unusual_kinds, usable_boxes
from raydetr.shards.images import MAX_DARK, ImageError, ImageHeader, check_image
from raydetr.shards.manifest import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    SAMPLE_DTYPE,
    Manifest,
    Samples,
    ShardFile,
    data_fingerprint,
    label_maps,
    sample_key,
)
from raydetr.shards.source import ImageFile, Source
from raydetr.shards.tar_samples import tar_samples
from raydetr.store.output_folder import publish, resumable_folder, write_atomically

SKIPPED = "skipped_images.txt"
UNUSUAL = {
    "rotated": "images have an EXIF orientation, which is not applied: boxes refer to stored pixels",
    "dark": "images have 16 bits per pixel and use at most 12 of them: they are nearly black, at most "
    f"{MAX_DARK} of 255, until their pixels are multiplied by 16",
}
MAX_LISTED = 100  # each image has to be repaired by itself

OnCorruptImage = Literal["raise", "skip"]


@dataclass(frozen=True)
class ShardTask:
    """The content of one shard to write."""

    number: int
    path: Path  # of the tar file
    samples: list[tuple[ImageFile, Record, list[Record]]]  # image, its record and those of its objects
    on_corrupt: OnCorruptImage

    @property
    def record_path(self) -> Path:
        """Path of the record whose existence means that the shard is finished."""
        return self.path.with_name(f"{self.path.name}.json")


@dataclass
class Counts:
    """What was found in the images of a shard and in their annotations."""

    usable_objects: Counter[str] = field(default_factory=Counter)  # per category id
    unusual_objects: Counter[str] = field(default_factory=Counter)  # per kind
    unusual_images: Counter[str] = field(default_factory=Counter)  # per kind
    skipped: list[str] = field(default_factory=list)  # corrupt images, with the reasons


@dataclass
class PackedShard:
    """A finished shard, or the problems of its input."""

    counts: Counts = field(default_factory=Counts)
    problems: list[str] = field(default_factory=list)
    file: ShardFile | None = None  # None: problems, or all of its images were skipped
    samples: Samples = field(default_factory=lambda: np.empty(0, SAMPLE_DTYPE))
    reused: bool = False  # it was finished by an earlier run


def pack_shard(task: ShardTask, advance: Advance) -> PackedShard:
    """Write the shard of a task, unless it is finished. An invalid image does not stop the checks of the others.

    Raises:
        OSError: it cannot be written.
    """
    texts = [_sample_text(record, objects) for _, record, objects in task.samples]
    digest = _input_digest(task, texts)
    finished = _finished_shard(task, digest)
    if finished is not None:
        advance(len(texts))
        return finished
    temporary = task.path.with_name(f"{task.path.name}.{os.getpid()}.tmp")
    packed = _write_tar(task, texts, temporary, advance)
    if packed.problems or len(packed.counts.skipped) == len(texts):
        temporary.unlink()
        return packed
    temporary.rename(task.path)
    packed.file = _shard_file(task, packed.counts)
    packed.samples = index_shard(task.path, task.number)
    state = {"input": digest, "shard": asdict(packed.file), "counts": vars(packed.counts)}
    write_atomically(task.record_path, json.dumps(state, allow_nan=False).encode())
    return packed


def index_shard(path: Path, number: int) -> Samples:
    """Build the index rows of a finished tar file from its bytes on disk; `number` is that of the shard."""
    rows = []
    with path.open("rb") as file:
        for sample in tar_samples(path):
            begin, length, _, _, json_at, json_length = place = sample.place()
            file.seek(begin)
            raw = file.read(length)
            content = json.loads(raw[json_at : json_at + json_length])
            image, count = content["image"], len(content["annotations"])
            sizes = (image["width"], image["height"], count)
            rows.append((number, *place, *sizes, image["id"], zlib.crc32(raw)))
    return np.array(rows, dtype=SAMPLE_DTYPE)


def _sample_text(record: Record, annotations: list[Record]) -> bytes:
    content = {"image": record, "annotations": annotations}
    try:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:
        raise ValueError(
            f"image id {record['id']}: a number in its records is too large: correct it"
        ) from None


def _input_digest(task: ShardTask, texts: list[bytes]) -> str:
    """Hash all that the shard's bytes depend on; image files by size and modification time."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {len(texts)}\n".encode())
    for (file, _, _), text in zip(task.samples, texts, strict=True):
        digest.update(f"{len(text)} {file.state()}\n".encode() + text)
    return digest.hexdigest()


def _finished_shard(task: ShardTask, digest: str) -> PackedShard | None:
    try:
        state = json.loads(task.record_path.read_bytes())
        counts = Counts(**state["counts"])
        is_current = state["input"] == digest and state["shard"] == asdict(_shard_file(task, counts))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing or corrupt, or the record of another version
    if not is_current or (counts.skipped and task.on_corrupt != "skip"):
        return None
    samples = index_shard(task.path, task.number)
    return PackedShard(counts, [], ShardFile(**state["shard"]), samples, reused=True)


def _write_tar(task: ShardTask, texts: list[bytes], path: Path, advance: Advance) -> PackedShard:
    """Write the tar; return its counts and problems."""
    packed = PackedShard()
    counts = packed.counts
    with path.open("wb") as file:
        with TarWriter(file, mtime=0, encoder=False) as writer:
            for (image, record, objects), text in zip(task.samples, texts, strict=True):
                advance(1)
                try:
                    content, header = _read_image(image, record)
                except ValueError as error:
                    is_skipped = isinstance(error, ImageError) and task.on_corrupt == "skip"
                    (counts.skipped if is_skipped else packed.problems).append(str(error))
                    continue
                counts.unusual_images.update(rotated=int(header.is_rotated), dark=int(header.is_dark))
                width, height = header.size
                counts.usable_objects.update(map(str, usable_boxes(objects, width, height)[1]))
                for item in objects:
                    counts.unusual_objects.update(unusual_kinds(item, width, height))
                if not packed.problems:  # otherwise the shard is discarded anyway
                    key = sample_key(record["id"])
                    writer.write({"__key__": key, header.extension: content, "json": text})
        file.flush()
        os.fsync(file.fileno())
    return packed


def _read_image(file: ImageFile, record: Record) -> tuple[bytes, ImageHeader]:
    """Read an image and verify that it decodes to the size in its record.

    Raises:
        ImageError: it is missing, not an image or corrupt.
        ValueError: it has another size.
    """
    where = f"{file} (image id {record['id']})"
    try:
        content = file.read()
    except OSError as error:
        raise ImageError(
            f"{where}: cannot be read ({error.strerror}): add the file or remove the record"
        ) from None
    try:
        return content, check_image(content, (record["width"], record["height"]))
    except ValueError as error:
        raise type(error)(f"{where}: {error}") from None


def _shard_file(task: ShardTask, counts: Counts) -> ShardFile:
    with task.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    num_samples = len(task.samples) - len(counts.skipped)
    return ShardFile(task.path.name, num_samples, task.path.stat().st_size, digest)


def write_source(
    source: Source,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    on_corrupt: OnCorruptImage = "raise",
    workers: int = 1,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> Manifest:
    """Write a data set as shards. Nothing appears in `out` before everything is written.

    A run that was interrupted, or that found corrupt images, is resumed: its finished shards are reused if input and
    sha256 are unchanged.

    Args:
        source: what to write.
        out: output folder; missing, empty, or left by an interrupted run.
        samples_per_shard: images per tar file.
        on_corrupt: "skip" omits images that are missing or corrupt, and lists them in `skipped_images.txt`.
        workers: number of processes; each writes complete shards.
        progress: called with (images written, total images).
        notify: called with a message about the shards of an interrupted run, if there are any.

    Raises:
        ValueError: images are invalid (all are counted, the first hundred are listed), or `out` is not empty.
        OSError: writing failed, for example because the disk is full; the next run resumes there.
        RuntimeError: a worker process died; the next run resumes there.
    """
    for name, value in (("samples_per_shard", samples_per_shard), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    with resumable_folder(out) as folder:
        num_found = len(list(folder.glob("*.tar.json")))
        tasks = _tasks(source, folder, samples_per_shard, on_corrupt)
        workers, total = min(workers, len(tasks)), len(source.files)
        with closing(
            run_tasks(pack_shard, tasks, workers=workers, progress=progress, total=total)
        ) as results:
            packed = list(results)
        num_reused = sum(shard.reused for shard in packed)
        if num_found and notify:
            discarded = f", {num_found - num_reused} (corrupt, or with other input) were discarded"
            text = f"an earlier run did not finish: {num_reused} of its finished shards were reused"
            notify(text + (discarded if num_reused < num_found else ""))
        _raise_problems(packed, source, folder)
        return _finish(source, folder, packed, samples_per_shard)


def _tasks(
    source: Source, folder: Path, samples_per_shard: int, on_corrupt: OnCorruptImage
) -> list[ShardTask]:
    images = zip(source.files, source.dataset.images, strict=True)
    samples = [(file, image, source.dataset.annotations.get(image["id"], [])) for file, image in images]
    parts = [samples[at : at + samples_per_shard] for at in range(0, len(samples), samples_per_shard)]
    return [
        ShardTask(number, folder / f"shard-{number:05d}.tar", part, on_corrupt)
        for number, part in enumerate(parts)
    ]


def _raise_problems(packed: list[PackedShard], source: Source, folder: Path) -> None:
    """Raise if images are invalid, or all were skipped; say what remains of the work."""
    problems = Problems(source.name, "invalid image", limit=MAX_LISTED)
    for problem in (problem for shard in packed for problem in shard.problems):
        problems.add(problem)
    finished = sum(shard.file is not None for shard in packed)
    remedy = (
        f"the other {finished} shards are finished and stay in {folder}: repair these files, or omit the corrupt "
        "ones with --on-corrupt skip, and run the same command again"
    )
    problems.raise_if_any(remedy if finished else "")
    if not finished:
        raise ValueError(f"{source.name}: every image is corrupt, such as {packed[0].counts.skipped[0]}")


def _finish(source: Source, folder: Path, packed: list[PackedShard], samples_per_shard: int) -> Manifest:
    dataset, counts = source.dataset, [shard.counts for shard in packed]
    # Shards whose images were all skipped do not exist, so rows are numbered by the shards that do
    parts = [shard.samples for shard in packed if shard.file is not None]
    for number, part in enumerate(parts):
        part["shard"] = number
    samples = np.concatenate(parts)
    np.savez(folder / INDEX, samples=samples)
    unusual_images = _total(shard.unusual_images for shard in counts)
    notices = dataset.notices + [f"{count} {UNUSUAL[kind]}" for kind, count in unusual_images.items()]
    skipped = [line for shard in counts for line in shard.skipped]
    if skipped:
        notices.append(f"{len(skipped)} images are missing or corrupt and were skipped: {SKIPPED} lists them")
        (folder / SKIPPED).write_text("".join(f"{line}\n" for line in skipped))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=data_fingerprint(samples, dataset.categories),
        num_samples=len(samples),
        num_annotations=int(samples["num_annotations"].sum()),
        usable_objects=_total(shard.usable_objects for shard in counts),
        unusual_objects=_total(shard.unusual_objects for shard in counts),
        samples_per_shard=samples_per_shard,
        shards=[shard.file for shard in packed if shard.file is not None],
        categories=dataset.categories,
        label_maps=label_maps([category["id"] for category in dataset.categories]),
        source={"name": source.name, "sha256": dataset.sha256},
        header=dataset.header,
        notices=notices,
    )
    manifest.save(folder)
    names = [file.name for file in manifest.shards]
    publish(folder, [*names, *([SKIPPED] if skipped else []), INDEX, MANIFEST])
    return manifest


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return dict(sorted(sum(map(Counter, counts), Counter[str]()).items()))
