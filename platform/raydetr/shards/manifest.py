"""What a folder of shards says about itself: `manifest.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from raydetr.config import LabelMapKind

MANIFEST = "manifest.json"
INDEX = "index.npz"
FORMAT_VERSION = 1
FOREIGN_VERSION = 2  # of shards that others wrote: as 1, and `foreign`
# Samples of a chunk: the unit of the order of training (data/order.py) and of the cache of remote shards. A rank reads
# all samples of a chunk within one window, so reading chunk by chunk brings a node little more than its share.
CHUNK_SIZE = 32
MAX_LABEL = 9999  # a head with more classes than this is a mistake

BoxFormat = Literal["xywh", "xyxy"]  # x, y, width, height, or both corners, in pixels

SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # number of the shard
        ("offset", "<u8"),  # of the sample's first tar header in the shard
        ("length", "<u4"),  # bytes of the sample, headers and padding included
        ("image_offset", "<u4"),  # of the encoded image, from `offset`
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


@dataclass(frozen=True)
class ShardFile:
    """One tar file."""

    name: str
    num_samples: int
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class RecordFormat:
    """How the JSON members of shards that others wrote describe objects: see `record_formats.py`."""

    kind: Literal["coco", "objects", "arrays"]
    objects: str  # field of the record that holds the objects; empty: the record itself
    boxes: str  # field that holds a box, or all boxes
    labels: str  # field that holds a category's id or name, or those of all boxes
    box_format: BoxFormat
    own_ids: bool  # the objects' ids are kept; else they are numbered


@dataclass(frozen=True)
class Foreign:
    """What has to be known of shards that others wrote."""

    keys: list[str]  # WebDataset key of each sample
    records: RecordFormat


@dataclass(frozen=True)
class LabelMap:
    """What a model predicts, in COCO's terms: label i is the category `category_ids[i]`, `names[i]`."""

    kind: LabelMapKind
    category_ids: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of labels, from 0 on."""
        return len(self.category_ids)

    @cached_property
    def labels(self) -> dict[int, int]:
        """Label of each category id."""
        return {category_id: label for label, category_id in enumerate(self.category_ids)}


def make_label_map(categories: list[dict[str, Any]], kind: LabelMapKind) -> LabelMap:
    """The label map of some categories.

    Args:
        categories: COCO's records, in the order of their ids.
        kind: "contiguous" numbers the categories from 0; "category_id" takes the ids themselves as labels, as
            the official DETR code does (91 classes for COCO's 80 categories; the gaps stay unused).

    Raises:
        ValueError: category ids are too large to be labels.
    """
    by_id = {category["id"]: category["name"] for category in categories}
    if kind == "category_id" and max(by_id) > MAX_LABEL:
        raise ValueError(
            f"category ids reach {max(by_id)}, too large for labels: use data.label_map=contiguous"
        )
    ids = tuple(by_id) if kind == "contiguous" else tuple(range(max(by_id) + 1))
    return LabelMap(kind, ids, tuple(by_id.get(category_id, "(unused)") for category_id in ids))


@dataclass(frozen=True)
class Manifest:
    """Everything about the shards but the samples themselves."""

    format_version: int
    fingerprint: str  # changes with any byte of any sample, with the order and with the categories
    num_samples: int
    num_annotations: int
    samples_per_shard: int
    shards: list[ShardFile]
    categories: list[dict[str, Any]]  # COCO's records, in the order of their ids
    label_maps: dict[str, dict[str, int]]  # kind -> {category id: label}
    source: dict[str, str]  # name and sha256 of the annotation file
    header: dict[str, Any]  # COCO's `info` and `licenses`
    notices: list[str]  # what is worth knowing about the data
    foreign: Foreign | None = None  # of shards that others wrote

    def save(self, folder: Path) -> None:
        """Write `manifest.json`."""
        (folder / MANIFEST).write_bytes(self.to_json())

    def to_json(self) -> bytes:
        """The content of `manifest.json`."""
        values = dataclasses.asdict(self)
        if self.foreign is None:
            del values["foreign"]
        return json.dumps(values, indent=1).encode() + b"\n"

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read `manifest.json`.

        Raises:
            ValueError: it cannot be read, or is of another format version.
        """
        path = folder / MANIFEST
        try:
            return Manifest.parse(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}: write the shards again") from None

    @staticmethod
    def parse(content: bytes) -> Manifest:
        """What is in a `manifest.json`.

        Raises:
            ValueError: it is damaged, or of another format version.
        """
        try:
            values = json.loads(content)
            version = values["format_version"]
            if version not in (FORMAT_VERSION, FOREIGN_VERSION):
                known = f"{FORMAT_VERSION} and {FOREIGN_VERSION}"
                raise ValueError(f"format_version is {version}, this program reads {known}")
            shards = [ShardFile(**shard) for shard in values.pop("shards")]
            foreign = _parse_foreign(values.pop("foreign")) if version == FOREIGN_VERSION else None
            return Manifest(shards=shards, foreign=foreign, **values)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"is no manifest of shards ({error})") from None


def _parse_foreign(values: dict[str, Any]) -> Foreign:
    foreign = Foreign(values["keys"], RecordFormat(**values["records"]))
    if not isinstance(foreign.keys, list) or not all(isinstance(key, str) for key in foreign.keys):
        raise ValueError("the keys of its samples are no list of texts")
    choices = {
        "kind": ("coco", "objects", "arrays"),
        "box_format": ("xywh", "xyxy"),
        "own_ids": (True, False),
    }
    for name, value in dataclasses.asdict(foreign.records).items():
        if value not in choices.get(name, (str(value),)):
            raise ValueError(f"{name} of its records is {value!r:.40}")
    return foreign


def sample_key(image_id: int) -> str:
    """The WebDataset key of an image: no dot, sorts like the id."""
    return f"{image_id:012d}"


def label_maps(category_ids: list[int]) -> dict[str, dict[str, int]]:
    """Both label maps of a manifest, by the category's id as text."""
    return {
        "contiguous": {str(category_id): label for label, category_id in enumerate(category_ids)},
        "category_id": {str(category_id): category_id for category_id in category_ids},
    }


def data_fingerprint(samples: Samples, categories: list[dict[str, Any]]) -> str:
    """A short name for the data: equal for equal samples (by size and crc), order, shards and categories."""
    digest = hashlib.sha256(samples.tobytes())
    digest.update(json.dumps(categories, sort_keys=True).encode())
    return digest.hexdigest()[:16]
