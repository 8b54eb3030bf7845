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

MANIFEST = "manifest.json"
INDEX = "index.npz"
FORMAT_VERSION = 1
MAX_LABEL = 9999  # a head with more classes than this is a mistake

LabelMapKind = Literal["contiguous", "category_id"]

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

    def save(self, folder: Path) -> None:
        """Write `manifest.json`."""
        (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

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
            if version != FORMAT_VERSION:
                raise ValueError(f"format_version is {version}, this program reads {FORMAT_VERSION}")
            shards = [ShardFile(**shard) for shard in values.pop("shards")]
            return Manifest(shards=shards, **values)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"is no manifest of shards ({error})") from None


def sample_key(image_id: int) -> str:
    """The WebDataset key of an image: no dot, sorts like the id."""
    return f"{image_id:012d}"


def data_fingerprint(samples: Samples, categories: list[dict[str, Any]]) -> str:
    """A short name for the data: equal for equal samples (by size and crc), order, shards and categories."""
    digest = hashlib.sha256(samples.tobytes())
    digest.update(json.dumps(categories, sort_keys=True).encode())
    return digest.hexdigest()[:16]
