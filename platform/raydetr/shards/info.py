"""Summarize a folder of shards: `raydetr shards info`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from raydetr.locations import is_remote
from raydetr.process_pool import Progress
from raydetr.shards.reader import Shards
from raydetr.shards.validation import InvalidDataError, parse_content

PERCENTILES = {0: "min", 5: "5%", 50: "median", 95: "95%", 100: "max"}
COLUMNS = {"width": "width", "height": "height", "annotations": "num_annotations", "bytes": "length"}


def describe(shards: Shards, progress: Progress | None = None) -> dict[str, Any]:
    """Return a summary that can be written as JSON.

    Annotations are counted per category only for local shards, because this reads every record.

    Args:
        shards: the shards to describe.
        progress: called with (images done, total images).

    Raises:
        ShardError: a record cannot be read.
    """
    manifest, samples = shards.manifest, shards.samples
    counts = {} if is_remote(shards.location) else _count_categories(shards, progress)
    return {
        "location": shards.location,
        "fingerprint": manifest.fingerprint,
        "images": manifest.num_samples,
        "annotations": manifest.num_annotations,
        "images_without_annotations": int((samples["num_annotations"] == 0).sum()),
        "shards": len(manifest.shards),
        "samples_per_shard": manifest.samples_per_shard,
        "bytes": sum(shard.size for shard in manifest.shards),
        "source": manifest.source,
        "usable_objects": manifest.num_usable,
        "categories": [
            {"id": category["id"], "name": category["name"], "annotations": counts.get(category["id"])}
            for category in manifest.categories
        ],
        "percentiles": {name: _percentiles(samples[column]) for name, column in COLUMNS.items()},
        "notices": manifest.notices,
    }


def to_text(info: dict[str, Any]) -> str:
    """Format the summary as lines for a terminal."""
    source = info["source"]
    lines = [
        f"location     {info['location']}",
        f"fingerprint  {info['fingerprint']}",
        f"source       {source['name']}, sha256 {source['sha256'][:12]}...",
        f"images       {info['images']:,} ({info['images_without_annotations']:,} without annotations)",
        f"annotations  {info['annotations']:,} ({info['usable_objects']:,} of them train)",
        f"shards       {info['shards']:,} of up to {info['samples_per_shard']:,} images, "
        f"{info['bytes'] / 2**20:,.1f} MiB",
        "",
        "per image    " + "".join(f"{name:>12}" for name in PERCENTILES.values()),
    ]
    for name, values in info["percentiles"].items():
        lines.append(f"{name:<13}" + "".join(f"{value:>12,}" for value in values.values()))
    lines += ["", f"{'category':<30}{'id':>6}{'annotations':>13}"]
    for category in info["categories"]:
        count = "-" if category["annotations"] is None else f"{category['annotations']:,}"
        lines.append(f"{category['name']:<30}{category['id']:>6}{count:>13}")
    return "\n".join([*lines, *(f"note: {notice}" for notice in info["notices"])])


def _count_categories(shards: Shards, progress: Progress | None) -> dict[int, int]:
    """Return the number of annotations of each category."""
    counts = dict.fromkeys(shards.category_ids, 0)
    for index, row in enumerate(shards.samples):
        start = int(row["offset"]) + int(row["json_offset"])
        try:
            text = shards.files.read(int(row["shard"]), start, int(row["json_length"]))
            for annotation in parse_content(text)[1]:
                counts[annotation["category_id"]] += 1
        except (OSError, InvalidDataError, KeyError, TypeError) as error:
            raise shards.corrupt(index, str(error)) from None
        if progress:
            progress(index + 1, shards.num_samples)
    return counts


def _percentiles(column: npt.NDArray[Any]) -> dict[str, int]:
    return {str(percent): int(np.percentile(column, percent, method="lower")) for percent in PERCENTILES}
