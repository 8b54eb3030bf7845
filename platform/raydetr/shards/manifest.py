"""Read and write `manifest.json`, which describes a folder of shards, and define the rows of the index."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

from raydetr.config import LabelMapKind

MANIFEST = "manifest.json"
INDEX = "index.npz"
FORMAT_VERSION = 3
# Samples per chunk: the unit of the training order (data/order.py) and of the cache of remote shards. A rank reads all
# samples of a chunk within one epoch, so chunk-wise fetching downloads little more than the rank reads.
CHUNK_SIZE = 32
UNUSED = "(unused)"  # name of a label without a category
MAX_LABEL = 9999  # more classes than this must be a mistake

SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # shard number
        ("offset", "<u8"),  # of the sample's first tar header in the shard
        ("length", "<u4"),  # bytes of the sample, including headers and padding
        ("image_offset", "<u4"),  # of the encoded image, relative to `offset`
        ("image_length", "<u4"),
        ("json_offset", "<u4"),
        ("json_length", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("num_annotations", "<u4"),
        ("image_id", "<i8"),
        ("crc32", "<u4"),  # of all `length` bytes
    ]
)

Samples = npt.NDArray[np.void]  # [n] of SAMPLE_DTYPE
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


@dataclass(frozen=True)
class ShardFile:
    """One tar file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    num_samples: Count
    size: Count  # bytes
    sha256: str


@dataclass(frozen=True)
class LabelMap:
    """Maps labels to COCO categories: label i is the category with `category_ids[i]` and `names[i]`."""

    kind: LabelMapKind
    category_ids: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.category_ids)

    @cached_property
    def labels(self) -> dict[int, int]:
        """Category id -> label."""
        return {category_id: label for label, category_id in enumerate(self.category_ids)}


def make_label_map(categories: list[dict[str, Any]], kind: LabelMapKind) -> LabelMap:
    """Create the label map of the given categories.

    Args:
        categories: COCO's category records, sorted by id.
        kind: "contiguous" numbers the categories from 0; "category_id" uses the ids as labels, like the official
            DETR code (91 classes for COCO's 80 categories; the gaps stay unused).

    Raises:
        ValueError: category ids are too large for labels.
    """
    by_id = {category["id"]: category["name"] for category in categories}
    if kind == "category_id" and max(by_id) > MAX_LABEL:
        raise ValueError(
            f"category ids reach {max(by_id)}, too large for labels: use data.label_map=contiguous"
        )
    ids = tuple(by_id) if kind == "contiguous" else tuple(range(max(by_id) + 1))
    return LabelMap(kind, ids, tuple(by_id.get(category_id, UNUSED) for category_id in ids))


@dataclass(frozen=True)
class Manifest:
    """Everything about the shards except the rows of the index."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format_version: int
    fingerprint: str  # changes with any byte of any sample, their order, and the categories
    num_samples: Count
    num_annotations: Count
    usable_objects: dict[str, Count]  # category id -> objects that train: no crowds, with area in the image
    unusual_objects: dict[str, Count]  # kind (`coco.UNUSUAL`) -> objects
    samples_per_shard: Count
    shards: list[ShardFile]
    categories: list[dict[str, Any]]  # COCO's records, sorted by id
    label_maps: dict[str, dict[str, int]]  # kind -> {category id: label}
    source: dict[str, str]  # name and sha256 of the annotation file
    header: dict[str, Any]  # COCO's `info` and `licenses`
    notices: list[str]  # valid but worth knowing

    @property
    def num_usable(self) -> int:
        """Number of objects that train."""
        return sum(self.usable_objects.values())

    def save(self, folder: Path) -> None:
        """Write `manifest.json`."""
        content = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        (folder / MANIFEST).write_text(f"{content}\n")


def sample_key(image_id: int) -> str:
    """Return the WebDataset key of an image: it has no dot and sorts like the id."""
    return f"{image_id:012d}"


def label_maps(category_ids: list[int]) -> dict[str, dict[str, int]]:
    """Return both label maps of a manifest, keyed by the category id as a string."""
    return {
        "contiguous": {str(category_id): label for label, category_id in enumerate(category_ids)},
        "category_id": {str(category_id): category_id for category_id in category_ids},
    }


def data_fingerprint(samples: Samples, categories: list[dict[str, Any]]) -> str:
    """Return a hash that is equal for equal samples (by size and crc32), order, shards and categories."""
    digest = hashlib.sha256(samples.tobytes())
    digest.update(json.dumps(categories, sort_keys=True, allow_nan=False).encode())
    return digest.hexdigest()[:16]
