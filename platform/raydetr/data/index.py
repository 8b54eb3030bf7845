"""Read shards: a folder of tars with their index and manifest, opened only when it is whole."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from raydetr.data.manifest import (
    INDEX,
    MANIFEST,
    SAMPLE_DTYPE,
    LabelMap,
    LabelMapKind,
    Manifest,
    Samples,
    data_fingerprint,
    make_label_map,
    sample_key,
)

MAX_OPEN_FILES = 64


class ShardError(ValueError):
    """A sample that is not what the index says; the message names shard, key and what is wrong."""


@dataclass(frozen=True)
class RawSample:
    """A sample as it was packed."""

    key: str
    image: bytes  # JPEG or PNG
    record: dict[str, Any]  # COCO's record of the image
    annotations: list[dict[str, Any]]  # COCO's records of its objects


class ShardFiles:
    """Open shards, the latest used ones only. Reads at an offset, so that threads and forks may share it."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Read `length` bytes, or fewer where the file ends."""
        return os.pread(self._descriptor(shard), length, offset)

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return self._open[shard]

    def __reduce__(self) -> tuple[type[ShardFiles], tuple[list[Path]]]:
        return ShardFiles, (self.paths,)  # another process opens the files itself

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


@dataclass(frozen=True)
class Shards:
    """A data set in shards. Sample i is the i-th image of the original annotation file."""

    path: Path
    manifest: Manifest
    samples: Samples
    label_map: LabelMap
    fingerprint: str  # of exactly these samples
    files: ShardFiles

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self.samples)

    def head(self, num_samples: int) -> Shards:
        """Only the first images.

        Raises:
            ValueError: there are fewer.
        """
        if not 1 <= num_samples <= self.num_samples:
            raise ValueError(f"{self.path}: holds {self.num_samples} images, so not the first {num_samples}")
        if num_samples == self.num_samples:
            return self
        return dataclasses.replace(
            self,
            samples=self.samples[:num_samples],
            fingerprint=f"{self.manifest.fingerprint}[:{num_samples}]",
        )

    def read(self, index: int) -> RawSample:
        """Read one sample and check its length, crc and key.

        Raises:
            ShardError: it is not what the index says.
        """
        shard, offset, length, image_at, image_length, json_at, json_length, *_, image_id, crc32 = (
            self.samples[index].item()
        )
        raw = self.files.read(shard, offset, length)
        if len(raw) != length:
            self.refuse(index, f"the shard ends after {len(raw)} of its {length} bytes")
        if zlib.crc32(raw) != crc32:
            self.refuse(index, f"its crc32 is {zlib.crc32(raw):#010x}, the index says {crc32:#010x}")
        key = raw[:100].partition(b".")[0].decode("latin-1")  # the tar header begins with the member's name
        content = json.loads(raw[json_at : json_at + json_length])
        if key != sample_key(image_id) or content["image"]["id"] != image_id:
            self.refuse(index, f"it holds the key {key!r} and image id {content['image']['id']}")
        return RawSample(
            key, raw[image_at : image_at + image_length], content["image"], content["annotations"]
        )

    def coco(self) -> dict[str, Any]:
        """The COCO data set, read from the shards alone: the ground truth for evaluation.

        Records are the original ones, in the original order of images, so AP is that of the original file.
        """
        samples = [self.read(index) for index in range(self.num_samples)]
        return {
            **self.manifest.header,
            "images": [sample.record for sample in samples],
            "annotations": [annotation for sample in samples for annotation in sample.annotations],
            "categories": self.manifest.categories,
        }

    def refuse(self, index: int, fault: str) -> NoReturn:
        """Raise a ShardError that names shard and key of a sample."""
        row = self.samples[index]
        shard = self.files.paths[row["shard"]]
        raise ShardError(
            f"{shard}: sample {sample_key(row['image_id'])} at byte {row['offset']} is damaged: "
            f"{fault}; copy the shard again, or write the shards again"
        )


def open_shards(path: Path, *, label_map: LabelMapKind = "contiguous") -> Shards:
    """Open a folder of shards after checking manifest, index and the presence and size of every shard.

    Args:
        path: what `write_shards` wrote.
        label_map: how category ids become labels (see `make_label_map`).

    Raises:
        ValueError: there are no shards, or they are incomplete or not those of the index.
    """
    if not (path / MANIFEST).is_file():
        unfinished = any(path.glob("*.tar")) if path.is_dir() else False
        state = (
            "the shards have no manifest.json, so writing did not end" if unfinished else "no shards found"
        )
        raise ValueError(
            f"{path}: {state}; write them with "
            f"`raydetr shards write --images DIR --annotations FILE --out {path}`"
        )
    manifest = Manifest.load(path)
    _check_files(path, manifest)
    samples = _load_index(path, manifest)
    files = ShardFiles([path / shard.name for shard in manifest.shards])
    labels = make_label_map(manifest.categories, label_map)
    return Shards(path, manifest, samples, labels, manifest.fingerprint, files)


def check_same_categories(train: Shards, val: Shards) -> None:
    """Make sure that two data sets mean the same by their labels.

    Raises:
        ValueError: ids or names differ.
    """
    here, there = train.label_map, val.label_map
    if here != there:
        differing = set(zip(here.category_ids, here.names, strict=True)) ^ set(
            zip(there.category_ids, there.names, strict=True)
        )
        raise ValueError(
            f"{train.path} and {val.path} have different categories (id and name: {sorted(differing)[:5]}): "
            "write both from annotation files with the same categories"
        )


def _check_files(path: Path, manifest: Manifest) -> None:
    faults = []
    for shard in manifest.shards:
        file = path / shard.name
        if not file.is_file():
            faults.append(f"{shard.name} is missing")
        elif file.stat().st_size != shard.size:
            faults.append(f"{shard.name} has {file.stat().st_size} bytes instead of {shard.size}")
    if faults:
        listing = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
        raise ValueError(f"{path}: {listing}: copy these shards again, or write the shards again")


def _load_index(path: Path, manifest: Manifest) -> Samples:
    try:
        with np.load(path / INDEX) as arrays:
            samples: Samples = arrays["samples"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path / INDEX}: cannot be read ({error}): write the shards again") from None
    if (
        samples.dtype != SAMPLE_DTYPE
        or data_fingerprint(samples, manifest.categories) != manifest.fingerprint
    ):
        raise ValueError(f"{path / INDEX}: is not the index of this manifest: write the shards again")
    return samples
