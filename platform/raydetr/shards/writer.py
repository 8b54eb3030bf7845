"""Write a data set as WebDataset shards: plain tars, an index of their samples and a manifest.

A sample is the original image file (`jpg` or `png`) and `json` = {"image": ..., "annotations": [...]}, COCO's
records. The same input gives the same bytes, with any number of processes and after any number of interruptions. The
index is read back from the finished tars.

An interrupted run can be resumed: a shard is finished when its record, `<name>.json`, lies next to it. The record
holds the sha256 of the shard and a digest of the input, so a corrupt shard, or one with other input, is rewritten.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset.writer import TarWriter

from raydetr.process_pool import Advance, Progress, run_tasks
from raydetr.shards.coco import MAX_REPORTED, CocoDataset, Problems, Record, Source, coco_source
from raydetr.shards.images import read_checked
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
from raydetr.store.output_folder import publish, resumable_folder, write_atomically

NO_SAMPLES = np.empty(0, SAMPLE_DTYPE)


@dataclass(frozen=True)
class ShardTask:
    """The content of one shard to write."""

    number: int
    images: Path  # folder of the image files
    folder: Path  # output folder
    records: list[Record]
    annotations: list[list[Record]]  # per image

    @property
    def path(self) -> Path:
        """Path of the tar file."""
        return self.folder / f"shard-{self.number:05d}.tar"

    @property
    def record_path(self) -> Path:
        """Path of the record whose existence means that the shard is finished."""
        return self.path.with_name(f"{self.path.name}.json")


@dataclass(frozen=True)
class PackedShard:
    """A finished shard, or the problems of its input."""

    file: ShardFile | None
    samples: Samples = field(default_factory=lambda: NO_SAMPLES)
    num_rotated: int = 0  # images with an EXIF orientation that rotates or flips them
    reused: bool = False  # it was finished by an earlier run
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)  # the first ones


def pack_shard(task: ShardTask, advance: Advance) -> PackedShard:
    """Write the shard of a task, unless it is finished. An invalid image does not stop the checks of the others.

    Raises:
        OSError: it cannot be written.
    """
    texts = [_sample_text(*pair) for pair in zip(task.records, task.annotations, strict=True)]
    digest = _input_digest(task, texts)
    finished = _finished_shard(task, digest)
    if finished is not None:
        advance(len(texts))
        return finished
    temporary = task.path.with_name(f"{task.path.name}.{os.getpid()}.tmp")
    problems, num_rotated = _write_tar(task, texts, temporary, advance)
    if problems:
        temporary.unlink()
        return PackedShard(None, num_problems=len(problems), problems=problems[:MAX_REPORTED])
    temporary.rename(task.path)
    shard = _shard_file(task)
    state = {"input": digest, "num_rotated": num_rotated, "shard": dataclasses.asdict(shard)}
    write_atomically(task.record_path, json.dumps(state).encode())
    return PackedShard(shard, index_shard(task.path, task.number), num_rotated)


def index_shard(path: Path, number: int) -> Samples:
    """Build the index rows of a finished tar file from its bytes on disk.

    Args:
        path: a plain tar; every two consecutive members form a sample, one of them is its json.
        number: shard number to write in each row.
    """
    with tarfile.open(path, "r:") as tar, path.open("rb") as file:
        members = tar.getmembers()
        rows = [_index_row(file, number, pair) for pair in zip(members[::2], members[1::2], strict=True)]
    return np.array(rows, dtype=SAMPLE_DTYPE)


def _index_row(file: BinaryIO, number: int, pair: tuple[tarfile.TarInfo, tarfile.TarInfo]) -> tuple[int, ...]:
    begin, last = pair[0].offset, pair[1]
    end = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    file.seek(begin)
    raw = file.read(end - begin)
    # webdataset sorts the members by extension, so the json is between `jpg` and `png`.
    image, record = sorted(pair, key=lambda member: member.name.endswith(".json"))
    image_at, json_at = image.offset_data - begin, record.offset_data - begin
    content = json.loads(raw[json_at : json_at + record.size])
    parts = (image_at, image.size, json_at, record.size)
    size = (content["image"]["width"], content["image"]["height"])
    checks = (len(content["annotations"]), content["image"]["id"], zlib.crc32(raw))
    return (number, begin, len(raw), *parts, *size, *checks)


def _sample_text(record: Record, annotations: list[Record]) -> bytes:
    return json.dumps({"image": record, "annotations": annotations}, separators=(",", ":")).encode()


def _input_digest(task: ShardTask, texts: list[bytes]) -> str:
    """Hash all that the shard's bytes depend on; image files by size and modification time."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {len(texts)}\n".encode())
    for record, text in zip(task.records, texts, strict=True):
        try:
            state = (task.images / record["file_name"]).stat()
            known = f"{state.st_size} {state.st_mtime_ns}"
        except (OSError, ValueError):
            known = "missing"  # reported by `read_checked`
        digest.update(f"{len(text)} {known}\n".encode() + text)
    return digest.hexdigest()


def _finished_shard(task: ShardTask, digest: str) -> PackedShard | None:
    if not task.record_path.exists() or not task.path.exists():
        return None
    try:
        state = json.loads(task.record_path.read_bytes())
    except ValueError:
        return None  # corrupt
    if state["input"] != digest or state["shard"] != dataclasses.asdict(_shard_file(task)):
        return None
    shard = ShardFile(**state["shard"])
    return PackedShard(shard, index_shard(task.path, task.number), state["num_rotated"], reused=True)


