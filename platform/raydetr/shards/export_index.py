"""The indexes that other readers want beside a shard: NVIDIA DALI's `.idx` and Megatron-Energon's `.tar.idx`.

Facts: DALI's `tools/wds2idx.py`, version v1.2 of its format, and Energon's `itar.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from raydetr.shards.tar_samples import TarSample, tar_samples
from raydetr.shards.validation import InvalidDataError
from raydetr.store.output_folder import write_atomically

IndexFormat = Literal["dali", "energon"]


def write_other_indexes(folder: Path, names: list[str], kind: IndexFormat) -> list[Path]:
    """Write an index beside each shard; one that is there is replaced.

    DALI: `name.idx`, text. The first line is `v1.2 NUMBER`, then there is a line for each sample: extension, offset of
    the content, size and name of each member. Energon: `name.tar.idx`, little-endian 64-bit numbers: the offset of
    each sample's first header, and at last that of the end.

    Args:
        folder: of the shards.
        names: of the tars.
        kind: whose index.

    Raises:
        ValueError: a shard is damaged, or has names that the format cannot hold.
        OSError: an index cannot be written.
    """
    make: Callable[[list[TarSample]], bytes] = _dali if kind == "dali" else _energon
    suffix = ".idx" if kind == "dali" else ".tar.idx"
    paths = []
    for name in names:
        path = folder / name
        try:
            content = make(list(tar_samples(path)))
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
                    f"the name {member.name!r} has a blank, which DALI's index cannot hold"
                )
            _, _, extension = member.name.rpartition("/")[2].partition(".")
            words.append(f"{extension} {member.offset_data} {member.size} {member.name}")
        lines.append(" ".join(words))
    return ("\n".join(lines) + "\n").encode()


def _energon(samples: list[TarSample]) -> bytes:
    offsets = [sample.begin for sample in samples] + [samples[-1].end if samples else 0]
    return struct.pack(f"<{len(offsets)}Q", *offsets)
