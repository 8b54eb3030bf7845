"""Scan a split: read and decode each sample once and keep a few arrays for the checks."""

from __future__ import annotations

import hashlib
import io
import math
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from raydetr.doctor.findings import MAX_EXAMPLES, Example, Floats, Integers, Place
from raydetr.process_pool import Progress, run_tasks
from raydetr.shards.images import EXIF_ORIENTATION, FORMATS, UNREADABLE, decode_rgb
from raydetr.shards.reader import ShardError, Shards
from raydetr.shards.validation import InvalidDataError, RawSample, parse_content
from raydetr.store.retry import RemoteError

Flags = npt.NDArray[np.bool_]

# --- Image signatures ---
#
# A signature keeps the look of an image in a few bytes, which recompressed, resized or brightened copies share. It has
# two views of the gray image. The gradient hash has 64 bits: for each of 8x8 cells, whether the next cell to the right
# is brighter. It can be searched. The thumbnail has 16x16 gray values. It decides. The JPEG decoder itself reduces
# the image for both, at half the cost of a full decode.

THUMBNAIL_SIDE = 16
HASH_SIZE = (9, 8)  # Width, height
REDUCED_SIDE = 64  # Pixels; JPEGs are decoded to at least this size

ImageSignature = tuple[tuple[int, int], bool, int, npt.NDArray[np.uint8]]


def image_signature(content: bytes) -> ImageSignature:
    """Compute stored size (width, height), EXIF orientation flag, gradient hash and thumbnail [SIDE * SIDE].

    Raises:
        OSError, or another of UNREADABLE: the image cannot be decoded.
    """
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    size, has_orientation = image.size, _has_exif_orientation(image)
    if image.format == "JPEG":
        image.draft("L", (REDUCED_SIDE, REDUCED_SIDE))
        gray = image.convert("L")
    else:
        gray = decode_rgb(content).convert("L")
    # A reduced image rounds its size up to integer pixels. Without the exact border, resized copies would look shifted.
    reduction = max(1, round(size[0] / gray.width))
    box = (0, 0, min(size[0] / reduction, gray.width), min(size[1] / reduction, gray.height))
    thumbnail_size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    thumbnail = np.asarray(gray.resize(thumbnail_size, Image.Resampling.BILINEAR, box=box))
    cells = np.asarray(gray.resize(HASH_SIZE, Image.Resampling.BILINEAR, box=box))
    bits = np.packbits(cells[:, 1:] > cells[:, :-1])
    return size, has_orientation, int.from_bytes(bits.tobytes(), "little"), thumbnail.ravel()


def _has_exif_orientation(image: Image.Image) -> bool:
    try:
        return bool(image.getexif().get(EXIF_ORIENTATION, 1) != 1)
    except (*UNREADABLE, TypeError, KeyError):
        return False  # The metadata is corrupt; the pixels may be fine


# --- Samples that the reader refuses ---


def read_unchecked(shards: Shards, index: int) -> RawSample | None:
    """Read a sample without validating its record, to show what is wrong with it.

    Returns:
        None where the bytes are not those that were packed, or hold no record.

    Raises:
        RemoteError: a server cannot be reached, or refuses.
    """
    row = shards.samples[index]
    image, record = (
        slice(int(row[f"{part}_offset"]), int(row[f"{part}_offset"]) + int(row[f"{part}_length"]))
        for part in ("image", "json")
    )
    try:
        raw = shards.files.read(*shards.span(index))
        if zlib.crc32(raw) != row["crc32"]:
            return None
        return RawSample(shards.key(index), raw[image], *parse_content(raw[record], shards.convert(index)))
    except RemoteError:
        raise
    except (OSError, InvalidDataError):
        return None


def is_box(value: object) -> bool:
    """Return whether a value is [x, y, width, height]: four finite numbers, no negative size."""
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(side, int | float) and math.isfinite(side) for side in value)
        and min(value[2:]) >= 0
    )


def as_record(annotation: Any) -> dict[str, Any]:
    """Return the annotation, or an empty record where it is no JSON object."""
    return annotation if isinstance(annotation, dict) else {}


