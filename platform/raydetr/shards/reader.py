"""Read shards: open a complete folder of tars with index and manifest, and read verified samples."""

from __future__ import annotations

import dataclasses
import errno
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from raydetr.config import LabelMapKind, RemoteConfig
from raydetr.locations import check_location, is_remote, local_folder
from raydetr.shards.coco import listed
from raydetr.shards.files import LocalFolder, ShardFiles, Span
from raydetr.shards.manifest import (
    INDEX,
    MANIFEST,
    SAMPLE_DTYPE,
    LabelMap,
    Manifest,
    Samples,
    data_fingerprint,
    make_label_map,
    sample_key,
)
from raydetr.shards.remote.reading import RemoteFolder
from raydetr.shards.validation import InvalidDataError, RawSample, check_index, parse_manifest, parse_sample
from raydetr.store.retry import RemoteError

# The file server of a mount went away, or came back: the same read works later
DISCONNECTED = (errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENOTCONN)

T = TypeVar("T")
Folder = LocalFolder | RemoteFolder


def load_shards(folder: Folder, label_map: LabelMapKind = "contiguous") -> Shards:
    """Read manifest and index of a folder, and verify that they belong together; the shards may be missing.

    Raises:
        ValueError: a file is missing or corrupt, or they belong to different shards.
    """
    manifest = _load(folder, MANIFEST, parse_manifest)
    samples = _load(folder, INDEX, lambda content: _parse_index(content, manifest))
    labels, files = make_label_map(manifest.categories, label_map), folder.files(manifest, samples)
    return Shards(folder.location, manifest, samples, labels, manifest.fingerprint, files)


def _check_sizes(folder: Folder, manifest: Manifest) -> None:
    """Verify that every shard exists and has the size in the manifest."""
    found = folder.sizes([shard.name for shard in manifest.shards])
    problems = [
        f"{shard.name} has {found[shard.name]} bytes instead of {shard.size}"
        if shard.name in found
        else f"{shard.name} is missing"
        for shard in manifest.shards
        if found.get(shard.name) != shard.size
    ]
    if problems:
        remedy = "copy these shards again, or write the shards again"
        raise ValueError(f"{folder.location}: {listed(problems, 10)}: {remedy}")


def _load(folder: Folder, name: str, parse: Callable[[bytes], T]) -> T:
    """Read and parse a file, a second time if the first result is corrupt, as it may be after a transfer."""
    where = f"{folder.location}/{name}"
    for again in (False, True):
        try:
            return parse(folder.read(name, again=again))
        except RemoteError:
            raise
        except OSError as error:
            if name == MANIFEST and isinstance(error, FileNotFoundError | NotADirectoryError):
                raise ValueError(f"{folder.location}: {folder.explain_missing_manifest()}") from None
            raise ValueError(f"{where}: cannot be read ({error}): write the shards again") from None
        except (ValueError, MemoryError) as error:
            reason = str(error)
    raise ValueError(f"{where}: {reason}: write the shards again")


def _parse_index(content: bytes, manifest: Manifest) -> Samples:
    try:
        with np.load(io.BytesIO(content)) as arrays:
            samples: Samples = arrays["samples"]
    except Exception as error:  # numpy and zipfile raise any error, MemoryError included, for a corrupt npz
        raise InvalidDataError(f"cannot be read ({error})") from None
    is_ours = samples.dtype == SAMPLE_DTYPE
    if not is_ours or data_fingerprint(samples, manifest.categories) != manifest.fingerprint:
        raise InvalidDataError("is not the index of this manifest")
    check_index(samples, manifest)
    return samples


READ_BATCH_SIZE = 32  # samples that `read_in_order` reads together


class ShardError(ValueError):
    """A corrupt sample: it does not match the index; the message names shard, key and the problem."""

    shard = ""  # path of the shard
    key = ""
    offset = 0  # bytes, of the sample in the shard
    reason = ""  # the problem, in short
    errno: int | None = None  # of the system's error, if the sample could not be read


