"""Write one shard, or find that an earlier run has finished it.

A shard is finished when its record, `<name>.json`, lies beside it. The record holds the sha256 of the shard and a
digest of the input, so that a shard of other input, or a damaged one, is written again.

Write a data set as WebDataset shards: plain tars, an index of their samples and a manifest.

A sample is the original image file (`jpg` or `png`) and `json` = {"image": ..., "annotations": [...]}, COCO's
records. The same input gives the same bytes, with any number of processes and after any number of stops. The index
is read back from the finished tars.
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
    """What belongs into one shard."""

    number: int
    images: Path  # folder of the image files
    folder: Path  # that is written to
    records: list[Record]
    annotations: list[list[Record]]  # of each image

    @property
    def path(self) -> Path:
        """Of the tar file."""
        return self.folder / f"shard-{self.number:05d}.tar"

    @property
    def record_path(self) -> Path:
        """Of the file that says that the shard is finished."""
        return self.path.with_name(f"{self.path.name}.json")


@dataclass(frozen=True)
class PackedShard:
    """A finished shard, or what is wrong with its input."""

    file: ShardFile | None
    samples: Samples = field(default_factory=lambda: NO_SAMPLES)
    num_turned: int = 0  # images that carry an EXIF orientation
    kept: bool = False  # it was finished by an earlier run
    num_faults: int = 0
    faults: list[str] = field(default_factory=list)  # the first ones


def pack_shard(task: ShardTask, advance: Advance) -> PackedShard:
    """Write the shard of a task, unless it is there. A faulty image does not stop the checks of the others.

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
    faults, num_turned = _write_tar(task, texts, temporary, advance)
    if faults:
        temporary.unlink()
        return PackedShard(None, num_faults=len(faults), faults=faults[:MAX_REPORTED])
    temporary.rename(task.path)
    shard = _shard_file(task)
    state = {"input": digest, "num_turned": num_turned, "shard": dataclasses.asdict(shard)}
    write_atomically(task.record_path, json.dumps(state).encode())
    return PackedShard(shard, index_shard(task.path, task.number), num_turned)


def index_shard(path: Path, number: int) -> Samples:
    """Index the samples of a tar file as they lie on disk.

    Args:
        path: a plain tar; each two members are a sample, one of them its json.
        number: the shard's number, to be noted in each row.
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
    image, record = sorted(pair, key=lambda member: member.name.endswith(".json"))  # they lie in either order
    image_at, json_at = image.offset_data - begin, record.offset_data - begin
    content = json.loads(raw[json_at : json_at + record.size])
    parts = (image_at, image.size, json_at, record.size)
    size = (content["image"]["width"], content["image"]["height"])
    checks = (len(content["annotations"]), content["image"]["id"], zlib.crc32(raw))
    return (number, begin, len(raw), *parts, *size, *checks)


def _sample_text(record: Record, annotations: list[Record]) -> bytes:
    return json.dumps({"image": record, "annotations": annotations}, separators=(",", ":")).encode()


def _input_digest(task: ShardTask, texts: list[bytes]) -> str:
    """Of everything the shard's bytes depend on; the pixels by size and time of the files."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {len(texts)}\n".encode())
    for record, text in zip(task.records, texts, strict=True):
        try:
            state = (task.images / record["file_name"]).stat()
            known = f"{state.st_size} {state.st_mtime_ns}"
        except (OSError, ValueError):
            known = "missing"  # which is a fault, to be reported by `read_checked`
        digest.update(f"{len(text)} {known}\n".encode() + text)
    return digest.hexdigest()


def _finished_shard(task: ShardTask, digest: str) -> PackedShard | None:
    if not task.record_path.exists() or not task.path.exists():
        return None
    try:
        state = json.loads(task.record_path.read_bytes())
    except ValueError:
        return None  # damaged
    if state["input"] != digest or state["shard"] != dataclasses.asdict(_shard_file(task)):
        return None
    shard = ShardFile(**state["shard"])
    return PackedShard(shard, index_shard(task.path, task.number), state["num_turned"], kept=True)


