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
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

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
from raydetr.shards.source import ImageFile, Source, coco_source
from raydetr.store.output_folder import publish, resumable_folder, write_atomically

NO_SAMPLES = np.empty(0, SAMPLE_DTYPE)
SKIPPED = "skipped_images.txt"
COUNTS = (
    "num_rotated",
    "usable_objects",
    "unusual_objects",
    "skipped",
)  # fields of a shard that its record keeps
MAX_LISTED = 100  # each image has to be repaired by itself

OnCorruptImage = Literal["raise", "skip"]


@dataclass(frozen=True)
class ShardTask:
    """The content of one shard to write."""

    number: int
    folder: Path  # output folder
    records: list[Record]
    annotations: list[list[Record]]  # per image
    files: list[ImageFile]
    on_corrupt: OnCorruptImage

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

    file: ShardFile | None  # None: problems, or all of its images were skipped
    samples: Samples = field(default_factory=lambda: NO_SAMPLES)
    num_rotated: int = 0  # images with an EXIF orientation that rotates or flips them
    num_dark: int = 0  # images with 16 bits per pixel, of which at most 12 are used
    usable_objects: Counter[str] = field(default_factory=Counter)  # per category id
    unusual_objects: Counter[str] = field(default_factory=Counter)  # per kind
    skipped: list[str] = field(default_factory=list)  # corrupt images, with the reasons
    problems: list[str] = field(default_factory=list)
    reused: bool = False  # it was finished by an earlier run


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
    packed = _write_tar(task, texts, temporary, advance)
    if packed.problems or len(packed.skipped) == len(texts):
        temporary.unlink()
        return packed
    temporary.rename(task.path)
    shard = _shard_file(task, len(texts) - len(packed.skipped))
    counts = {name: getattr(packed, name) for name in COUNTS}
    state = {"input": digest, "shard": dataclasses.asdict(shard), **counts}
    write_atomically(task.record_path, json.dumps(state, allow_nan=False).encode())
    return dataclasses.replace(packed, file=shard, samples=index_shard(task.path, task.number))


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
    for file, text in zip(task.files, texts, strict=True):
        digest.update(f"{len(text)} {file.state()}\n".encode() + text)
    return digest.hexdigest()


def _finished_shard(task: ShardTask, digest: str) -> PackedShard | None:
    if not task.record_path.exists() or not task.path.exists():
        return None
    try:
        state = json.loads(task.record_path.read_bytes())
    except ValueError:
        return None  # corrupt
    if state["skipped"] and task.on_corrupt != "skip":
        return None
    found = dataclasses.asdict(_shard_file(task, len(task.records) - len(state["skipped"])))
    if state["input"] != digest or state["shard"] != found:
        return None
    counts = {name: state[name] for name in COUNTS}
    return PackedShard(ShardFile(**found), index_shard(task.path, task.number), reused=True, **counts)


