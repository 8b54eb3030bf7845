"""The two splits of a run, as its configuration names them."""

from __future__ import annotations

from pathlib import Path

from raydetr.config import DataConfig
from raydetr.data.index import Shards, open_shards
from raydetr.data.manifest import MANIFEST
from raydetr.data.sample_data import write_sample_data
from raydetr.data.shards import write_shards
from raydetr.train.progress import say


def open_splits(data: DataConfig) -> tuple[Shards, Shards]:
    """The training and the validation shards, limited to their first images where that is set.

    Raises:
        ValueError: a folder holds no (whole) shards, or fewer images than `data.limit_images`.
    """
    train = open_shards(data.train, label_map=data.label_map)
    val = open_shards(data.val, label_map=data.label_map)
    limit = data.limit_images
    return (train, val) if limit is None else (train.head(limit), val.head(limit))


def write_missing_sample(data: DataConfig) -> None:
    """Generate the sample data that `data.sample` asks for, and its shards, where they are missing.

    The JPEGs and annotations go into a folder `coco` beside the training shards.
    """
    if data.sample is None:
        return
    coco = data.train.parent / "coco"
    for split, out in (("train", data.train), ("val", data.val)):
        if (out / MANIFEST).exists():
            continue
        if not (coco / "annotations").exists():
            say(f"generating sample data in {coco}")
            write_sample_data(coco, hard=data.sample == "hard")
        say(f"writing shards to {out}")
        write_shards(coco / split, _annotations(coco, split), out)


def _annotations(coco: Path, split: str) -> Path:
    return coco / "annotations" / f"instances_{split}.json"
