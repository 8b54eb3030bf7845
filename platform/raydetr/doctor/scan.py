"""Read every sample once, in parallel processes, and keep what the examinations need: a few arrays."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from raydetr.data.images import UNREADABLE
from raydetr.data.index import ShardError, Shards
from raydetr.doctor.looks import SIDE, look_at
from raydetr.doctor.reading import as_record, is_box, refused_sample

CHUNK = 64  # samples that a process is given at once
FEW_SAMPLES = 1_000  # a process takes seconds to start: fewer samples are read in this one

Progress = Callable[[int, int], None]

IMAGE_DTYPE = np.dtype(
    [
        ("is_read", "?"),  # it could be read and decoded; else the rest is 0
        ("width", "<u4"),  # as decoded
        ("height", "<u4"),
        ("turned", "?"),  # carries an EXIF orientation
        ("digest", "<u8"),  # of the encoded bytes
        ("gradients", "<u8"),
        ("thumbnail", "u1", (SIDE * SIDE,)),
    ]
)
OBJECT_DTYPE = np.dtype(
    [
        ("sample", "<u4"),
        ("position", "<u4"),  # among the annotations of its sample
        ("category_id", "<i8"),  # -1: none
        ("box", "<f8", (4,)),  # x, y, width, height in pixels; NaN where it is none
        ("is_crowd", "?"),
        ("is_box", "?"),  # four finite numbers, no negative width or height
    ]
)


@dataclass(frozen=True)
class Facts:
    """What was seen in the samples of a split."""

    images: npt.NDArray[np.void]  # [n] of IMAGE_DTYPE
    objects: npt.NDArray[np.void]  # [m] of OBJECT_DTYPE, in the order of samples
    damage: dict[int, str] = field(default_factory=dict)  # sample -> what is wrong with it


def scan(shards: Shards, *, progress: Progress | None = None, num_processes: int | None = None) -> Facts:
    """Read and decode all samples.

    Args:
        shards: the samples.
        progress: called with (samples read, samples in all).
        num_processes: None: as many as there are CPUs; 1: in this process.
    """
    total = shards.num_samples
    chunks = [range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]
    num_processes = num_processes or (1 if total < FEW_SAMPLES else os.cpu_count() or 1)
    images, objects, damage = [], [], {}
    done = 0
    for facts in _scanned(shards, chunks, num_processes):
        images.append(facts.images)
        objects.append(facts.objects)
        damage.update(facts.damage)
        done += len(facts.images)
        if progress:
            progress(done, total)
    return Facts(np.concatenate(images), np.concatenate(objects), damage)


def _scanned(shards: Shards, chunks: list[range], num_processes: int) -> Iterator[Facts]:
    if num_processes == 1:
        yield from (_scan_chunk(shards, chunk) for chunk in chunks)
        return
    # not a plain fork: a progress bar has a thread
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(num_processes, context, _keep, (shards,)) as pool:
        yield from pool.map(_scan_kept, chunks)


_kept: list[Shards] = []  # of a worker process: sent once, not with each chunk


def _keep(shards: Shards) -> None:
    _kept[:] = [shards]


def _scan_kept(chunk: range) -> Facts:
    return _scan_chunk(_kept[0], chunk)


def _scan_chunk(shards: Shards, chunk: range) -> Facts:
    images = np.zeros(len(chunk), IMAGE_DTYPE)
    objects: list[tuple[Any, ...]] = []
    damage: dict[int, str] = {}
    for row, index, sample in zip(images, chunk, shards.read_many(chunk), strict=True):
        if isinstance(sample, ShardError):
            damage[index] = sample.reason
            refused = refused_sample(shards, index)
            annotations: list[Any] = refused.annotations if refused else []
        else:
            annotations = sample.annotations
            try:
                _fill(row, sample.image)
            except UNREADABLE as error:
                damage[index] = f"its image cannot be decoded ({error})"
        objects += [_object(index, number, annotation) for number, annotation in enumerate(annotations)]
    return Facts(images, np.array(objects, OBJECT_DTYPE), damage)


def _fill(row: np.void, content: bytes) -> None:
    size, turned, gradients, thumbnail = look_at(content)
    row["width"], row["height"] = size
    row["turned"], row["gradients"], row["thumbnail"] = turned, gradients, thumbnail
    row["digest"] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    row["is_read"] = True


def _object(sample: int, number: int, annotation: Any) -> tuple[Any, ...]:
    record = as_record(annotation)
    category_id, box = record.get("category_id"), record.get("bbox")
    if not isinstance(category_id, int) or not 0 <= category_id < 2**63:
        category_id = -1
    good = is_box(box)
    numbers = tuple(box) if box is not None and good else (math.nan,) * 4
    return sample, number, category_id, numbers, bool(record.get("iscrowd", 0)), good