def _write_tar(task: ShardTask, texts: list[bytes], path: Path, advance: Advance) -> PackedShard:
    """Write the tar; return its counts, skipped images and problems."""
    problems: list[str] = []
    skipped: list[str] = []
    num_rotated = num_dark = 0
    usable, unusual = Counter[str](), Counter[str]()
    with path.open("wb") as file:
        with TarWriter(file, mtime=0, encoder=False) as writer:
            for image, record, objects, text in zip(
                task.files, task.records, task.annotations, texts, strict=True
            ):
                advance(1)
                try:
                    content, header = _read_image(image, record)
                except ImageError as error:
                    (skipped if task.on_corrupt == "skip" else problems).append(str(error))
                    continue
                except ValueError as error:
                    problems.append(str(error))
                    continue
                num_rotated += header.is_rotated
                num_dark += header.is_dark
                width, height = header.size
                usable.update(map(str, usable_boxes(objects, width, height)[1]))
                unusual.update(kind for item in objects for kind in unusual_kinds(item, width, height))
                if not problems:  # otherwise the shard is discarded anyway
                    key = sample_key(record["id"])
                    writer.write({"__key__": key, header.extension: content, "json": text})
        file.flush()
        os.fsync(file.fileno())
    return PackedShard(
        None,
        num_rotated=num_rotated,
        num_dark=num_dark,
        usable_objects=usable,
        unusual_objects=unusual,
        skipped=skipped,
        problems=problems,
    )


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
    except ImageError as error:
        raise ImageError(f"{where}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _shard_file(task: ShardTask, num_samples: int) -> ShardFile:
    with task.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return ShardFile(task.path.name, num_samples, task.path.stat().st_size, digest.hexdigest())


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
        ValueError: annotations or images are invalid (the first problems are listed), or `out` is not empty.
        OSError: writing failed, for example because the disk is full; the next run resumes there.
    """
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
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}: it must be at least 1")
    if workers < 1:
        raise ValueError(f"workers is {workers}: it must be at least 1")
    with resumable_folder(out) as folder:
        num_found = len(list(folder.glob("*.tar.json")))
        packed = _pack(_tasks(source, folder, samples_per_shard, on_corrupt), source, workers, progress)
        if num_found and notify:
            notify(_describe_reuse(num_found, sum(shard.reused for shard in packed)))
        _raise_problems(packed, source, folder)
        return _finish(source, folder, packed, samples_per_shard)


def _pack(
    tasks: list[ShardTask], source: Source, workers: int, progress: Progress | None
) -> list[PackedShard]:
    """Write all tar files."""
    total = len(source.dataset.images)
    advance = (lambda done: progress(done, total)) if progress else None
    with closing(run_tasks(pack_shard, tasks, workers=min(workers, len(tasks)), progress=advance)) as results:
        return list(results)


def _tasks(
    source: Source, folder: Path, samples_per_shard: int, on_corrupt: OnCorruptImage
) -> list[ShardTask]:
    tasks = []
    for number, start in enumerate(range(0, len(source.files), samples_per_shard)):
        part = slice(start, start + samples_per_shard)
        records = source.dataset.images[part]
        annotations = [source.dataset.annotations.get(record["id"], []) for record in records]
        tasks.append(ShardTask(number, folder, records, annotations, source.files[part], on_corrupt))
    return tasks


def _raise_problems(packed: list[PackedShard], source: Source, folder: Path) -> None:
    """Raise if images are invalid, or all were skipped; say what remains of the work."""
    problems = Problems(source.name, "invalid image", limit=MAX_LISTED)
    for shard in packed:
        for problem in shard.problems:
            problems.add(problem)
    finished = sum(shard.file is not None for shard in packed)
    if problems.count and finished:
        problems.remedy = (
            f"the other {finished} shards are finished and stay in {folder}: repair these files, or omit the corrupt "
            "ones with --on-corrupt skip, and run the same command again"
        )
    problems.raise_if_any()
    if not finished:
        raise ValueError(f"{source.name}: every image is corrupt, such as {packed[0].skipped[0]}")


def _finish(source: Source, folder: Path, packed: list[PackedShard], samples_per_shard: int) -> Manifest:
    # Shards whose images were all skipped do not exist, so rows are numbered by the shards that do
    written = [shard for shard in packed if shard.file is not None]
    for number, shard in enumerate(written):
        shard.samples["shard"] = number
    samples = np.concatenate([shard.samples for shard in written])
    files = [shard.file for shard in written if shard.file is not None]
    skipped = [line for shard in packed for line in shard.skipped]
    np.savez(folder / INDEX, samples=samples)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=data_fingerprint(samples, source.dataset.categories),
        num_samples=len(samples),
        num_annotations=int(samples["num_annotations"].sum()),
        usable_objects=_total(shard.usable_objects for shard in packed),
        unusual_objects=_total(shard.unusual_objects for shard in packed),
        samples_per_shard=samples_per_shard,
        shards=files,
        categories=source.dataset.categories,
        label_maps=label_maps([category["id"] for category in source.dataset.categories]),
        source={"name": source.name, "sha256": source.dataset.sha256},
        header=source.dataset.header,
        notices=source.dataset.notices + _image_notices(packed, len(skipped)),
    )
    manifest.save(folder)
    if skipped:
        (folder / SKIPPED).write_text("".join(f"{line}\n" for line in skipped))
    publish(folder, [*(file.name for file in files), *([SKIPPED] if skipped else []), INDEX, MANIFEST])
    return manifest


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return dict(sorted(sum(map(Counter, counts), Counter[str]()).items()))


def _image_notices(packed: list[PackedShard], num_skipped: int) -> list[str]:
    num_rotated = sum(shard.num_rotated for shard in packed)
    num_dark = sum(shard.num_dark for shard in packed)
    lines = (
        (num_rotated, "images have an EXIF orientation, which is not applied: boxes refer to stored pixels"),
        (
            num_dark,
            "images have 16 bits per pixel and use at most 12 of them: they are nearly black, at most "
            f"{MAX_DARK} of 255, until their pixels are multiplied by 16",
        ),
        (num_skipped, f"images are missing or corrupt and were skipped: {SKIPPED} lists them"),
    )
    return [f"{count} {text}" for count, text in lines if count]


def _describe_reuse(num_found: int, num_reused: int) -> str:
    line = f"an earlier run did not finish: {num_reused} of its finished shards were reused"
    if num_reused < num_found:
        line += f", {num_found - num_reused} (corrupt, or with other input) were discarded"
    return line
