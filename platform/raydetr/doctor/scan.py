"""Read every sample once, in parallel processes, and keep what the examinations need: a few arrays."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from raydetr.doctor.looks import SIDE, look_at
from raydetr.doctor.reading import as_record, is_box, refused_sample
from raydetr.process_pool import run_tasks
from raydetr.shards.images import UNREADABLE
from raydetr.shards.reader import ShardError, Shards

CHUNK = 128  # samples that a process is given at once
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

    Raises:
        RemoteError: a server cannot be reached, or refuses.
        RuntimeError: a process died.
    """
    total = shards.num_samples
    num_processes = num_processes or (1 if total < FEW_SAMPLES else os.cpu_count() or 1)
    parts = ((start, _part(shards, slice(start, start + CHUNK))) for start in range(0, total, CHUNK))
    report = (lambda done: progress(done, total)) if progress else None
    with closing(run_tasks(_scan_part, parts, workers=num_processes, progress=report)) as scanned:
        facts = list(scanned)
    return Facts(
        np.concatenate([part.images for part in facts]),
        np.concatenate([part.objects for part in facts]),
        {sample: fault for part in facts for sample, fault in part.damage.items()},
    )


def _part(shards: Shards, samples: slice) -> Shards:
    """Some of the samples only: little to send to another process."""
    manifest = shards.manifest
    if manifest.foreign is not None:
        foreign = replace(manifest.foreign, keys=manifest.foreign.keys[samples])
        manifest = replace(manifest, foreign=foreign)
    return replace(shards, samples=shards.samples[samples], manifest=manifest)


def _scan_part(task: tuple[int, Shards], advance: Callable[[int], None]) -> Facts:
    """Read some samples, of which the first has the given number."""
    start, shards = task
    images = np.zeros(shards.num_samples, IMAGE_DTYPE)
    objects: list[tuple[Any, ...]] = []
    damage: dict[int, str] = {}
    for index, sample in enumerate(shards.read_many(range(shards.num_samples))):
        number = start + index
        if isinstance(sample, ShardError):
            damage[number] = sample.reason
            refused = refused_sample(shards, index)
            annotations: list[Any] = refused.annotations if refused else []
        else:
            annotations = sample.annotations
            try:
                _fill(images[index], sample.image)
            except UNREADABLE as error:
                damage[number] = f"its image cannot be decoded ({error})"
        objects += [_object(number, place, annotation) for place, annotation in enumerate(annotations)]
        advance(1)
    return Facts(images, np.array(objects, OBJECT_DTYPE), damage)


def _fill(row: np.void, content: bytes) -> None:
    size, turned, gradients, thumbnail = look_at(content)
    row["width"], row["height"] = size
    row["turned"], row["gradients"], row["thumbnail"] = turned, gradients, thumbnail
    row["digest"] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    row["is_read"] = True


def _object(sample: int, position: int, annotation: Any) -> tuple[Any, ...]:
    record = as_record(annotation)
    category_id, box = record.get("category_id"), record.get("bbox")
    if not isinstance(category_id, int) or not 0 <= category_id < 2**63:
        category_id = -1
    good = is_box(box)
    numbers = tuple(box) if box is not None and good else (math.nan,) * 4
    return sample, position, category_id, numbers, bool(record.get("iscrowd", 0)), good
