"""The samples of a plain tar as WebDataset groups its members: neighbours with one key."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from raydetr.shards.validation import InvalidDataError

# folders, then a name up to its first dot: the key; the rest is the extension
MEMBER_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


@dataclass
class TarSample:
    """Members of one key, by their extensions in lower case."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)

    @property
    def begin(self) -> int:
        """Offset of the first header, in bytes."""
        return min(member.offset for member in self.members.values())

    @property
    def end(self) -> int:
        """Offset of the byte after the last member and its padding."""
        return max(padded_end(member) for member in self.members.values())


def padded_end(member: tarfile.TarInfo) -> int:
    """Offset of the byte after a member's content and padding."""
    return member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def tar_samples(path: Path) -> Iterator[TarSample]:
    """Group the members of a tar; folders, links and names without an extension are left out.

    Raises:
        Fault: it is not a plain tar, is damaged or cut off, or a sample has two members with one extension.
        OSError: it cannot be read.
    """
    current: TarSample | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                parts = MEMBER_NAME.fullmatch(member.name) if member.isreg() else None
                if parts is None:
                    continue
                if current is None or parts[1] != current.key:
                    if current is not None:
                        yield current
                    current = TarSample(parts[1])
                extension = parts[2].lower()
                if extension in current.members:
                    raise InvalidDataError(f"sample {current.key} has two members .{extension}")
                current.members[extension] = member
            _check_end(path, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise InvalidDataError(f"is no plain tar, or damaged ({error})") from None
    if current is not None:
        yield current


def _check_end(path: Path, end: int) -> None:
    """After the last member there are two blocks of zeros or more; tarfile stops as well at a damaged header."""
    with path.open("rb") as file:
        file.seek(end)
        length = 0
        while chunk := file.read(2**20):
            if any(chunk):
                raise InvalidDataError(f"the tar header at byte {end} is damaged")
            length += len(chunk)
    if length < 2 * tarfile.BLOCKSIZE:
        raise InvalidDataError(f"it is cut off: the end of the tar is missing after byte {end}")
