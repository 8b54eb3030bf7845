"""The indexes for DALI and Energon, compared with independent readings of the tars."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from raydetr.shards.reader import Shards
from raydetr.shards.tar_samples import export_indexes


@pytest.fixture
def folder(shards: Shards, tmp_path: Path) -> Path:
    shutil.copytree(shards.path, tmp_path / "copy")
    return tmp_path / "copy"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.tar"))


def header_walk(content: bytes) -> list[tuple[str, int, int, int]]:
    """Return name, header offset, content offset and size of each member, from the octal fields of the headers."""
    found, at = [], 0
    while content[at]:
        size = int(content[at + 124 : at + 135], 8)
        found.append((content[at : at + 100].rstrip(b"\0").decode(), at, at + 512, size))
        at += 512 + (size + 511) // 512 * 512
    return [*found, ("", at, at, 0)]


def test_dali(folder: Path, shards: Shards) -> None:
    """Each line is parsed like in DALI's reader: extension, offset, size and name of every member."""
    paths = export_indexes(folder, names(folder), "dali")
    assert [path.name for path in paths] == [f"shard-0000{number}.idx" for number in range(4)]
    index = 0
    for path in paths:
        content = path.with_suffix(".tar").read_bytes()
        members = {name: (at, size) for name, _, at, size in header_walk(content)}
        first, *lines = path.read_text().splitlines()
        assert first == f"v1.2 {len(lines)}"
        for line in lines:
            words = line.split(" ")
            parts = {}
            for extension, offset, size, name in zip(*[iter(words)] * 4, strict=True):
                assert members[name] == (int(offset), int(size))
                parts[extension] = content[int(offset) : int(offset) + int(size)]
            sample = shards.read(index)
            assert json.loads(parts.pop("json"))["image"] == sample.record
            assert list(parts.values()) == [sample.image]
            index += 1
    assert index == 53


@pytest.mark.skipif(not shutil.which("tar"), reason="there is no program `tar`")
def test_dali_equals_gnu_tar(folder: Path) -> None:
    """DALI's own tool uses `tar --list --block-number`, which prints the blocks of the headers."""
    for path in export_indexes(folder, names(folder), "dali"):
        command = ["tar", "--list", "--block-number", "--file", str(path.with_suffix(".tar"))]
        run = subprocess.run(command, capture_output=True, text=True)
        blocks = [int(number) for number in re.findall(r"^block (\d+): \d", run.stdout, re.MULTILINE)]
        if not blocks:
            pytest.skip("this `tar` is not GNU's")
        offsets = [int(word) for line in path.read_text().splitlines()[1:] for word in line.split(" ")[1::4]]
        assert offsets == [(block + 1) * 512 for block in blocks]


def test_energon(folder: Path, shards: Shards) -> None:
    """Samples are read back using only the offsets; the next offset is the end of a sample."""
    paths = export_indexes(folder, names(folder), "energon")
    assert [path.name for path in paths] == [f"shard-0000{number}.tar.idx" for number in range(4)]
    index = 0
    for path in paths:
        content = path.with_suffix("").read_bytes()
        raw = path.read_bytes()
        offsets = [struct.unpack("<Q", raw[at : at + 8])[0] for at in range(0, len(raw), 8)]
        assert offsets[-1] == header_walk(content)[-1][1]
        for begin, end in itertools.pairwise(offsets):
            with tarfile.open(fileobj=io.BytesIO(content[begin:end] + bytes(1024))) as tar:
                parts = {name.partition(".")[2]: tar.extractfile(name) for name in tar.getnames()}
                read = {name: file.read() for name, file in parts.items() if file is not None}
            sample = shards.read(index)
            assert json.loads(read.pop("json"))["image"] == sample.record
            assert list(read.values()) == [sample.image]
            index += 1
    assert index == 53


def test_corrupt_shard_is_rejected(folder: Path) -> None:
    path = folder / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[: np.random.default_rng(0).integers(2000, 9000)])
    with pytest.raises(ValueError, match=r"shard-00001.tar: .*: copy the shard again, or write"):
        export_indexes(folder, names(folder), "dali")


def test_names_with_spaces(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a b.jpg"))
    with pytest.raises(
        ValueError, match=r"the name 'a b.jpg' contains whitespace, which DALI's index cannot represent"
    ):
        export_indexes(tmp_path, ["a.tar"], "dali")
    export_indexes(tmp_path, ["a.tar"], "energon")
    assert (tmp_path / "a.tar.idx").read_bytes() == struct.pack("<QQ", 0, 512)
