"""Read shards: a folder of tars with their index and manifest, opened only when it is complete."""

from __future__ import annotations

import dataclasses
import io
import struct
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from raydetr.config import LabelMapKind, RemoteConfig
from raydetr.config.paths import check_location, is_remote, local_folder
from raydetr.shards.files import Folder, LocalFiles, LocalFolder, ShardFiles, Span
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
from raydetr.shards.remote.reading import RemoteFolder, make_remote_files
from raydetr.shards.third_party.record_formats import convert
from raydetr.shards.validation import (
    Convert,
    InvalidDataError,
    RawSample,
    check_index,
    check_manifest,
    parse_sample,
)
from raydetr.store.transfer import RemoteError

T = TypeVar("T")
NOT_THERE = (FileNotFoundError, NotADirectoryError)

# what numpy and zipfile raise for a damaged npz; a size that was changed may ask for more than the memory
UNREADABLE_INDEX = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, SyntaxError, EOFError, RuntimeError,
    NotImplementedError, MemoryError, OverflowError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


def load_header(folder: Folder, location: str, *, reads: int) -> tuple[Manifest, Samples]:
    """The manifest and the index of a folder of shards, which belong together.

    Args:
        folder: where they are.
        location: its name for messages.
        reads: how often a file is read that turns out wrong, which on its way it may have become.

    Raises:
        ValueError: there is none, or they are damaged, or of different shards.
    """
    try:
        manifest = _load(folder, MANIFEST, _parse_manifest, location, reads)
    except NOT_THERE:
        raise ValueError(f"{location}: {folder.without_manifest()}") from None
    return manifest, _load(folder, INDEX, lambda content: _parse_index(content, manifest), location, reads)


def check_sizes(folder: Folder, location: str, manifest: Manifest) -> None:
    """Make sure that every shard is there, with its size.

    Raises:
        ValueError: they are not; lists up to ten.
    """
    faults = folder.check_sizes({shard.name: shard.size for shard in manifest.shards})
    if faults:
        listing = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
        raise ValueError(f"{location}: {listing}: copy these shards again, or write the shards again")


def _load(folder: Folder, name: str, parse: Callable[[bytes], T], location: str, reads: int) -> T:
    fault: Exception | None = None
    for _ in range(reads):
        try:
            return parse(folder.read(name))
        except (InvalidDataError, MemoryError) as error:
            fault = error
        except OSError as error:
            if isinstance(error, RemoteError) or (name == MANIFEST and isinstance(error, NOT_THERE)):
                raise
            raise ValueError(f"{location}/{name}: cannot be read ({error}): write the shards again") from None
    raise ValueError(f"{location}/{name}: {fault}: write the shards again")


def _parse_manifest(content: bytes) -> Manifest:
    try:
        manifest = Manifest.parse(content)
    except ValueError as error:
        raise InvalidDataError(str(error)) from None
    check_manifest(manifest)
    return manifest


def _parse_index(content: bytes, manifest: Manifest) -> Samples:
    try:
        with np.load(io.BytesIO(content)) as arrays:
            samples: Samples = arrays["samples"]
    except UNREADABLE_INDEX as error:
        raise InvalidDataError(f"cannot be read ({error})") from None
    if (
        samples.dtype != SAMPLE_DTYPE
        or data_fingerprint(samples, manifest.categories) != manifest.fingerprint
    ):
        raise InvalidDataError("is not the index of this manifest")
    check_index(samples, manifest)
    return samples


READ_AT_ONCE = 32  # samples


