"""The ground truth of an evaluation, from the shards, also where some of their samples are damaged."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from raydetr.config import OnCorrupt
from raydetr.shards.reader import ShardError, Shards
from raydetr.shards.validation import InvalidDataError, RawSample, parse_record
from raydetr.store.transfer import RemoteError


@dataclass(frozen=True)
class GroundTruth:
    """COCO's ground truth of a split, and how many of its images lost their annotations with their record."""

    coco: dict[str, Any]
    num_lost: int


def ground_truth(shards: Shards, policy: OnCorrupt) -> GroundTruth:
    """The ground truth for an evaluation. A damaged image stays in it, so that its objects count as missed.

    Raises:
        ShardError: the policy is "raise", and a sample is damaged.
        RemoteError: a server cannot be reached.
    """
    if policy == "raise":
        return GroundTruth(shards.coco(), 0)
    everything = range(shards.num_samples)
    found = zip(everything, shards.read_in_order(everything), strict=True)
    records = [_record(shards, index, sample) for index, sample in found]
    coco = {
        **shards.manifest.header,
        "images": [record for record, _ in records],
        "annotations": [annotation for _, annotations in records for annotation in annotations or ()],
        "categories": shards.manifest.categories,
    }
    return GroundTruth(coco, sum(annotations is None for _, annotations in records))


def caveats(num_unpredicted: int, num_lost: int) -> list[str]:
    """What damaged images mean for an AP, in sentences."""
    lines = []
    if num_unpredicted:
        lines.append(
            f"{num_unpredicted} damaged validation images have no predictions: AP is too low, if anything"
        )
    if num_lost:
        lines.append(
            f"of {num_lost} of them the annotations are lost too: their objects are not counted as missed"
        )
    return lines


def _record(
    shards: Shards, index: int, raw: RawSample | ShardError
) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """An image's record and annotations; of a damaged one, if they can still be read, else None."""
    if isinstance(raw, ShardError):
        with suppress(ShardError):
            raw = shards.reread(index)
    if not isinstance(raw, ShardError):
        return raw.record, raw.annotations
    row = shards.samples[index]
    try:
        start = int(row["offset"]) + int(row["json_offset"])
        text = shards.files.read(int(row["shard"]), start, int(row["json_length"]))
        return parse_record(row, text, shards.category_ids, shards.convert(index))
    except RemoteError:
        raise  # a server that cannot be reached is no damage
    except (OSError, InvalidDataError):
        size = {"width": int(row["width"]), "height": int(row["height"])}
        return {"id": int(row["image_id"]), "file_name": shards.key(index), **size}, None
