"""Index one shard that others wrote: every sample is read and checked as when shards are written."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from raydetr.process_pool import Advance
from raydetr.shards.coco import MAX_REPORTED
from raydetr.shards.images import check_image
from raydetr.shards.manifest import SAMPLE_DTYPE, RecordFormat, Samples, ShardFile
from raydetr.shards.tar_samples import TarSample, tar_samples
from raydetr.shards.third_party.record_formats import Record, unpack
from raydetr.shards.validation import InvalidDataError, member_at

IMAGES = ("jpg", "jpeg", "png")


@dataclass(frozen=True)
class IndexTask:
    """A shard to index."""

    number: int
    path: Path
    form: RecordFormat


@dataclass
class IndexedShard:
    """What is in a shard. The ids of images and annotations are settled when all shards are known."""

    name: str
    file: ShardFile | None = None
    rows: list[tuple[int, ...]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    image_ids: list[Any] = field(default_factory=list)  # as the records have them
    annotation_ids: list[Any] = field(default_factory=list)
    labels: Counter[int | str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)  # extensions of other members
    num_turned: int = 0
    num_without_area: int = 0
    largest: float = 0.0  # coordinate of a box
    num_faults: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def samples(self) -> Samples:
        """The rows of the index, with ids that are still to be set."""
        return np.array(self.rows, dtype=SAMPLE_DTYPE)

    def note(self, fault: str) -> None:
        """Count a fault, and keep the first ones."""
        self.num_faults += 1
        if self.num_faults <= MAX_REPORTED:
            self.faults.append(f"{self.name}: {fault}")


def index_foreign(task: IndexTask, advance: Advance) -> IndexedShard:
    """Index the samples of a shard; what is wrong with them is noted, and does not stop the others."""
    shard = IndexedShard(task.path.name)
    seen: set[str] = set()
    at, size = 0, task.path.stat().st_size
    try:
        with task.path.open("rb") as file:
            for sample in tar_samples(task.path):
                try:
                    if sample.key in seen:
                        raise InvalidDataError(
                            "its members do not lie together: sort them, for example with tar --sort=name"
                        )
                    seen.add(sample.key)
                    _index_sample(shard, task, sample, file)
                except ValueError as error:
                    shard.note(f"sample {sample.key}: {error}")
                advance(sample.end - at)
                at = sample.end
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, InvalidDataError) as error:
        shard.note(str(error))
        return shard
    finally:
        advance(size - at)
    if not seen:
        shard.note("holds no samples")
    shard.file = ShardFile(task.path.name, len(shard.rows), size, digest)
    return shard


def image_and_record(sample: TarSample) -> tuple[str, str]:
    """The extensions of a sample's image and of its JSON.

    Raises:
        Fault: there is not one of each.
    """
    images = [extension for extension in sample.members if extension in IMAGES]
    if len(images) != 1 or "json" not in sample.members:
        found = ", ".join(f".{extension}" for extension in sample.members)
        raise InvalidDataError(
            f"its members are {found}: one image (.jpg, .jpeg or .png) and one .json are needed"
        )
    return images[0], "json"


def read_content(file: BinaryIO, sample: TarSample) -> Any:
    """A sample's parsed JSON.

    Raises:
        Fault: it is not JSON.
    """
    member = sample.members["json"]
    file.seek(member.offset_data)
    try:
        return json.loads(file.read(member.size))
    except (ValueError, RecursionError) as error:
        raise InvalidDataError(f"its record is not JSON ({error})") from None


def _index_sample(shard: IndexedShard, task: IndexTask, sample: TarSample, file: BinaryIO) -> None:
    parts = TarSample(sample.key, {name: sample.members[name] for name in image_and_record(sample)})
    image, record = parts.members.values()
    file.seek(parts.begin)
    raw = file.read(parts.end - parts.begin)
    for member in (image, record):
        if member_at(raw, member.offset_data - parts.begin) != (sample.key, member.size):
            raise InvalidDataError("its name needs an extended tar header: give it at most 100 characters")
    content = raw[image.offset_data - parts.begin :][: image.size]
    fields, objects = unpack(read_content(file, sample), task.form)
    size, _, turned = check_image("its image", content, _stated_size(fields))
    _note_objects(shard, objects, task.form)
    offsets = [
        value for member in (image, record) for value in (member.offset_data - parts.begin, member.size)
    ]
    row = (task.number, parts.begin, len(raw), *offsets, *size, len(objects), 0, zlib.crc32(raw))
    shard.rows.append(row)
    shard.keys.append(sample.key)
    shard.image_ids.append(fields.get("id", fields.get("image_id")))
    shard.num_turned += turned
    shard.ignored.update(extension for extension in sample.members if extension not in parts.members)


def _stated_size(fields: Record) -> tuple[int, int] | None:
    width, height = fields.get("width"), fields.get("height")
    if width is None or height is None:
        return None
    if not isinstance(width, int) or not isinstance(height, int):
        raise InvalidDataError(
            f"its width and height are {width!r:.40} and {height!r:.40}, not numbers of pixels"
        )
    return width, height


def _note_objects(shard: IndexedShard, objects: list[Record], form: RecordFormat) -> None:
    for number, item in enumerate(objects):
        if item.get("iscrowd", 0) not in (0, 1):
            raise InvalidDataError(f"object {number}: iscrowd is {item['iscrowd']!r:.40}, neither 0 nor 1")
        area = item.get("area", 0)
        if not isinstance(area, int | float) or isinstance(area, bool) or not 0 <= area < float("inf"):
            raise InvalidDataError(f"object {number}: area is {area!r:.40}, not a number of pixels")
    for item in objects:
        x, y, width, height = item["bbox"]
        shard.labels[item["label"]] += 1
        shard.largest = max(shard.largest, x + width, y + height)
        shard.num_without_area += "area" not in item
        if form.kind == "coco":
            shard.annotation_ids.append(item.get("id"))