# --- Scanning, in parallel processes ---

CHUNK = 128  # Samples per task of a process
MIN_PARALLEL_SAMPLES = 1_000  # Fewer are read in this process: starting others takes seconds

IMAGE_DTYPE = np.dtype(
    [
        ("is_read", "?"),  # The image was read and decoded; otherwise all other fields are 0
        ("width", "<u4"),  # As decoded
        ("height", "<u4"),
        ("has_orientation", "?"),  # It carries an EXIF orientation
        ("digest", "<u8"),  # Of the encoded bytes
        ("gradient_hash", "<u8"),
        ("thumbnail", "u1", (THUMBNAIL_SIDE * THUMBNAIL_SIDE,)),
    ]
)
OBJECT_DTYPE = np.dtype(
    [
        ("sample", "<u4"),
        ("position", "<u4"),  # Among the annotations of its sample
        ("category_id", "<i8"),  # -1: none
        ("box", "<f8", (4,)),  # x, y, width, height in pixels; NaN where it is no box
        ("is_crowd", "?"),
        ("is_box", "?"),  # Four finite numbers, no negative width or height
    ]
)


@dataclass(frozen=True)
class ScanResult:
    """Images, objects and corrupt samples of a split."""

    images: npt.NDArray[np.void]  # [n] of IMAGE_DTYPE
    objects: npt.NDArray[np.void]  # [m] of OBJECT_DTYPE, in the order of samples
    corrupt: dict[int, str] = field(default_factory=dict)  # Sample -> the problem


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
    tasks = ((start, _slice(shards, slice(start, start + CHUNK))) for start in range(0, total, CHUNK))
    report = (lambda done: progress(done, total)) if progress else None
    with closing(run_tasks(_scan_slice, tasks, workers=num_processes, progress=report)) as results:
        scanned = list(results)
    return ScanResult(
        np.concatenate([result.images for result in scanned]),
        np.concatenate([result.objects for result in scanned]),
        {sample: problem for result in scanned for sample, problem in result.corrupt.items()},
    )


def _slice(shards: Shards, samples: slice) -> Shards:
    """Return shards with only these samples, so that little is sent to another process."""
    manifest = shards.manifest
    if manifest.third_party is not None:
        third_party = replace(manifest.third_party, keys=manifest.third_party.keys[samples])
        manifest = replace(manifest, third_party=third_party)
    return replace(shards, samples=shards.samples[samples], manifest=manifest)


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
            annotations: list[Any] = unchecked.annotations if unchecked else []
        else:
            annotations = sample.annotations
            try:
                _fill_row(images[index], sample.image)
            except UNREADABLE as error:
                corrupt[number] = f"its image cannot be decoded ({error})"
        objects += [_object_row(number, *numbered) for numbered in enumerate(annotations)]
        advance(1)
    return ScanResult(images, np.array(objects, OBJECT_DTYPE), corrupt)


def _fill_row(row: np.void, content: bytes) -> None:
    size, has_orientation, gradient_hash, thumbnail = image_signature(content)
    row["width"], row["height"] = size
    row["has_orientation"], row["gradient_hash"], row["thumbnail"] = has_orientation, gradient_hash, thumbnail
    row["digest"] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    row["is_read"] = True


def _object_row(sample: int, position: int, annotation: Any) -> tuple[Any, ...]:
    record = as_record(annotation)
    category_id, box = record.get("category_id"), record.get("bbox")
    if not isinstance(category_id, int) or not 0 <= category_id < 2**63:
        category_id = -1
    is_valid = is_box(box)
    numbers = tuple(box) if box is not None and is_valid else (math.nan,) * 4
    return sample, position, category_id, numbers, bool(record.get("iscrowd", 0)), is_valid


# --- Splits ---


