"""Index one third-party shard: read every sample and apply the same checks as when writing shards."""

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
    record_format: RecordFormat


@dataclass
class IndexedShard:
    """The content of a shard. Image and annotation ids are assigned when all shards are indexed."""

    name: str
    file: ShardFile | None = None
    rows: list[tuple[int, ...]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    image_ids: list[Any] = field(default_factory=list)  # as in the records
    annotation_ids: list[Any] = field(default_factory=list)
    labels: Counter[int | str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)  # extensions of other members
    num_rotated: int = 0
    num_without_area: int = 0
    max_coordinate: float = 0.0  # of all boxes
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)  # the first ones

    @property
    def samples(self) -> Samples:
        """Rows of the index, without image ids."""
        return np.array(self.rows, dtype=SAMPLE_DTYPE)

    def add(self, problem: str) -> None:
        """Count a problem; keep the first messages."""
        self.num_problems += 1
        if self.num_problems <= MAX_REPORTED:
            self.problems.append(f"{self.name}: {problem}")


def index_third_party(task: IndexTask, advance: Advance) -> IndexedShard:
    """Index the samples of a shard; collect the problems of invalid ones and continue with the others."""
    shard = IndexedShard(task.path.name)
    seen: set[str] = set()
    at, size = 0, task.path.stat().st_size
    try:
        with task.path.open("rb") as file:
            for sample in tar_samples(task.path):
                try:
                    if sample.key in seen:
                        raise InvalidDataError(
                            "its members are not consecutive: sort them, for example with tar --sort=name"
                        )
                    seen.add(sample.key)
                    _index_sample(shard, task, sample, file)
                except ValueError as error:
                    shard.add(f"sample {sample.key}: {error}")
                advance(sample.end - at)
                at = sample.end
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, InvalidDataError) as error:
        shard.add(str(error))
        return shard
    finally:
        advance(size - at)
    if not seen:
        shard.add("holds no samples")
    shard.file = ShardFile(task.path.name, len(shard.rows), size, digest)
    return shard


def image_and_record(sample: TarSample) -> tuple[str, str]:
    """Return the extensions of a sample's image and of its JSON.

    Raises:
        InvalidDataError: there is not exactly one of each.
    """
    images = [extension for extension in sample.members if extension in IMAGES]
    if len(images) != 1 or "json" not in sample.members:
        found = ", ".join(f".{extension}" for extension in sample.members)
        raise InvalidDataError(
            f"its members are {found}: one image (.jpg, .jpeg or .png) and one .json are needed"
        )
    return images[0], "json"


def read_content(file: BinaryIO, sample: TarSample) -> Any:
    """Read and parse a sample's JSON.

    Raises:
        InvalidDataError: it is not JSON.
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
    fields, objects = unpack(read_content(file, sample), task.record_format)
    size, _, rotated = check_image("its image", content, _stated_size(fields))
    _add_objects(shard, objects, task.record_format)
    offsets = [
        value for member in (image, record) for value in (member.offset_data - parts.begin, member.size)
    ]
    row = (task.number, parts.begin, len(raw), *offsets, *size, len(objects), 0, zlib.crc32(raw))
    shard.rows.append(row)
    shard.keys.append(sample.key)
    shard.image_ids.append(fields.get("id", fields.get("image_id")))
    shard.num_rotated += rotated
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


def _add_objects(shard: IndexedShard, objects: list[Record], record_format: RecordFormat) -> None:
    for number, item in enumerate(objects):
        if item.get("iscrowd", 0) not in (0, 1):
            raise InvalidDataError(f"object {number}: iscrowd is {item['iscrowd']!r:.40}, neither 0 nor 1")
        area = item.get("area", 0)
        if not isinstance(area, int | float) or isinstance(area, bool) or not 0 <= area < float("inf"):
            raise InvalidDataError(f"object {number}: area is {area!r:.40}, not a number of pixels")
    for item in objects:
        x, y, width, height = item["bbox"]
        shard.labels[item["label"]] += 1
        shard.max_coordinate = max(shard.max_coordinate, x + width, y + height)
        shard.num_without_area += "area" not in item
        if record_format.kind == "coco":
            shard.annotation_ids.append(item.get("id"))
