"""Validate samples, index and manifest before other code relies on them.

A crc32 detects accidental changes. The checks here also detect invalid data with a matching crc32: an index of other
shards, a member of another sample, a record that is not COCO's. They raise `InvalidDataError`, which describes the
problem; the caller adds the location.
"""

from __future__ import annotations

import zlib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from raydetr.shards.coco import Problems, annotation_problems, checked_categories, listed
from raydetr.shards.manifest import FORMAT_VERSION, SAMPLE_DTYPE, Manifest, Samples
from raydetr.user_files import parse_json

TAR_BLOCK = 512

Records = tuple[dict[str, Any], list[dict[str, Any]]]  # COCO's record of the image, and its annotations


class InvalidDataError(ValueError):
    """Invalid data; the message describes the problem, the caller adds the location."""


@dataclass(frozen=True)
class RawSample:
    """A sample as packed: encoded image and COCO records."""

    key: str
    image: bytes  # JPEG or PNG
    record: dict[str, Any]  # COCO's record of the image
    annotations: list[dict[str, Any]]  # COCO's records of its objects


def parse_sample(row: np.void, key: str, raw: bytes, category_ids: Container[int]) -> RawSample:
    """Parse the bytes of a sample and verify them against its row in the index.

    Args:
        row: its row in the index, of SAMPLE_DTYPE.
        key: expected key of its members.
        raw: bytes that were read for it.
        category_ids: category ids that annotations may have.

    Raises:
        InvalidDataError: it is truncated or corrupt, belongs to another image, or its record is not COCO's.
    """
    _, _, length, image_at, image_length, json_at, json_length, *_, crc32 = row.item()
    if len(raw) != length:
        raise InvalidDataError(f"the shard ends after {len(raw)} of its {length} bytes")
    if zlib.crc32(raw) != crc32:
        raise InvalidDataError(f"its crc32 is {zlib.crc32(raw):#010x}, the index has {crc32:#010x}")
    for what, at, size in (("image", image_at, image_length), ("record", json_at, json_length)):
        found = member_at(raw, at)
        if found != (key, size):
            raise InvalidDataError(f"its {what} has key and size {found}, the index has {(key, size)}")
    record, annotations = parse_record(row, raw[json_at : json_at + json_length], category_ids)
    return RawSample(key, raw[image_at : image_at + image_length], record, annotations)


def parse_record(row: np.void, text: bytes, category_ids: Container[int]) -> Records:
    """Parse a sample's JSON member and verify it against its row in the index.

    Raises:
        InvalidDataError: it does not match the row, or is not COCO's.
    """
    record, annotations = parse_content(text)
    image_id, count = int(row["image_id"]), int(row["num_annotations"])
    for name, value in (("id", image_id), ("width", int(row["width"])), ("height", int(row["height"]))):
        if record.get(name) != value:
            raise InvalidDataError(
                f"its record has the {name} {record.get(name)!r:.40}, the index has {value}"
            )
    if len(annotations) != count:
        raise InvalidDataError(f"it has {len(annotations)} annotations, the index has {count}")
    for number, annotation in enumerate(annotations):
        _check_annotation(number, annotation, image_id, category_ids)
    return record, annotations


def parse_content(text: bytes) -> Records:
    """Parse a sample's JSON member without comparing it with the index.

    Raises:
        InvalidDataError: it is not JSON, or has another structure.
    """
    try:
        content = parse_json(text)
    except ValueError as error:
        raise InvalidDataError(f"its record is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InvalidDataError(f"its record is a {type(content).__name__}, not an object")
    for name, kind in (("image", dict), ("annotations", list)):
        if not isinstance(content.get(name), kind):
            raise InvalidDataError(f"{name!r} in its record is {content.get(name)!r:.40}")
    return content["image"], content["annotations"]


def parse_manifest(content: bytes) -> Manifest:
    """Parse the content of a `manifest.json`, and verify what reading relies on.

    Raises:
        ValueError, InvalidDataError: it is corrupt or has another format version; the message names the invalid part.
    """
    try:
        values = parse_json(content)
        version = values.get("format_version") if isinstance(values, dict) else None
        if version is not None and version != FORMAT_VERSION:
            raise ValueError(f"format_version is {version!r:.40}, this program reads {FORMAT_VERSION}")
        manifest = TypeAdapter(Manifest).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r:.80}"
        raise ValueError(f"is not a manifest of shards ({found})") from None
    except ValueError as error:
        raise ValueError(f"is not a manifest of shards ({error})") from None
    names = [shard.name for shard in manifest.shards]
    if not names:
        raise InvalidDataError("it has no shards")
    for name in names:
        if name != PurePath(name).name or not name.isprintable():
            raise InvalidDataError(f"{name!r:.80} is not a valid file name of a shard")
    if len(set(names)) < len(names):
        raise InvalidDataError("it names a shard twice")
    check_categories(manifest.categories)
    if not {"name", "sha256"} <= set(manifest.source):
        raise InvalidDataError(f"source is {manifest.source!r:.80}, without name or sha256")
    return manifest


