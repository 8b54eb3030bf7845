from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydetr.shards.manifest import data_fingerprint
from raydetr.shards.reader import Shards
from raydetr.shards.verify import check_shards


@pytest.fixture
def folder(shards: Shards, tmp_path: Path) -> Path:
    """Return a copy that tests may corrupt."""
    shutil.copytree(shards.path, tmp_path / "copy")
    return tmp_path / "copy"


def test_valid_shards_pass_in_one_process_and_in_two(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert check_shards(folder, progress=lambda *counts: seen.append(counts)).num_samples == 53
    assert seen == [(count, 53) for count in range(1, 54)]
    check_shards(folder, workers=2)


def test_every_flipped_bit_of_a_shard_is_found(folder: Path, shards: Shards) -> None:
    """In samples, between them, and in the tar's end."""
    path = folder / "shard-00003.tar"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [*rng.integers(len(content), size=25).tolist(), len(content) - 1, 3, 150]
    for place in places:
        corrupt = bytearray(content)
        corrupt[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(corrupt)
        with pytest.raises(ValueError, match=r"shard-00003.tar: its sha256 is \w+..., the manifest has"):
            check_shards(folder)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def forge(folder: Path, number: int, content: bytes) -> None:
    """Replace a shard, and its size and sha256 in the manifest, so that only its content reveals the change."""
    name = f"shard-{number:05d}.tar"
    (folder / name).write_bytes(content)
    state = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(folder, lambda manifest: manifest["shards"][number].update(state))


def forge_crc(folder: Path, index: int) -> None:
    """Update the crc of a sample in the index, and the fingerprint in the manifest."""
    with np.load(folder / "index.npz") as arrays:
        samples = arrays["samples"]
    row = samples[index]
    raw = (folder / f"shard-{row['shard']:05d}.tar").read_bytes()[row["offset"] :][: row["length"]]
    samples["crc32"][index] = zlib.crc32(raw)
    np.savez(folder / "index.npz", samples=samples)
    manifest = json.loads((folder / "manifest.json").read_text())
    fingerprint = data_fingerprint(samples, manifest["categories"])
    edit_manifest(folder, lambda manifest: manifest.update(fingerprint=fingerprint))


def replace_image(folder: Path, shards: Shards, index: int, new: bytes) -> None:
    row = shards.samples[index]
    path = folder / f"shard-{row['shard']:05d}.tar"
    content = bytearray(path.read_bytes())
    at = int(row["offset"]) + int(row["image_offset"])
    assert len(new) <= row["image_length"]
    content[at : at + int(row["image_length"])] = new.ljust(int(row["image_length"]), b"\0")
    forge(folder, int(row["shard"]), bytes(content))
    forge_crc(folder, index)


def test_an_image_of_another_size_is_found_though_every_checksum_fits(folder: Path, shards: Shards) -> None:
    small = io.BytesIO()
    Image.new("RGB", (16, 16)).save(small, "JPEG")
    replace_image(folder, shards, 20, small.getvalue())
    with pytest.raises(
        ValueError, match=r"1 problem\n  shard-00001.tar: sample \d{12}: its image: the file holds 16x16"
    ):
        check_shards(folder)


def test_an_image_that_cannot_be_decoded_is_found(folder: Path, shards: Shards) -> None:
    replace_image(folder, shards, 20, b"<html>404</html>")
    with pytest.raises(
        ValueError, match=r"shard-00001.tar: sample \d{12}: its image: is not a JPEG or PNG image"
    ):
        check_shards(folder)


def test_a_sample_that_is_not_in_the_index_is_found(folder: Path) -> None:
    path = folder / "shard-00003.tar"
    with tarfile.open(path, "a") as tar:
        for extension in ("jpg", "json"):
            member = tarfile.TarInfo(f"000000000999.{extension}")
            tar.addfile(member, io.BytesIO())
    forge(folder, 3, path.read_bytes())
    with pytest.raises(
        ValueError, match=r"1 problem\n  shard-00003.tar: sample 000000000999 is not in the index"
    ):
        check_shards(folder)


def test_tar_without_its_end_is_found(folder: Path, shards: Shards) -> None:
    row = shards.samples[-1]
    end = int(row["offset"]) + int(row["length"])
    forge(folder, 3, (folder / "shard-00003.tar").read_bytes()[:end])
    with pytest.raises(
        ValueError, match=f"1 problem\n  shard-00003.tar: it is truncated: .* after byte {end}"
    ):
        check_shards(folder)


def test_exchanged_shards_are_found(folder: Path) -> None:
    first, second = (folder / f"shard-0000{number}.tar" for number in (0, 1))
    contents = first.read_bytes(), second.read_bytes()
    forge(folder, 0, contents[1])
    forge(folder, 1, contents[0])
    with pytest.raises(
        ValueError, match=r"shard-00000.tar: sample \d{12} at byte 0: the index has sample"
    ) as caught:
        check_shards(folder)
    assert "  and " in str(caught.value)
    assert str(caught.value).count("\n") == 11


def test_missing_cut_and_extra_files_are_listed_together(folder: Path) -> None:
    (folder / "shard-00000.tar").unlink()
    path = folder / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    shutil.copy(folder / "shard-00002.tar", folder / "shard-00004.tar")
    with pytest.raises(ValueError, match="problems") as caught:
        check_shards(folder)
    for text in (
        "shard-00004.tar is not in manifest.json",
        "shard-00000.tar: is missing: copy it again",
        "shard-00001.tar: has 3000 bytes instead of",
        "the shard ends after",
    ):
        assert text in str(caught.value)


def test_other_label_maps_are_found(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["label_maps"]["contiguous"].update({"90": 7}))
    with pytest.raises(ValueError, match="its label maps do not match its categories"):
        check_shards(folder)


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no shards found"):
        check_shards(tmp_path)