@dataclass(frozen=True)
class Split:
    """A data set under a short name. The first of several is the training split."""

    name: str
    shards: Shards
    is_trained_on: bool

    def place(self, sample: int, annotations: tuple[int, ...] = ()) -> Place:
        """Describe a sample by its image id and file name."""
        image_id = int(self.shards.samples["image_id"][sample])
        raw = read_unchecked(self.shards, sample)
        file_name = str(raw.record.get("file_name", "")) if raw else ""
        return Place(self.name, sample, image_id, file_name, annotations)

    def examples(
        self, samples: Sequence[int] | Integers, detail: Callable[[int], str] = lambda _: ""
    ) -> tuple[Example, ...]:
        """Return the first of the samples as examples; `detail` describes a sample."""
        return tuple(Example((self.place(int(n)),), detail(int(n))) for n in samples[:MAX_EXAMPLES])

    @property
    def widths(self) -> Floats:
        """Widths of the images according to their records, [n] in pixels."""
        return self.shards.samples["width"].astype(np.float64)

    @property
    def heights(self) -> Floats:
        """Heights of the images according to their records, [n] in pixels."""
        return self.shards.samples["height"].astype(np.float64)


@dataclass(frozen=True)
class ScannedSplit:
    """A split with the result of its scan: n images, m objects."""

    split: Split
    scan: ScanResult

    @property
    def name(self) -> str:
        """Name of the split."""
        return self.split.name

    @cached_property
    def sizes(self) -> Floats:
        """Width and height of the image of each object, [m, 2] in pixels."""
        samples = self.scan.objects["sample"]
        return np.stack([self.split.widths[samples], self.split.heights[samples]], axis=1)

    @cached_property
    def visible_sides(self) -> Floats:
        """Width and height of each box inside its image, [m, 2] in pixels; not positive where it is outside."""
        boxes = self.scan.objects["box"]
        sides: Floats = np.minimum(boxes[:, :2] + boxes[:, 2:], self.sizes) - np.maximum(boxes[:, :2], 0)
        return sides

    @cached_property
    def is_known(self) -> Flags:
        """Flags of the objects whose category is in the list, [m]."""
        ids = [category["id"] for category in self.split.shards.manifest.categories]
        known: Flags = np.isin(self.scan.objects["category_id"], ids)
        return known

    @cached_property
    def is_usable(self) -> Flags:
        """Flags of the objects that training uses, [m]: no crowd, a known category, a box with area in the image."""
        objects = self.scan.objects
        with np.errstate(invalid="ignore"):
            is_visible = (self.visible_sides > 0).all(axis=1)
        usable: Flags = objects["is_box"] & ~objects["is_crowd"] & self.is_known & is_visible
        return usable

    @cached_property
    def objects_per_image(self) -> Integers:
        """Number of usable objects in each image, [n]."""
        return np.bincount(
            self.scan.objects["sample"][self.is_usable], minlength=self.split.shards.num_samples
        )

    def examples(self, chosen: Sequence[int] | Integers, *, boxes: bool = True) -> tuple[Example, ...]:
        """Return examples: some of the images with the chosen objects.

        Args:
            chosen: numbers of objects.
            boxes: describe the box of the first chosen object in each image.
        """
        by_sample: dict[int, list[int]] = {}
        for number in chosen:
            by_sample.setdefault(int(self.scan.objects["sample"][number]), []).append(int(number))
            if len(by_sample) > MAX_EXAMPLES:
                break
        found = []
        for sample, numbers in list(by_sample.items())[:MAX_EXAMPLES]:
            positions = tuple(int(self.scan.objects["position"][number]) for number in numbers)
            place = self.split.place(sample, positions)
            found.append(Example((place,), self._describe_box(numbers[0]) if boxes else ""))
        return tuple(found)

    def _describe_box(self, number: int) -> str:
        row = self.scan.objects[number]
        if not row["is_box"]:
            return f"annotation {row['position']} has the box {self._invalid_box(row)}"
        width, height = self.sizes[number]
        box = ", ".join(f"{side:g}" for side in row["box"].round(2))
        return f"box [{box}] in {width:g}x{height:g}"

    def _invalid_box(self, row: np.void) -> str:
        """Quote the value that the record has in place of a box."""
        raw = read_unchecked(self.split.shards, int(row["sample"]))
        record = as_record(raw.annotations[row["position"]]) if raw else {}
        return f"{record['bbox']!r:.60}" if "bbox" in record else "missing"
