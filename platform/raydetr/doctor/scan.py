"""Read every sample once, in parallel processes, and keep what the examinations need: a few arrays."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from raydetr.data.images import UNREADABLE
from raydetr.data.index import ShardError, Shards
from raydetr.data.integrity import Fault, parse_content
from raydetr.doctor.looks import SIDE, look_at

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
    for row, index in zip(images, chunk, strict=True):
        try:
            raw = shards.read(index)
            annotations: list[Any] = raw.annotations
            _fill(row, raw.image)
        except ShardError as error:
            damage[index] = error.reason
            annotations = _annotations_anyway(shards, index)
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


def _annotations_anyway(shards: Shards, index: int) -> list[Any]:
    """Those of a sample that was refused: if its bytes are whole, they tell what is wrong with the boxes."""
    row = shards.samples[index]
    try:
        raw = shards.files.read(int(row["shard"]), int(row["offset"]), int(row["length"]))
        if zlib.crc32(raw) != row["crc32"]:
            return []
        begin = int(row["json_offset"])
        return parse_content(raw[begin : begin + int(row["json_length"])])[1]
    except (OSError, Fault):
        return []


def _object(sample: int, number: int, annotation: Any) -> tuple[Any, ...]:
    record = annotation if isinstance(annotation, dict) else {}
    category_id, box = record.get("category_id"), record.get("bbox")
    if not isinstance(category_id, int) or not 0 <= category_id < 2**63:
        category_id = -1
    is_box = (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(side, int | float) and math.isfinite(side) for side in box)
        and min(box[2:]) >= 0
    )
    numbers = (math.nan,) * 4 if box is None or not is_box else tuple(box)
    return sample, number, category_id, numbers, bool(record.get("iscrowd", 0)), is_box
