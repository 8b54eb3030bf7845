"""Write the shards of small data sets of drawn shapes."""

from __future__ import annotations

from pathlib import Path

from raydetr.shards.source import coco_source
from raydetr.shards.synthetic import write_synthetic_data
from raydetr.shards.writer import write_source


def write_drawn_shards(folder: Path, num_train: int, num_val: int, samples_per_shard: int = 1000) -> None:
    """Write the shards `train` and `val` to a folder, and what they are made from to its `coco`."""
    write_synthetic_data(folder / "coco", num_train=num_train, num_val=num_val)
    for split in ("train", "val"):
        annotations = folder / "coco" / "annotations" / f"instances_{split}.json"
        source = coco_source(folder / "coco" / split, annotations)
        write_source(source, folder / split, samples_per_shard=samples_per_shard)