def _write_tar(task: ShardTask, texts: list[bytes], path: Path, advance: Advance) -> tuple[list[str], int]:
    """Write the tar; return the problems of the images, and how many of them an EXIF orientation rotates."""
    problems: list[str] = []
    num_rotated = 0
    with path.open("wb") as file:
        with TarWriter(file, mtime=0, encoder=False) as writer:
            for record, text in zip(task.records, texts, strict=True):
                try:
                    content, extension, rotated = read_checked(task.images / record["file_name"], record)
                except ValueError as error:
                    problems.append(str(error))
                else:
                    num_rotated += rotated
                    if not problems:  # otherwise the shard is discarded anyway
                        writer.write({"__key__": sample_key(record["id"]), extension: content, "json": text})
                advance(1)
        file.flush()
        os.fsync(file.fileno())
    return problems, num_rotated


def _shard_file(task: ShardTask) -> ShardFile:
    with task.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return ShardFile(task.path.name, len(task.records), task.path.stat().st_size, digest.hexdigest())


def write_shards(
    images: Path,
    annotations: Path,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    workers: int = 1,
    progress: Progress | None = None,
) -> Manifest:
    """Write a COCO data set as shards, in the order of its annotation file: see `write_source`.

    Args:
        images: folder of the image files.
        annotations: COCO instances JSON.
        out: output folder; missing, empty, or left by an interrupted run.
        samples_per_shard: images per tar file.
        workers: number of processes; each writes complete shards.
        progress: called with (images written, total images).

    Raises:
        ValueError: annotations or images are invalid (the first ten problems are listed), or `out` is not empty.
        OSError: writing failed, for example because the disk is full; the next run resumes there.
    """
    _check_arguments(samples_per_shard, workers)
    return write_source(
        coco_source(images, annotations),
        out,
        samples_per_shard=samples_per_shard,
        workers=workers,
        progress=progress,
    )


def write_source(
    source: Source,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    workers: int = 1,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> Manifest:
    """Write a data set as shards. Nothing appears in `out` before everything is written.

    An interrupted run is resumed: its finished shards are reused if input and sha256 are unchanged.

    Args:
        source: what to write.
        out: output folder; missing, empty, or left by an interrupted run.
        samples_per_shard: images per tar file.
        workers: number of processes; each writes complete shards.
        progress: called with (images written, total images).
        notify: called with a message about the shards of an interrupted run, if there are any.

    Raises:
        ValueError: images are invalid (all are counted, the first ten are listed), or `out` is not empty.
        OSError: writing failed, for example because the disk is full; the next run resumes there.
        RuntimeError: a worker process died; the next run resumes there.
    """
    _check_arguments(samples_per_shard, workers)
    with resumable_folder(out) as folder:
        num_found = len(list(folder.glob("*.tar.json")))
        packed = _pack(source, folder, samples_per_shard, workers, progress)
        if num_found and notify:
            notify(_describe_reuse(num_found, sum(shard.reused for shard in packed)))
        manifest = _finish(source, folder, packed, samples_per_shard)
    return manifest


def _check_arguments(samples_per_shard: int, workers: int) -> None:
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}: it must be at least 1")
    if workers < 1:
        raise ValueError(f"workers is {workers}: it must be at least 1")


def _pack(
    source: Source, folder: Path, samples_per_shard: int, workers: int, progress: Progress | None
) -> list[PackedShard]:
    """Write all tar files.

    Raises:
        ValueError: images are invalid.
    """
    total = len(source.dataset.images)
    num_shards = -(-total // samples_per_shard)
    problems = Problems(source.images, "invalid image")
    tasks = _tasks(source, folder, samples_per_shard)
    packed: list[PackedShard] = []
    advance = (lambda done: progress(done, total)) if progress else None
    with closing(run_tasks(pack_shard, tasks, workers=min(workers, num_shards), progress=advance)) as results:
        for shard in results:
            packed.append(shard)
            problems.add_many(shard.problems, shard.num_problems)
    problems.raise_if_any()
    return packed


def _tasks(source: Source, folder: Path, samples_per_shard: int) -> Iterator[ShardTask]:
    dataset = source.dataset
    for number, start in enumerate(range(0, len(dataset.images), samples_per_shard)):
        records = dataset.images[start : start + samples_per_shard]
        annotations = [dataset.annotations.get(record["id"], []) for record in records]
        yield ShardTask(number, source.images, folder, records, annotations)


def _finish(source: Source, folder: Path, packed: list[PackedShard], samples_per_shard: int) -> Manifest:
    samples = np.concatenate([shard.samples for shard in packed])
    files = [shard.file for shard in packed if shard.file is not None]
    num_rotated = sum(shard.num_rotated for shard in packed)
    np.savez(folder / INDEX, samples=samples)
    manifest = _describe(source.dataset, source.name, samples, files, samples_per_shard, num_rotated)
    manifest.save(folder)
    publish(folder, [*(file.name for file in files), INDEX, MANIFEST])
    return manifest


def _describe(
    dataset: CocoDataset,
    source: str,
    samples: Samples,
    files: list[ShardFile],
    samples_per_shard: int,
    num_rotated: int,
) -> Manifest:
    rotated = (
        f"{num_rotated} images have an EXIF orientation, which is not applied: boxes refer to stored pixels"
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=data_fingerprint(samples, dataset.categories),
        num_samples=len(samples),
        num_annotations=int(samples["num_annotations"].sum()),
        samples_per_shard=samples_per_shard,
        shards=files,
        categories=dataset.categories,
        label_maps=label_maps([category["id"] for category in dataset.categories]),
        source={"name": source, "sha256": dataset.sha256},
        header=dataset.header,
        notices=dataset.notices + ([rotated] if num_rotated else []),
    )


def _describe_reuse(num_found: int, num_reused: int) -> str:
    line = f"an earlier run was interrupted: {num_reused} of its finished shards were reused"
    if num_reused < num_found:
        line += f", {num_found - num_reused} (corrupt, or with other input) were discarded"
    return line