@dataclass(frozen=True)
class Shards:
    """A data set in shards. Sample i is the i-th image of the original annotation file."""

    location: str  # a folder, or a URL of one
    manifest: Manifest
    samples: Samples
    label_map: LabelMap
    fingerprint: str  # of exactly these samples: `head` changes it
    files: ShardFiles

    @property
    def path(self) -> Path:
        """Folder of local shards."""
        return local_folder(self.location)

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self.samples)

    @cached_property
    def category_ids(self) -> frozenset[int]:
        """Category ids that annotations may have."""
        return frozenset(category["id"] for category in self.manifest.categories)

    def head(self, num_samples: int) -> Shards:
        """Return the shards with only their first `num_samples` images.

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
        """Read one sample and verify that it is the one that was packed.

        Raises:
            ShardError: it cannot be read, or does not match the index.
        """
        return self._read_by(self.files.read, index)

    def reread(self, index: int) -> RawSample:
        """Read one sample like `read`, from its origin and not from a cached copy that may be corrupt."""
        return self._read_by(self.files.reread, index)

    def read_many(self, indices: Sequence[int]) -> list[RawSample | ShardError]:
        """Read samples, remote ones in few requests. A corrupt sample is returned as its error.

        Raises:
            RemoteError: a server cannot be reached, or rejects the request.
        """
        return self._start(indices)()

    def _start(self, indices: Sequence[int]) -> Callable[[], list[RawSample | ShardError]]:
        """Start reading samples, remote ones in the background; the returned function waits."""
        wait = self.files.start([self.span(index) for index in indices])
        return lambda: [self._check(index, raw) for index, raw in zip(indices, wait(), strict=True)]

    def read_batches(
        self, batches: Iterable[Sequence[int]], ahead: int = 2
    ) -> Iterator[list[RawSample | ShardError]]:
        """Yield batches like `read_many`; the next `ahead` ones, if remote, are fetched in the meantime."""
        started = deque[Callable[[], list[RawSample | ShardError]]]()
        for batch in batches:
            started.append(self._start(batch))
            if len(started) > ahead:
                yield started.popleft()()
        for wait in started:
            yield wait()

    def read_in_order(self, indices: Sequence[int]) -> Iterator[RawSample | ShardError]:
        """Yield any number of samples, like `read_many`; the next remote ones are fetched in the meantime."""
        starts = range(0, len(indices), READ_BATCH_SIZE)
        return chain.from_iterable(self.read_batches(indices[at : at + READ_BATCH_SIZE] for at in starts))

    def span(self, index: int) -> Span:
        """Return shard number, offset and length of a sample."""
        row = self.samples[index]
        return int(row["shard"]), int(row["offset"]), int(row["length"])

    def key(self, index: int) -> str:
        """Return the WebDataset key of one sample."""
        return sample_key(self.samples["image_id"][index])

    def coco(self) -> dict[str, Any]:
        """Read the COCO data set from the shards: the ground truth for evaluation.

        The records and the order of the images are the original ones, so AP equals that with the original file.
        """
        found = enumerate(self.read_in_order(range(self.num_samples)))
        samples = [self.reread(i) if isinstance(sample, ShardError) else sample for i, sample in found]
        return {
            **self.manifest.header,
            "images": [sample.record for sample in samples],
            "annotations": [annotation for sample in samples for annotation in sample.annotations],
            "categories": self.manifest.categories,
        }

    def _read_by(self, read: Callable[[int, int, int], bytes], index: int) -> RawSample:
        try:
            raw: bytes | OSError = read(*self.span(index))
        except OSError as error:
            raw = error
        sample = self._check(index, raw)
        if isinstance(sample, ShardError):
            raise sample
        return sample

    def _check(self, index: int, raw: bytes | OSError) -> RawSample | ShardError:
        """Verify the bytes that were read for a sample, or the error instead of them, and parse them."""
        if isinstance(raw, RemoteError):
            raise raw  # the server failed; no sample is corrupt
        if isinstance(raw, OSError):
            if raw.errno in DISCONNECTED:
                raise raw  # nor is one if the file server was away
            return self.corrupt(index, f"it cannot be read ({raw})", raw.errno)
        try:
            return parse_sample(self.samples[index], self.key(index), raw, self.category_ids)
        except InvalidDataError as error:
            return self.corrupt(index, str(error))

    def corrupt(self, index: int, reason: str, code: int | None = None) -> ShardError:
        """Return the error about a corrupt sample, which names its shard and key; `code` is an errno of reading it."""
        row = self.samples[index]
        shard, key, offset = self.files.names[row["shard"]], self.key(index), int(row["offset"])
        error = ShardError(
            f"{shard}: sample {key} at byte {offset} is corrupt: "
            f"{reason}; copy the shard again, or write the shards again"
        )
        error.shard, error.key, error.offset, error.reason, error.errno = shard, key, offset, reason, code
        return error


def open_shards(
    location: str | Path,
    *,
    label_map: LabelMapKind = "contiguous",
    remote: RemoteConfig | None = None,
    sizes_known: bool = False,
) -> Shards:
    """Open a folder of shards after verifying manifest, index, and the size of every shard.

    Args:
        location: folder with the output of `write_source`, or its s3://, gs://, az://, http(s):// or file:// URL.
        label_map: how category ids become labels (see `make_label_map`).
        remote: how to read a remote folder; None uses the default settings.
        sizes_known: skip checking the sizes of remote shards, because another process of the run did it.

    Raises:
        ValueError: there are no shards, or they are incomplete or do not match the index.
        RemoteError: a server cannot be reached, or rejects the request.
    """
    location = check_location(str(location))
    folder = (
        RemoteFolder(location, remote or RemoteConfig()) if is_remote(location) else LocalFolder(location)
    )
    shards = load_shards(folder, label_map)
    if isinstance(folder, LocalFolder) or not sizes_known:
        _check_sizes(folder, shards.manifest)
    return shards


def check_same_categories(train: Shards, val: Shards) -> None:
    """Verify that the labels of two data sets mean the same categories.

    Raises:
        ValueError: ids or names differ.
    """
    here, there = train.label_map, val.label_map
    if here != there:
        pairs = [set(zip(labels.category_ids, labels.names, strict=True)) for labels in (here, there)]
        raise ValueError(
            f"{train.location} and {val.location} have different categories (id and name: "
            f"{sorted(pairs[0] ^ pairs[1])[:5]}): write both from annotation files with the same categories"
        )
