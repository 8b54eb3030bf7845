"""Read shards: a folder of tars with their index and manifest, opened only when it is whole."""

from __future__ import annotations

import dataclasses
import os
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from raydetr.data.integrity import Fault, RawSample, check_index, check_manifest, parse_sample
from raydetr.data.locations import local_folder
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


# what numpy and zipfile raise for a damaged npz; a size that was changed may ask for more than the memory
UNREADABLE_INDEX = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, SyntaxError, EOFError, RuntimeError,
    NotImplementedError, MemoryError, OverflowError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


class ShardError(ValueError):
    """A sample that is not what the index says; the message names shard, key and what is wrong."""

    shard = ""  # path of the shard
    key = ""
    offset = 0  # bytes, of the sample in the shard
    reason = ""  # what is wrong, in short


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

    location: str  # a folder, or a URL of one
    manifest: Manifest
    samples: Samples
    label_map: LabelMap
    fingerprint: str  # of exactly these samples
    files: ShardFiles

    @property
    def path(self) -> Path:
        """The folder of local shards."""
        return local_folder(self.location)

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self.samples)

    @cached_property
    def category_ids(self) -> frozenset[int]:
        """Those that annotations may have."""
        return frozenset(category["id"] for category in self.manifest.categories)

    def head(self, num_samples: int) -> Shards:
        """Only the first images.

        Raises:
            ValueError: there are fewer.
        """
        if not 1 <= num_samples <= self.num_samples:
            raise ValueError(
                f"{self.location}: holds {self.num_samples} images, so not the first {num_samples}"
            )
        if num_samples == self.num_samples:
            return self
        return dataclasses.replace(
            self,
            samples=self.samples[:num_samples],
            fingerprint=f"{self.manifest.fingerprint}[:{num_samples}]",
        )

    def read(self, index: int) -> RawSample:
        """Read one sample and check that it is the one that was packed.

        Raises:
            ShardError: it cannot be read, or is not what the index says.
        """
        row = self.samples[index]
        try:
            raw = self.files.read(int(row["shard"]), int(row["offset"]), int(row["length"]))
        except OSError as error:
            self.refuse(index, f"it cannot be read ({error})")
        return self.check(index, raw)

    def reread(self, index: int) -> RawSample:
        """Read one sample again, from where it comes from and not from a copy that may be damaged.

        Raises:
            ShardError: as `read`.
        """
        return self.read(index)

    def check(self, index: int, raw: bytes) -> RawSample:
        """The parts of one sample, given the bytes that were read for it.

        Raises:
            ShardError: they are not what the index says.
        """
        try:
            return parse_sample(self.samples[index], self.key(index), raw, self.category_ids)
        except Fault as fault:
            self.refuse(index, str(fault))

    def key(self, index: int) -> str:
        """The WebDataset key of one sample."""
        return sample_key(self.samples["image_id"][index])

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

    def _read_or_error(self, index: int) -> RawSample | ShardError:
        try:
            return self.read(index)
        except ShardError as error:
            return error

    def refuse(self, index: int, fault: str) -> NoReturn:
        """Raise a ShardError that names shard and key of a sample."""
        row = self.samples[index]
        shard, key, offset = str(self.files.paths[row["shard"]]), self.key(index), int(row["offset"])
        error = ShardError(
            f"{shard}: sample {key} at byte {offset} is damaged: "
            f"{fault}; copy the shard again, or write the shards again"
        )
        error.shard, error.key, error.offset, error.reason = shard, key, offset, fault
        raise error


def open_shards(location: str | Path, *, label_map: LabelMapKind = "contiguous") -> Shards:
    """Open a folder of shards after checking manifest, index and the presence and size of every shard.

    Args:
        location: of what `write_shards` wrote.
        label_map: how category ids become labels (see `make_label_map`).

    Raises:
        ValueError: there are no shards, or they are incomplete or not those of the index.
    """
    path = local_folder(location)
    if not (path / MANIFEST).is_file():
        unfinished = any(path.glob("*.tar")) if path.is_dir() else False
        state = (
            "the shards have no manifest.json, so writing did not end" if unfinished else "no shards found"
        )
        raise ValueError(
            f"{path}: {state}; write them with "
            f"`raydetr shards write --images DIR --annotations FILE --out {path}`"
        )
    manifest = _load_manifest(path)
    _check_files(path, manifest)
    samples = _load_index(path, manifest)
    files = ShardFiles([path / shard.name for shard in manifest.shards])
    labels = make_label_map(manifest.categories, label_map)
    return Shards(str(path), manifest, samples, labels, manifest.fingerprint, files)


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
            f"{train.location} and {val.location} have different categories (id and name: {sorted(differing)[:5]}): "
            "write both from annotation files with the same categories"
        )


def _load_manifest(path: Path) -> Manifest:
    manifest = Manifest.load(path)
    try:
        check_manifest(manifest)
    except Fault as fault:
        raise ValueError(f"{path / MANIFEST}: {fault}: write the shards again") from None
    return manifest


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
    except UNREADABLE_INDEX as error:
        raise ValueError(f"{path / INDEX}: cannot be read ({error}): write the shards again") from None
    if (
        samples.dtype != SAMPLE_DTYPE
        or data_fingerprint(samples, manifest.categories) != manifest.fingerprint
    ):
        raise ValueError(f"{path / INDEX}: is not the index of this manifest: write the shards again")
    try:
        check_index(samples, manifest)
    except Fault as fault:
        raise ValueError(f"{path / INDEX}: {fault}: write the shards again") from None
    return samples