def _write_tar(task: ShardTask, texts: list[bytes], path: Path, advance: Advance) -> tuple[list[str], int]:
    """Returns what is wrong with the images, and how many carry an EXIF orientation."""
    faults: list[str] = []
    num_turned = 0
    with path.open("wb") as file:
        with TarWriter(file, mtime=0, encoder=False) as writer:
            for record, text in zip(task.records, texts, strict=True):
                try:
                    content, extension, turned = read_checked(task.images / record["file_name"], record)
                except ValueError as error:
                    faults.append(str(error))
                else:
                    num_turned += turned
                    if not faults:  # else nobody will want the shard
                        writer.write({"__key__": sample_key(record["id"]), extension: content, "json": text})
                advance(1)
        file.flush()
        os.fsync(file.fileno())
    return faults, num_turned


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
    """Write the images of a COCO data set, in the order of its annotation file, as shards: see `write_source`.

    Args:
        images: folder of the image files.
        annotations: COCO instances JSON.
        out: output folder; missing, empty, or what a stopped run left.
        samples_per_shard: images in each tar file.
        workers: processes that write; each writes whole shards.
        progress: called with (images written, images in all).

    Raises:
        ValueError: the annotations or images are faulty (up to ten faults are listed), or `out` is not empty.
        OSError: writing failed, for example because the disk is full; the next run goes on there.
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
    tell: Callable[[str], None] | None = None,
) -> Manifest:
    """Write a data set as shards. Nothing appears in `out` before everything is written.

    A run that was stopped is continued: its finished shards are kept if input and sha256 are still the same.

    Args:
        source: what to write.
        out: output folder; missing, empty, or what a stopped run left.
        samples_per_shard: images in each tar file.
        workers: processes that write; each writes whole shards.
        progress: called with (images written, images in all).
        tell: called with a line on what was found of an earlier run.

    Raises:
        ValueError: images are faulty (up to ten faults are listed, all are counted), or `out` is not empty.
        OSError: writing failed, for example because the disk is full; the next run goes on there.
        RuntimeError: a worker process died; the next run goes on there.
    """
    _check_arguments(samples_per_shard, workers)
    with resumable_folder(out) as folder:
        num_found = len(list(folder.glob("*.tar.json")))
        packed = _pack(source, folder, samples_per_shard, workers, progress)
        if num_found and tell:
            tell(_found_earlier(num_found, sum(shard.kept for shard in packed)))
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
        ValueError: images are faulty.
    """
    total = len(source.dataset.images)
    num_shards = -(-total // samples_per_shard)
    problems = Problems(source.images, "faulty image")
    tasks = _tasks(source, folder, samples_per_shard)
    packed: list[PackedShard] = []
    advance = (lambda done: progress(done, total)) if progress else None
    with closing(run_tasks(pack_shard, tasks, workers=min(workers, num_shards), progress=advance)) as results:
        for shard in results:
            packed.append(shard)
            problems.add_many(shard.faults, shard.num_faults)
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
    num_turned = sum(shard.num_turned for shard in packed)
    np.savez(folder / INDEX, samples=samples)
    manifest = _describe(source.dataset, source.name, samples, files, samples_per_shard, num_turned)
    manifest.save(folder)
    publish(folder, [*(file.name for file in files), INDEX, MANIFEST])
    return manifest


def _describe(
    dataset: CocoDataset,
    source: str,
    samples: Samples,
    files: list[ShardFile],
    samples_per_shard: int,
    num_turned: int,
) -> Manifest:
    turned = (
        f"{num_turned} images carry an EXIF orientation, which is not applied: boxes refer to stored pixels"
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
        notices=dataset.notices + ([turned] if num_turned else []),
    )


def _found_earlier(num_found: int, num_kept: int) -> str:
    line = f"an earlier run was stopped: {num_kept} of its finished shards were kept"
    if num_kept < num_found:
        line += f", {num_found - num_kept} of other input or damaged were discarded"
    return line