def check_categories(categories: Sequence[Any]) -> None:
    """Verify that these are COCO's category records, sorted by their ids.

    Raises:
        InvalidDataError: they are not.
    """
    if not isinstance(categories, list) or not categories:
        raise InvalidDataError("it has no categories")
    problems = Problems("the categories", "problem")
    ids = list(checked_categories(categories, problems))
    if problems.count:
        raise InvalidDataError(problems.messages[0])
    if ids != sorted(ids):
        raise InvalidDataError("its categories are not sorted by their ids")


def check_index(samples: Samples, manifest: Manifest) -> None:
    """Verify that the rows of an index lie within the shards of the manifest and match its counts.

    Raises:
        InvalidDataError: they do not; the message names the first such row.
    """
    if samples.ndim != 1 or not len(samples):
        raise InvalidDataError(f"it is an array of shape {samples.shape}")
    if int(samples["shard"].max()) >= len(manifest.shards):
        raise InvalidDataError(
            f"it names shard {samples['shard'].max()}, the manifest has {len(manifest.shards)}"
        )
    counts = np.bincount(samples["shard"], minlength=len(manifest.shards)).tolist()
    stated = [shard.num_samples for shard in manifest.shards]
    num_annotations = int(samples["num_annotations"].sum(dtype=np.int64))
    if counts != stated or len(samples) != manifest.num_samples:
        raise InvalidDataError(
            f"it has {listed(counts)} samples in the shards, the manifest has {listed(stated)}"
        )
    if num_annotations != manifest.num_annotations:
        raise InvalidDataError(
            f"it has {num_annotations} annotations, the manifest has {manifest.num_annotations}"
        )
    sizes = np.array([shard.size for shard in manifest.shards], np.float64)[samples["shard"]]
    # In float64 the sums below cannot wrap around.
    column = {name: samples[name].astype(np.float64) for name in SAMPLE_DTYPE.names or ()}
    valid = column["offset"] + column["length"] <= sizes
    for part in ("image", "json"):
        valid &= column[f"{part}_offset"] >= TAR_BLOCK
        valid &= column[f"{part}_offset"] + column[f"{part}_length"] <= column["length"]
    valid &= (column["width"] > 0) & (column["height"] > 0)
    # Samples must be sorted by shard, which the training order relies on, and must not overlap.
    follows = column["shard"][1:] > column["shard"][:-1]
    after = column["offset"][1:] >= (column["offset"] + column["length"])[:-1]
    valid[1:] &= follows | (after & (column["shard"][1:] == column["shard"][:-1]))
    if not valid.all():
        first = samples[int(np.argmin(valid))]
        raise InvalidDataError(
            f"image {first['image_id']} cannot lie in {manifest.shards[first['shard']].name} at "
            f"byte {first['offset']} with {first['length']} bytes"
        )
    if len(np.unique(samples["image_id"])) != len(samples):
        raise InvalidDataError("it has an image id twice")


def member_at(raw: bytes, content_at: int) -> tuple[str, int | None]:
    """Return key and size of a tar member in no folder, from the header block before its content."""
    header = raw[content_at - TAR_BLOCK : content_at]
    try:
        size = int(header[124:136].rstrip(b" \0"), 8)
    except ValueError:
        size = None
    return header[:100].partition(b".")[0].decode(errors="replace"), size


def _check_annotation(number: int, annotation: Any, image_id: int, category_ids: Container[int]) -> None:
    if not isinstance(annotation, dict):
        raise InvalidDataError(f"annotation {number} of its record is {annotation!r:.200}")
    problems = annotation_problems(annotation)
    if problems:
        raise InvalidDataError(f"annotation {number} of its record: {problems[0]}")
    if annotation["image_id"] != image_id or annotation["category_id"] not in category_ids:
        raise InvalidDataError(
            f"annotation {number} of its record has another image or category: {annotation!r:.200}"
        )
