"""Group the members of a tar into samples, as webdataset does; export the indexes of other readers."""

from __future__ import annotations

import re
import struct
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from raydetr.shards.validation import InvalidDataError
from raydetr.store.output_folder import write_atomically
from raydetr.user_files import open_file

# The key is the folders and the name up to its first dot; the rest is the extension.
MEMBER_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


@dataclass
class TarSample:
    """The members of one key, by lower-case extension."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)

    @property
    def begin(self) -> int:
        """Offset of the first header, in bytes."""
        return min(member.offset for member in self.members.values())

    @property
    def end(self) -> int:
        """Offset of the byte after the last member and its padding."""
        last = max(self.members.values(), key=lambda member: member.offset)
        return last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def place(self) -> tuple[int, ...]:
        """Return the fields of SAMPLE_DTYPE from `offset` to `json_length`, for an image and its record."""
        # webdataset sorts the members by extension, so the json is between `jpg` and `png`
        members = [self.members[extension] for extension in sorted(self.members, key="json".__eq__)]
        parts = [value for member in members for value in (member.offset_data - self.begin, member.size)]
        return (self.begin, self.end - self.begin, *parts)


def tar_samples(path: Path) -> list[TarSample]:
    """Return the samples of a tar; folders, links and names without an extension are omitted.

    Raises:
        InvalidDataError: it is not a plain tar, is corrupt or truncated, or holds no samples; or the members of a
            sample are not consecutive, or two have the same extension.
        OSError: it cannot be read.
    """
    samples: dict[str, TarSample] = {}
    last = ""
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                parts = MEMBER_NAME.fullmatch(member.name) if member.isreg() else None
                if parts is None:
                    continue
                key, extension = parts[1], parts[2].lower()
                if key != last and key in samples:
                    raise InvalidDataError(
                        f"sample {key}: its members are not consecutive: sort them, for example with tar --sort=name"
                    )
                members = samples.setdefault(key, TarSample(key)).members
                if extension in members:
                    raise InvalidDataError(f"sample {key} has two members .{extension}")
                members[extension], last = member, key
            _check_end(file, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise InvalidDataError(f"is not a plain tar, or corrupt ({error})") from None
    if not samples:
        raise InvalidDataError("holds no samples")
    return list(samples.values())


def _check_end(file: BinaryIO, end: int) -> None:
    """Raise unless two or more blocks of zeros follow the last member; tarfile also stops at a corrupt header."""
    file.seek(end)
    length = 0
    while chunk := file.read(2**20):
        if any(chunk):
            raise InvalidDataError(f"the tar header at byte {end} is corrupt")
        length += len(chunk)
    if length < 2 * tarfile.BLOCKSIZE:
        raise InvalidDataError(f"it is truncated: the end of the tar is missing after byte {end}")


IndexFormat = Literal["dali", "energon"]


def export_indexes(folder: Path, names: list[str], kind: IndexFormat) -> list[Path]:
    """Write an index next to each shard; an existing one is replaced.

    DALI: `name.idx`, text. The first line is `v1.2 NUMBER`, followed by one line per sample: extension, content
    offset, size and name of each member. Energon: `name.tar.idx`, little-endian 64-bit integers: the offset of each
    sample's first header, then the offset of the end.

    Args:
        folder: folder of the shards.
        names: names of the tar files.
        kind: format of the index.

    Raises:
        ValueError: a shard is corrupt, or has names that the format cannot represent.
        OSError: an index cannot be written.
    """
    make, suffix = (_dali, ".idx") if kind == "dali" else (_energon, ".tar.idx")
    paths = []
    for name in names:
        path = folder / name
        try:
            content = make(tar_samples(path))
        except (OSError, InvalidDataError) as error:
            raise ValueError(f"{path}: {error}: copy the shard again, or write the shards again") from None
        paths.append(path.with_name(path.stem + suffix))
        write_atomically(paths[-1], content)
    return paths


def _dali(samples: list[TarSample]) -> bytes:
    lines = [f"v1.2 {len(samples)}"]
    for sample in samples:
        words = []
        for member in sample.members.values():
            if any(character.isspace() for character in member.name):
                raise InvalidDataError(
                    f"the name {member.name!r} contains whitespace, which DALI's index cannot represent"
                )
            _, _, extension = member.name.rpartition("/")[2].partition(".")
            words.append(f"{extension} {member.offset_data} {member.size} {member.name}")
        lines.append(" ".join(words))
    return ("\n".join(lines) + "\n").encode()


def _energon(samples: list[TarSample]) -> bytes:
    offsets = [*(sample.begin for sample in samples), samples[-1].end]
    return struct.pack(f"<{len(offsets)}Q", *offsets)
