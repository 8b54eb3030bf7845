"""How an image looks, in a few bytes that a copy of it shares: recompressed, resized, a little brighter.

Two views of the gray picture. The *gradient hash* has 64 bits: for each of 8x8 cells, whether the next one at the
right is brighter; it can be searched. The *thumbnail* has 16x16 gray values; it decides. Both are taken from a
picture that the JPEG decoder itself has reduced, at half the cost of a full decode.

Samples as they are, also those that the reader refuses: the doctor shows what is wrong with them.

Read every sample once, in parallel processes, and keep what the examinations need: a few arrays.

One of the data sets that are examined, with what its samples showed.
"""

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

from raydetr.doctor.findings import MAX_EXAMPLES, Example, Place
from raydetr.process_pool import run_tasks
from raydetr.shards.images import EXIF_ORIENTATION, FORMATS, UNREADABLE, decode_rgb
from raydetr.shards.reader import ShardError, Shards
from raydetr.shards.validation import InvalidDataError, RawSample, parse_content

SIDE = 16  # of a thumbnail
HASH_SIZE = (9, 8)  # width, height
REDUCED_SIDE = 64  # pixels; JPEGs are decoded to at least that

Bytes = npt.NDArray[np.uint8]

ImageSignature = tuple[tuple[int, int], bool, int, Bytes]


def image_signature(content: bytes) -> ImageSignature:
    """Size as stored (width, height), whether EXIF turns it, gradient hash, thumbnail [SIDE * SIDE].

    Raises:
        OSError, or another of UNREADABLE: the image cannot be decoded.
    """
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    size, turned = image.size, _is_turned(image)
    if image.format == "JPEG":
        image.draft("L", (REDUCED_SIDE, REDUCED_SIDE))
        gray = image.convert("L")
    else:
        gray = decode_rgb(content).convert("L")
    # a reduced picture has whole pixels only; without the exact border, copies of other sizes would look shifted
    reduction = max(1, round(size[0] / gray.width))
    box = (0, 0, min(size[0] / reduction, gray.width), min(size[1] / reduction, gray.height))
    small = np.asarray(gray.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box))
    cells = np.asarray(gray.resize(HASH_SIZE, Image.Resampling.BILINEAR, box=box))
    bits = np.packbits(cells[:, 1:] > cells[:, :-1])
    return size, turned, int.from_bytes(bits.tobytes(), "little"), small.ravel()


def _is_turned(image: Image.Image) -> bool:
    try:
        return bool(image.getexif().get(EXIF_ORIENTATION, 1) != 1)
    except (*UNREADABLE, TypeError, KeyError):
        return False  # damaged metadata; the pixels may be fine


def read_anyway(shards: Shards, index: int) -> RawSample | None:
    """A sample whose bytes are those that were packed, whatever its records hold; None: it is damaged."""
    try:
        return shards.read(index)
    except ShardError:
        return refused_sample(shards, index)


def refused_sample(shards: Shards, index: int) -> RawSample | None:
    """The same, of a sample that was read in vain."""
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
    except (OSError, InvalidDataError):
        return None


def is_box(value: object) -> bool:
    """Whether it is [x, y, width, height]: four finite numbers, no negative size."""
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(side, int | float) and math.isfinite(side) for side in value)
        and min(value[2:]) >= 0
    )


def as_record(annotation: Any) -> dict[str, Any]:
    """The annotation, or nothing where it is no object."""
    return annotation if isinstance(annotation, dict) else {}


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
class ScanResult:
    """What was seen in the samples of a split."""

    images: npt.NDArray[np.void]  # [n] of IMAGE_DTYPE
    objects: npt.NDArray[np.void]  # [m] of OBJECT_DTYPE, in the order of samples
    corrupt: dict[int, str] = field(default_factory=dict)  # sample -> what is wrong with it


def scan(shards: Shards, *, progress: Progress | None = None, num_processes: int | None = None) -> ScanResult:
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
        scan = list(scanned)
    return ScanResult(
        np.concatenate([part.images for part in scan]),
        np.concatenate([part.objects for part in scan]),
        {sample: fault for part in scan for sample, fault in part.corrupt.items()},
    )


def _part(shards: Shards, samples: slice) -> Shards:
    """Some of the samples only: little to send to another process."""
    manifest = shards.manifest
    if manifest.foreign is not None:
        foreign = replace(manifest.foreign, keys=manifest.foreign.keys[samples])
        manifest = replace(manifest, foreign=foreign)
    return replace(shards, samples=shards.samples[samples], manifest=manifest)


