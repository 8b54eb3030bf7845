from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made_coco import write_json
from made_results import average_precision
from raydetr.shards.manifest import make_label_map
from raydetr.shards.reader import ShardError, Shards, check_same_categories, open_shards
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source


def test_average_precision_from_the_shards_is_that_of_the_json(
    coco: tuple[Path, Path], shards: Shards
) -> None:
    original, ours = json.loads(coco[1].read_text()), shards.coco()
    expected = average_precision(original)
    assert 0.2 < expected[0] < 0.9
    assert average_precision(ours) == expected
    for key in ("images", "annotations", "categories"):
        assert sorted(ours[key], key=lambda record: record["id"]) == sorted(
            original[key], key=lambda r: r["id"]
        )


def test_label_maps(shards: Shards) -> None:
    assert shards.label_map.category_ids == (3, 7, 90)
    assert shards.label_map.names == ("cat", "dog", "toothbrush")
    assert shards.label_map.labels == {3: 0, 7: 1, 90: 2}
    official = open_shards(shards.path, label_map="category_id").label_map
    assert official.num_classes == 91
    assert all(official.labels[category_id] == category_id for category_id in (3, 7, 90))
    assert [official.names[label] for label in (3, 4, 90)] == ["cat", "(unused)", "toothbrush"]
    with pytest.raises(
        ValueError, match=r"category ids reach 123456, too large for labels: use data.label_map"
    ):
        make_label_map([{"id": 123456, "name": "x"}], "category_id")


def test_head_has_the_first_images_and_its_own_fingerprint(shards: Shards) -> None:
    first = shards.head(8)
    assert first.num_samples == 8
    assert first.coco()["images"] == shards.coco()["images"][:8]
    assert first.fingerprint == f"{shards.fingerprint}[:8]"
    assert shards.head(53) is shards
    with pytest.raises(ValueError, match="holds 53 images, so not the first 54"):
        shards.head(54)


def test_shards_can_be_pickled(shards: Shards) -> None:
    shards.read(0)
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.read(52) == shards.read(52)


def test_categories_must_agree(coco: tuple[Path, Path], shards: Shards, tmp_path: Path) -> None:
    data = json.loads(coco[1].read_text())
    data["categories"] = [*data["categories"][:2], {"id": 90, "name": "comb"}]
    write_source(coco_source(coco[0], write_json(tmp_path / "a.json", data)), tmp_path / "other")
    check_same_categories(shards, shards)
    with pytest.raises(ValueError, match=r"different categories .*\(90, 'comb'\), \(90, 'toothbrush'\)"):
        check_same_categories(shards, open_shards(tmp_path / "other"))


# --- incomplete folders


def edit_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def swap_index(folder: Path) -> None:
    with np.load(folder / "index.npz") as arrays:
        samples = arrays["samples"]
    samples["crc32"][3] += 1
    np.savez(folder / "index.npz", samples=samples)


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "nothing",
        lambda f: shutil.rmtree(f),
        r"no shards found; write them with `raydetr shards write --images",
    ),
    (
        "no manifest",
        lambda f: (f / "manifest.json").unlink(),
        "have no manifest.json, so writing did not finish",
    ),
    (
        "bad manifest",
        lambda f: (f / "manifest.json").write_text("{"),
        r"manifest.json: is not a manifest of shards",
    ),
    (
        "field",
        lambda f: edit_manifest(f, surprise=1),
        r"is not a manifest of shards \(.*surprise.*\): write the shards",
    ),
    (
        "version",
        lambda f: edit_manifest(f, format_version=9),
        "format_version is 9, this program reads 3",
    ),
    (
        "no shard",
        lambda f: (f / "shard-00002.tar").unlink(),
        "shard-00002.tar is missing: copy these shards again",
    ),
    (
        "cut shard",
        lambda f: (f / "shard-00001.tar").write_bytes(b"x" * 99),
        r"shard-00001.tar has 99 bytes instead of \d+: copy these shards again",
    ),
    ("no index", lambda f: (f / "index.npz").unlink(), r"index.npz: cannot be read"),
    ("bad index", lambda f: (f / "index.npz").write_bytes(b"PK"), r"index.npz: cannot be read"),
    ("stale index", swap_index, r"index.npz: is not the index of this manifest: write the shards again"),
]


@pytest.mark.parametrize(
    ("corrupt", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_incomplete_folders_are_errors(
    shards: Shards, tmp_path: Path, corrupt: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(shards.path, folder)
    corrupt(folder)
    with pytest.raises(ValueError, match=message) as caught:
        open_shards(folder)
    assert str(folder) in str(caught.value)


def test_every_flipped_bit_of_a_sample_is_found(shards: Shards, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(shards.path, folder)
    rng = np.random.default_rng(0)
    row = shards.samples[20]
    name = shards.manifest.shards[row["shard"]].name
    original = (folder / name).read_bytes()
    for _ in range(200):
        corrupt = bytearray(original)
        corrupt[int(row["offset"]) + int(rng.integers(row["length"]))] ^= 1 << int(rng.integers(8))
        (folder / name).write_bytes(corrupt)
        with pytest.raises(ShardError, match=rf"{name}: sample {row['image_id']:012d} at byte .*crc32"):
            open_shards(folder).read(20)
        assert open_shards(folder).read(19) == shards.read(19)


def test_shard_cut_after_opening(shards: Shards, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(shards.path, folder)
    opened = open_shards(folder)
    (folder / "shard-00000.tar").write_bytes((folder / "shard-00000.tar").read_bytes()[:1000])
    with pytest.raises(ShardError, match=r"the shard ends after 1000 of its \d+ bytes; copy the shard again"):
        opened.read(0)
