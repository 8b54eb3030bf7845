"""Where images and annotations come from: COCO JSON, YOLO or Pascal VOC, all as COCO's records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raydetr.shards.coco import CocoDataset, load_coco


@dataclass(frozen=True)
class Source:
    """A checked data set on disk."""

    dataset: CocoDataset
    images: Path  # the folder that the records' file names start from
    name: str  # of what holds the annotations, for the manifest


def coco_source(images: Path, annotations: Path) -> Source:
    """A COCO instances JSON and the folder of its images.

    Raises:
        ValueError: the folder is missing, or the annotations are faulty.
    """
    if not images.is_dir():
        raise ValueError(f"{images}: there is no such folder of images")
    return Source(load_coco(annotations), images, annotations.name)
