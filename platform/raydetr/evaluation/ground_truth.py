"""Read the ground truth of an evaluation from shards, some of whose samples may be corrupt."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from raydetr.config import OnCorrupt
from raydetr.shards.reader import ShardError, Shards
from raydetr.shards.validation import InvalidDataError, RawSample, parse_record
from raydetr.store.retry import RemoteError


@dataclass(frozen=True)
class GroundTruth:
    """The COCO ground truth of a split."""

    coco: dict[str, Any]
    num_unreadable_records: int  # images whose record, and so their annotations, cannot be read


def ground_truth(shards: Shards, policy: OnCorrupt) -> GroundTruth:
    """Read the ground truth for an evaluation. It includes corrupt images, so that their objects count as missed.

    Raises:
        ShardError: the policy is "raise", and a sample is corrupt.
        RemoteError: a server cannot be reached.
    """
    if policy == "raise":
        return GroundTruth(shards.coco(), 0)
    samples = enumerate(shards.read_in_order(range(shards.num_samples)))
    records = [_record(shards, index, sample) for index, sample in samples]
    coco = {
        **shards.manifest.header,
        "images": [record for record, _ in records],
        "annotations": [annotation for _, annotations in records for annotation in annotations or ()],
        "categories": shards.manifest.categories,
    }
    return GroundTruth(coco, sum(annotations is None for _, annotations in records))


def evaluation_warnings(num_unpredicted: int, num_unreadable_records: int) -> list[str]:
    """Describe the effect of corrupt images on AP, one line per effect."""
    lines = []
    if num_unpredicted:
        lines.append(f"{num_unpredicted} corrupt validation images have no predictions: AP may be too low")
    if num_unreadable_records:
        lines.append(
            f"the annotations of {num_unreadable_records} of them cannot be read: their objects do not count as missed"
        )
    return lines


def _record(
    shards: Shards, index: int, raw: RawSample | ShardError
) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """Return the record and annotations of an image; None for annotations that cannot be read."""
    if isinstance(raw, ShardError):
        with suppress(ShardError):
            raw = shards.reread(index)
    if not isinstance(raw, ShardError):
        return raw.record, raw.annotations
    row = shards.samples[index]
    try:
        start = int(row["offset"]) + int(row["json_offset"])
        text = shards.files.read(int(row["shard"]), start, int(row["json_length"]))
        return parse_record(row, text, shards.category_ids)
    except RemoteError:
        raise  # an unreachable server does not make a sample corrupt
    except (OSError, InvalidDataError):
        size = {"width": int(row["width"]), "height": int(row["height"])}
        return {"id": int(row["image_id"]), "file_name": shards.key(index), **size}, None
