"""Read the ground truth of an evaluation from shards, some of whose samples may be corrupt; keep it in a run's folder.

The segmentations, which are most of its bytes, are not used, and left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from raydetr.config import OnCorrupt
from raydetr.shards.reader import ShardError, Shards
from raydetr.shards.validation import InvalidDataError, RawSample, parse_record
from raydetr.store.folders import Folder, write_file
from raydetr.store.retry import RemoteError

IMAGE_FIELDS = ("id", "file_name", "width", "height")
ANNOTATION_FIELDS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
UNREADABLE = "num_unreadable_records"  # field of the stored ground truth


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
    images, annotations, num_unreadable = [], [], 0
    # One sample after the other: all of them, with their images, would not fit into memory
    for index, sample in enumerate(shards.read_in_order(range(shards.num_samples))):
        if policy == "raise" and isinstance(sample, ShardError):
            sample = shards.reread(index)
        record, own = _record(shards, index, sample)
        images.append(_only(record, IMAGE_FIELDS))
        annotations += [_only(annotation, ANNOTATION_FIELDS) for annotation in own or ()]
        num_unreadable += own is None
    coco = {
        **shards.manifest.header,
        "images": images,
        "annotations": annotations,
        "categories": shards.manifest.categories,
    }
    return GroundTruth(coco, num_unreadable)


def _only(record: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: record[name] for name in names if name in record}


def ground_truth_file(run: Folder, fingerprint: str) -> Folder:
    """Return the file of a run's folder with the ground truth of the shards with this fingerprint."""
    # Of the first images of a split: 0123456789abcdef[:100]
    name = fingerprint.replace("[:", "-").replace("]", "")
    return run / "evaluations" / f"ground-truth-{name}.json"


def store_ground_truth(run: Folder, shards: Shards, policy: OnCorrupt) -> int:
    """Write the ground truth of shards into a run's folder, unless it is there.

    Returns:
        The number of records that cannot be read. While there are any, the file is written again by every call.

    Raises:
        ShardError: the policy is "raise", and a sample is corrupt.
        RemoteError: a server cannot be reached.
        OSError: the file cannot be written.
    """
    file = ground_truth_file(run, shards.fingerprint)
    with suppress(FileNotFoundError, ValueError):
        if json.loads(file.read_text())[UNREADABLE] == 0:
            return 0
    truth = ground_truth(shards, policy)
    content = {UNREADABLE: truth.num_unreadable_records, **truth.coco}
    write_file(file, json.dumps(content, separators=(",", ":"), allow_nan=False).encode())
    return truth.num_unreadable_records


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