def _scan_part(task: tuple[int, Shards], advance: Callable[[int], None]) -> ScanResult:
    """Read some samples, of which the first has the given number."""
    start, shards = task
    images = np.zeros(shards.num_samples, IMAGE_DTYPE)
    objects: list[tuple[Any, ...]] = []
    corrupt: dict[int, str] = {}
    for index, sample in enumerate(shards.read_many(range(shards.num_samples))):
        number = start + index
        if isinstance(sample, ShardError):
            corrupt[number] = sample.reason
            refused = refused_sample(shards, index)
            annotations: list[Any] = refused.annotations if refused else []
        else:
            annotations = sample.annotations
            try:
                _fill(images[index], sample.image)
            except UNREADABLE as error:
                corrupt[number] = f"its image cannot be decoded ({error})"
        objects += [_object(number, place, annotation) for place, annotation in enumerate(annotations)]
        advance(1)
    return ScanResult(images, np.array(objects, OBJECT_DTYPE), corrupt)


def _fill(row: np.void, content: bytes) -> None:
    size, turned, gradients, thumbnail = image_signature(content)
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


Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Split:
    """A data set under its short name. The first of several is that which is trained on."""

    name: str
    shards: Shards
    is_trained_on: bool

    def place(self, sample: int, annotations: tuple[int, ...] = ()) -> Place:
        """Where a sample is, in the user's terms."""
        image_id = int(self.shards.samples["image_id"][sample])
        read = read_anyway(self.shards, sample)
        file_name = str(read.record.get("file_name", "")) if read else ""
        return Place(self.name, sample, image_id, file_name, annotations)

    def example(self, sample: int, detail: str = "") -> Example:
        """One sample as an example."""
        return Example((self.place(int(sample)),), detail)

    @property
    def widths(self) -> Floats:
        """Of the images, [n] in pixels, as their records say."""
        return self.shards.samples["width"].astype(np.float64)

    @property
    def heights(self) -> Floats:
        """Of the images, [n] in pixels, as their records say."""
        return self.shards.samples["height"].astype(np.float64)


@dataclass(frozen=True)
class ScannedSplit:
    """A split and what was seen in its samples."""

    split: Split
    scan: ScanResult

    @property
    def name(self) -> str:
        """Of the split."""
        return self.split.name

    @cached_property
    def sizes(self) -> Floats:
        """Width and height of the image of each object, [m, 2] in pixels."""
        samples = self.scan.objects["sample"]
        return np.stack([self.split.widths[samples], self.split.heights[samples]], axis=1)

    @cached_property
    def visible(self) -> Floats:
        """The sides of the part of each box that its image shows, [m, 2] in pixels; not positive: nothing."""
        boxes = self.scan.objects["box"]
        sides: Floats = np.minimum(boxes[:, :2] + boxes[:, 2:], self.sizes) - np.maximum(boxes[:, :2], 0)
        return sides

    @cached_property
    def is_known(self) -> Flags:
        """Whether each object has a category of the list, [m]."""
        ids = [category["id"] for category in self.split.shards.manifest.categories]
        known: Flags = np.isin(self.scan.objects["category_id"], ids)
        return known

    @cached_property
    def is_usable(self) -> Flags:
        """Whether training uses each object, [m]: no crowd, a known category, a box with area in the image."""
        objects = self.scan.objects
        with np.errstate(invalid="ignore"):
            seen = (self.visible > 0).all(axis=1)
        usable: Flags = objects["is_box"] & ~objects["is_crowd"] & self.is_known & seen
        return usable

    @cached_property
    def objects_per_image(self) -> npt.NDArray[np.int64]:
        """Usable objects of each image, [n]."""
        return np.bincount(
            self.scan.objects["sample"][self.is_usable], minlength=self.split.shards.num_samples
        )

    def examples(
        self, chosen: Sequence[int] | npt.NDArray[np.int64], *, boxes: bool = True
    ) -> tuple[Example, ...]:
        """Some of the images that have the objects with these numbers.

        Args:
            chosen: numbers of objects.
            boxes: tell the boxes of the first object in each image.
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
            found.append(Example((place,), self._box_text(numbers[0]) if boxes else ""))
        return tuple(found)

    def _box_text(self, number: int) -> str:
        row = self.scan.objects[number]
        if not row["is_box"]:
            return f"annotation {row['position']} has the box {self._stated(row)}"
        width, height = self.sizes[number]
        box = ", ".join(f"{side:g}" for side in row["box"].round(2))
        return f"box [{box}] in {width:g}x{height:g}"

    def _stated(self, row: np.void) -> str:
        """What the record has in place of a box."""
        read = read_anyway(self.split.shards, int(row["sample"]))
        record = as_record(read.annotations[row["position"]]) if read else {}
        return f"{record['bbox']!r:.60}" if "bbox" in record else "missing"
