"""Samples as they are, also those that the reader refuses: the doctor shows what is wrong with them."""

from __future__ import annotations

import math
import zlib
from typing import Any

from raydetr.shards.reader import ShardError, Shards
from raydetr.shards.validation import Fault, RawSample, parse_content


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
    except (OSError, Fault):
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