class ShardError(ValueError):
    """A sample that is not what the index says; the message names shard, key and what is wrong."""

    shard = ""  # path of the shard
    key = ""
    offset = 0  # bytes, of the sample in the shard
    reason = ""  # what is wrong, in short


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
        try:
            raw = self.files.read(*self.span(index))
        except OSError as error:
            self._refuse_unread(index, error)
        return self.check(index, raw)

    def reread(self, index: int) -> RawSample:
        """Read one sample again, from where it comes from and not from a copy that may be damaged.

        Raises:
            ShardError: as `read`.
        """
        try:
            raw = self.files.reread(*self.span(index))
        except OSError as error:
            self._refuse_unread(index, error)
        return self.check(index, raw)

    def read_many(self, indices: Sequence[int]) -> list[RawSample | ShardError]:
        """Read samples, together where they are remote. One that is damaged is there as its error.

        Raises:
            RemoteError: a server cannot be reached, or refuses.
        """
        return self.start(indices)()

    def start(self, indices: Sequence[int]) -> Callable[[], list[RawSample | ShardError]]:
        """Begin to read samples, as `read_many`, in the background where they are remote."""
        wait = self.files.start([self.span(index) for index in indices])
        return lambda: [self._checked(index, raw) for index, raw in zip(indices, wait(), strict=True)]

    def read_in_order(self, indices: Sequence[int]) -> Iterator[RawSample | ShardError]:
        """Read any number of samples, as `read_many`; of remote ones, the next are on their way meanwhile."""
        turns = [indices[at : at + READ_AT_ONCE] for at in range(0, len(indices), READ_AT_ONCE)]
        begun = deque[Callable[[], list[RawSample | ShardError]]]()
        with closing(self.files.prefetch(turns)) as prefetcher:
            for step, turn in enumerate(turns):
                prefetcher.advance(step)
                begun.append(self.start(turn))
                if len(begun) > 2:
                    yield from begun.popleft()()
            for wait in begun:
                yield from wait()

    def span(self, index: int) -> Span:
        """Where a sample lies: shard, offset, length."""
        row = self.samples[index]
        return int(row["shard"]), int(row["offset"]), int(row["length"])

    def check(self, index: int, raw: bytes) -> RawSample:
        """The parts of one sample, given the bytes that were read for it.

        Raises:
            ShardError: they are not what the index says.
        """
        try:
            return parse_sample(
                self.samples[index], self.key(index), raw, self.category_ids, self.convert(index)
            )
        except InvalidDataError as fault:
            self.refuse(index, str(fault))

    def key(self, index: int) -> str:
        """The WebDataset key of one sample."""
        foreign = self.manifest.foreign
        return sample_key(self.samples["image_id"][index]) if foreign is None else foreign.keys[index]

    def convert(self, index: int) -> Convert | None:
        """What makes COCO's records of the JSON of one sample; None: it holds them."""
        foreign, row = self.manifest.foreign, self.samples[index]
        if foreign is None:
            return None
        return partial(
            convert,
            form=foreign.records,
            key=foreign.keys[index],
            image_id=int(row["image_id"]),
            size=(int(row["width"]), int(row["height"])),
            first_id=int(self._first_annotation_ids[index]),
            category_of=self._category_of,
        )

    @cached_property
    def _first_annotation_ids(self) -> npt.NDArray[np.int64]:
        counts = self.samples["num_annotations"].astype(np.int64)
        return np.cumsum(counts) - counts + 1

    @cached_property
    def _ids_by_name(self) -> dict[str, int]:
        return {category["name"]: category["id"] for category in self.manifest.categories}

    def _category_of(self, label: int | str) -> int:
        return label if isinstance(label, int) else self._ids_by_name.get(label, -1)  # which is no category

    def coco(self) -> dict[str, Any]:
        """The COCO data set, read from the shards alone: the ground truth for evaluation.

        Records are the original ones, in the original order of images, so AP is that of the original file.
        """
        found = enumerate(self.read_in_order(range(self.num_samples)))
        samples = [self.reread(i) if isinstance(sample, ShardError) else sample for i, sample in found]
        return {
            **self.manifest.header,
            "images": [sample.record for sample in samples],
            "annotations": [annotation for sample in samples for annotation in sample.annotations],
            "categories": self.manifest.categories,
        }

    def _checked(self, index: int, raw: bytes | OSError) -> RawSample | ShardError:
        try:
            if isinstance(raw, OSError):
                self._refuse_unread(index, raw)
            return self.check(index, raw)
        except ShardError as error:
            return error

    def _refuse_unread(self, index: int, error: OSError) -> NoReturn:
        if isinstance(error, RemoteError):
            raise error  # the server is at fault, and no sample damaged
        self.refuse(index, f"it cannot be read ({error})")

    def refuse(self, index: int, fault: str) -> NoReturn:
        """Raise a ShardError that names shard and key of a sample."""
        row = self.samples[index]
        shard, key, offset = self.files.names[row["shard"]], self.key(index), int(row["offset"])
        error = ShardError(
            f"{shard}: sample {key} at byte {offset} is damaged: "
            f"{fault}; copy the shard again, or write the shards again"
        )
        error.shard, error.key, error.offset, error.reason = shard, key, offset, fault
        raise error


def open_shards(
    location: str | Path,
    *,
    label_map: LabelMapKind = "contiguous",
    remote: RemoteConfig | None = None,
    sizes_known: bool = False,
) -> Shards:
    """Open a folder of shards after checking manifest, index and the presence and size of every shard.

    Args:
        location: of what `write_shards` wrote: a folder, or its s3://, gs://, http(s):// or file:// URL.
        label_map: how category ids become labels (see `make_label_map`).
        remote: how a remote folder is read; None: with the default settings.
        sizes_known: the sizes of remote shards were checked before, by another process of the run.

    Raises:
        ValueError: there are no shards, or they are incomplete or not those of the index.
        RemoteError: a server cannot be reached, or refuses.
    """
    location = check_location(str(location))
    folder = (
        RemoteFolder(location, remote or RemoteConfig()) if is_remote(location) else LocalFolder(location)
    )
    manifest, samples = load_header(folder, folder.location, reads=2 if is_remote(location) else 1)
    if isinstance(folder, LocalFolder) or not sizes_known:
        check_sizes(folder, folder.location, manifest)
    if isinstance(folder, LocalFolder):
        files: ShardFiles = LocalFiles([folder.path / shard.name for shard in manifest.shards])
    else:
        files = make_remote_files(folder.connection, manifest, samples)
    labels = make_label_map(manifest.categories, label_map)
    return Shards(folder.location, manifest, samples, labels, manifest.fingerprint, files)


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
