"""Scan a split: read and decode each sample once and keep a few arrays for the checks."""

from __future__ import annotations

import hashlib
import io
import math
import os
import zlib
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from imagehash import phash
from PIL import Image

from raydetr.doctor.findings import MAX_EXAMPLES, Example, Floats, Integers, Place, TrainingTarget
from raydetr.process_pool import Progress, run_tasks
from raydetr.shards.coco import is_box, is_wrong_area
from raydetr.shards.images import ImageError, decode_image, read_header
from raydetr.shards.reader import ShardError, Shards
from raydetr.shards.validation import InvalidDataError, RawSample, parse_content
from raydetr.store.retry import RemoteError

Flags = npt.NDArray[np.bool_]

REDUCED_SIDE = 128  # Pixels of the short side, at least; the hash of a reduced image is the same and faster
FLAT = 2.0  # Gray values; an image with a smaller standard deviation has nothing to hash


def perceptual_hash(image: Image.Image) -> int:
    """Compute 64 bits that images of almost the same look share; docs/data/doctor.md has measurements."""
    gray = image.reduce(max(1, min(image.size) // REDUCED_SIDE)).convert("L")
    pixels = np.asarray(gray)
    if pixels.std() < FLAT:  # Would be a hash of the noise. Few bits differ between similar gray values
        return (1 << int(pixels.mean()) // 4) - 1
    return int.from_bytes(np.packbits(phash(gray).hash).tobytes())


# --- Samples that the reader refuses ---


def read_unchecked(shards: Shards, index: int) -> RawSample | None:
    """Read a sample without validating its record, to show what is wrong with it.

    An annotation that is no JSON object becomes an empty record.

    Returns:
        None where the bytes are not those that were packed, or hold no record.

    Raises:
        RemoteError: a server cannot be reached, or refuses.
    """
    row = shards.samples[index]
    try:
        raw = shards.files.read(*shards.span(index))
        if zlib.crc32(raw) != row["crc32"]:
            return None
        image, record = (raw[row[f"{part}_offset"] :][: row[f"{part}_length"]] for part in ("image", "json"))
        image_record, annotations = parse_content(record)
    except RemoteError:
        raise
    except (OSError, InvalidDataError):
        return None
    records = [annotation if isinstance(annotation, dict) else {} for annotation in annotations]
    return RawSample(shards.key(index), image, image_record, records)


def is_valid_box(value: Any) -> bool:
    """Return whether a value is [x, y, width, height]: four finite numbers, no negative size."""
    return is_box(value) and min(value[2:]) >= 0


# --- Scanning, in parallel processes ---

CHUNK = 128  # Samples per task of a process
MIN_PARALLEL_SAMPLES = 1_000  # Fewer are read in this process: starting others takes seconds

IMAGE_DTYPE = np.dtype([
    ("is_read", "?"),  # The image was read and decoded; otherwise all other fields are 0
    ("width", "<u4"),  # As decoded
    ("height", "<u4"),
    ("is_rotated", "?"),  # By its EXIF orientation
    ("digest", "<u8"),  # Of the encoded bytes
    ("hash", "<u8"),  # Perceptual
])  # fmt: skip
OBJECT_DTYPE = np.dtype([
    ("sample", "<u4"),
    ("position", "<u4"),  # Among the annotations of its sample
    ("category_id", "<i8"),  # -1: none
    ("box", "<f8", (4,)),  # x, y, width, height in pixels; NaN where it is no box
    ("is_crowd", "?"),
    ("is_box", "?"),  # Four finite numbers, no negative width or height
    ("is_wrong_area", "?"),  # Not that of a mask in the box
])  # fmt: skip


@dataclass(frozen=True)
class ScanResult:
    """Images, objects and corrupt samples of a split."""

    images: npt.NDArray[np.void]  # [n] of IMAGE_DTYPE
    objects: npt.NDArray[np.void]  # [m] of OBJECT_DTYPE, in the order of samples
    corrupt: dict[int, str]  # Sample -> the problem


def scan(shards: Shards, *, progress: Progress | None = None, num_processes: int | None = None) -> ScanResult:
    """Read and decode all samples.

    Args:
        shards: the samples.
        progress: called with (samples read, total samples).
        num_processes: None: one per CPU; 1: only this process.

    Raises:
        RemoteError: a server cannot be reached, or refuses.
        RuntimeError: a process died.
    """
    total = shards.num_samples
    num_processes = num_processes or (1 if total < MIN_PARALLEL_SAMPLES else os.cpu_count() or 1)
    # With only the samples of the task, so that little is sent to another process
    tasks = (
        (start, replace(shards, samples=shards.samples[start : start + CHUNK]))
        for start in range(0, total, CHUNK)
    )
    running = run_tasks(_scan_slice, tasks, workers=num_processes, progress=progress, total=total)
    with closing(running) as results:
        scanned = list(results)
    return ScanResult(
        np.concatenate([result.images for result in scanned]),
        np.concatenate([result.objects for result in scanned]),
        {sample: problem for result in scanned for sample, problem in result.corrupt.items()},
    )


def _scan_slice(task: tuple[int, Shards], advance: Callable[[int], None]) -> ScanResult:
    """Read the samples of a slice; the task names the number of its first sample in the split."""
    start, shards = task
    images = np.zeros(shards.num_samples, IMAGE_DTYPE)
    objects: list[tuple[Any, ...]] = []
    corrupt: dict[int, str] = {}
    for index, sample in enumerate(shards.read_many(range(shards.num_samples))):
        number = start + index
        if isinstance(sample, ShardError):
            corrupt[number] = sample.reason
            unchecked = read_unchecked(shards, index)
        else:
            unchecked = sample
            try:
                images[index] = _image_row(sample.image)
            except ImageError as error:
                corrupt[number] = f"its image cannot be decoded ({error})"
        if unchecked is not None:
            objects += [_object_row(number, *numbered) for numbered in enumerate(unchecked.annotations)]
        advance(1)
    return ScanResult(images, np.array(objects, OBJECT_DTYPE), corrupt)


def _image_row(content: bytes) -> tuple[Any, ...]:
    image = decode_image(content)  # As training does, so that all images are found that it refuses
    is_rotated = read_header(io.BytesIO(content)).is_rotated
    digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    return True, *image.size, is_rotated, digest, perceptual_hash(image)


def _object_row(sample: int, position: int, record: dict[str, Any]) -> tuple[Any, ...]:
    category_id, box = record.get("category_id"), record.get("bbox")
    if not isinstance(category_id, int) or not 0 <= category_id < 2**63:
        category_id = -1
    is_valid = is_valid_box(box)
    numbers = tuple(box) if box is not None and is_valid else (math.nan,) * 4
    is_crowd, area = bool(record.get("iscrowd", 0)), record.get("area")
    is_wrong = (
        is_valid and not is_crowd and isinstance(area, int | float) and is_wrong_area(area, *numbers[2:])
    )
    return sample, position, category_id, numbers, is_crowd, is_valid, is_wrong


# --- Splits ---


@dataclass(frozen=True)
class Split:
    """A data set under a short name. The first of several is the training split."""

    name: str
    shards: Shards
    is_trained_on: bool

    @property
    def category_names(self) -> list[str]:
        """Names of the categories, in the order of the list."""
        return [category["name"] for category in self.shards.manifest.categories]

    def place(self, sample: int, annotations: tuple[int, ...] = ()) -> Place:
        """Describe a sample by its image id and file name."""
        image_id = int(self.shards.samples["image_id"][sample])
        raw = read_unchecked(self.shards, sample)
        file_name = str(raw.record.get("file_name", "")) if raw else ""
        return Place(self.name, sample, image_id, file_name, annotations)

    def examples(self, samples: Iterable[int], detail: Callable[[int], str]) -> tuple[Example, ...]:
        """Return the first of the samples as examples; `detail` describes a sample."""
        return tuple(Example((self.place(int(n)),), detail(int(n))) for n in islice(samples, MAX_EXAMPLES))

    @cached_property
    def image_sizes(self) -> Floats:
        """Width and height of the images according to their records, [n, 2] in pixels."""
        samples = self.shards.samples
        return np.stack([samples["width"], samples["height"]], axis=1).astype(np.float64)


class ScannedSplit:
    """A split with the result of its scan, for a training: n images, m objects, k categories.

    "Usable" are the u objects that training uses: no crowd, a known category, a box with area in the image.
    """

    def __init__(self, split: Split, scan: ScanResult, target: TrainingTarget) -> None:
        self.split, self.scan, self.target, self.name = split, scan, target, split.name
        objects, categories = scan.objects, split.shards.manifest.categories
        position, extent = objects["box"][:, :2], objects["box"][:, 2:]
        # [m, 2] in pixels: width and height of each object's image, and of the box inside it; not positive outside
        self.sizes: Floats = split.image_sizes[objects["sample"]]
        self.visible_sides: Floats = np.minimum(position + extent, self.sizes) - np.maximum(position, 0)
        with np.errstate(invalid="ignore"):
            self.is_visible: Flags = (self.visible_sides > 0).all(axis=1)  # [m]; not where there is no box
        self.category_ids: Integers = np.array([category["id"] for category in categories])  # [k], ascending
        self.is_known: Flags = np.isin(objects["category_id"], self.category_ids)  # [m]
        self.is_usable: Flags = objects["is_box"] & ~objects["is_crowd"] & self.is_known & self.is_visible
        usable = objects[self.is_usable]
        factors = target.scale_factors(self.sizes[self.is_usable])
        # [u]: shorter side in pixels after the resize of the training, and category as its position in the list
        self.shorter_sides: Floats = self.visible_sides[self.is_usable].min(axis=1) * factors
        self.classes: Integers = np.searchsorted(self.category_ids, usable["category_id"])
        # [n] and [k]: numbers of usable objects
        self.objects_per_image: Integers = np.bincount(usable["sample"], minlength=split.shards.num_samples)
        self.objects_per_class: Integers = np.bincount(self.classes, minlength=len(categories))

    def examples(self, chosen: Integers) -> tuple[Example, ...]:
        """Return some of the images with the chosen objects, given their numbers, and the box of the first in each."""
        objects, found = self.scan.objects[chosen], []
        for sample in list(dict.fromkeys(objects["sample"].tolist()))[:MAX_EXAMPLES]:
            of_sample = objects["sample"] == sample
            place = self.split.place(sample, tuple(objects["position"][of_sample].tolist()))
            found.append(Example((place,), self._describe_box(chosen[of_sample][0])))
        return tuple(found)

    def _describe_box(self, number: int) -> str:
        row = self.scan.objects[number]
        if not row["is_box"]:
            raw = read_unchecked(self.split.shards, int(row["sample"]))
            record = raw.annotations[row["position"]] if raw else {}
            value = f"{record['bbox']!r:.60}" if "bbox" in record else "missing"
            return f"annotation {row['position']} has the box {value}"
        width, height = self.sizes[number]
        box = ", ".join(f"{side:g}" for side in row["box"].round(2))
        return f"box [{box}] in {width:g}x{height:g}"
