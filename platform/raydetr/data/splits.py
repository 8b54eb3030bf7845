"""Open the two splits that a configuration names, and write synthetic ones where they are missing."""

from __future__ import annotations

from raydetr.config import DataConfig
from raydetr.console import print_status
from raydetr.locations import is_remote, local_folder
from raydetr.shards.manifest import MANIFEST
from raydetr.shards.reader import Shards, open_shards
from raydetr.shards.source import coco_source
from raydetr.shards.synthetic import write_synthetic_data
from raydetr.shards.writer import write_source


def open_splits(data: DataConfig, *, sizes_known: bool = False) -> tuple[Shards, Shards]:
    """Open the training and the validation shards, limited to their first images if `data.limit_images` is set.

    Args:
        data: names the shards.
        sizes_known: another process of the run has compared the sizes of remote shards with their manifest.

    Raises:
        ValueError: a folder holds no complete shards, or fewer images than `data.limit_images`.
        RemoteError: a server cannot be reached, or refuses the request.
    """
    train, val = (
        open_shards(location, label_map=data.label_map, remote=data.remote, sizes_known=sizes_known)
        for location in (data.train, data.val)
    )
    limit = data.limit_images
    return (train, val) if limit is None else (train.head(limit), val.head(limit))


def write_missing_synthetic(data: DataConfig) -> None:
    """Generate the synthetic data that `data.synthetic` selects, and its shards, where they are missing.

    The JPEGs and annotations go into a folder `coco` beside the training shards.

    Raises:
        ValueError: the shards are to be at a URL, or are not there completely.
        OSError: the files cannot be written.
    """
    if data.synthetic is None:
        return
    remote = [location for location in (data.train, data.val) if is_remote(location)]
    if remote:
        raise ValueError(
            f"data.synthetic={data.synthetic} writes synthetic shards, which is not possible to {remote[0]}: "
            "set data.synthetic=null, or name a folder"
        )
    train, val = local_folder(data.train), local_folder(data.val)
    coco = train.parent / "coco"
    for split, out in (("train", train), ("val", val)):
        if (out / MANIFEST).exists():
            continue
        if not (coco / "annotations").exists():
            print_status(f"generating synthetic data in {coco}")
            write_synthetic_data(coco, hard=data.synthetic == "hard")
        print_status(f"writing shards to {out}")
        write_source(coco_source(coco / split, coco / "annotations" / f"instances_{split}.json"), out)
