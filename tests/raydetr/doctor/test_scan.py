"""The scan of all samples, in one process and in several."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import planted_shards as made
from raydetr.doctor.scan import CHUNK, scan
from raydetr.shards.reader import Shards, open_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    split = made.healthy(2 * CHUNK + 7, seed=1)
    split.samples[70].image = split.samples[70].image[:400]
    split.samples[71].annotations[0]["bbox"] = None
    return open_shards(made.write(split, tmp_path_factory.mktemp("scan") / "train"))


def test_several_processes_give_the_result_of_one(shards: Shards) -> None:
    calls: list[tuple[int, int]] = []
    single = scan(shards, num_processes=1, progress=lambda done, total: calls.append((done, total)))
    parallel = scan(shards, num_processes=2)
    assert (single.images == parallel.images).all()
    assert single.objects.tobytes() == parallel.objects.tobytes()  # NaN equals NaN
    assert single.corrupt == parallel.corrupt
    total = shards.num_samples
    assert calls == [(done, total) for done in range(1, total + 1)]


def test_the_result_has_what_was_written(shards: Shards) -> None:
    result = scan(shards, num_processes=1)
    assert sorted(result.corrupt) == [70, 71]
    assert "cannot be decoded" in result.corrupt[70]
    assert "annotation 0" in result.corrupt[71]
    is_read = result.images["is_read"]
    assert np.flatnonzero(~is_read).tolist() == [70, 71]
    assert (result.images["width"][is_read] == made.WIDTH).all()
    assert (result.images["height"][is_read] == made.HEIGHT).all()
    assert len(np.unique(result.images["digest"][is_read])) == is_read.sum()
    assert np.flatnonzero(~result.objects["is_box"]).tolist() == [142]
    split = made.healthy(2 * CHUNK + 7, seed=1)
    expected = [a["bbox"] for sample in split.samples for a in sample.annotations]
    found = result.objects["box"]
    assert np.isnan(found[142]).all()
    np.testing.assert_array_equal(np.delete(found, 142, axis=0), np.delete(expected, 142, axis=0))


def test_an_image_that_only_a_lenient_decoder_accepts_is_corrupt(tmp_path: Path) -> None:
    """Training refuses it."""
    split = made.healthy(10, seed=1)
    content = split.samples[3].image
    split.samples[3].image = content[: len(content) // 2] + content[-2:]
    Image.open(io.BytesIO(split.samples[3].image)).load()
    result = scan(open_shards(made.write(split, tmp_path / "train")), num_processes=1)
    assert sorted(result.corrupt) == [3]


def test_samples_beyond_the_end_of_a_truncated_shard_are_corrupt(tmp_path: Path) -> None:
    folder = made.write(made.healthy(10, seed=1), tmp_path / "train")
    shards = open_shards(folder)
    shard = folder / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[: int(shards.samples["offset"][6])])
    result = scan(shards, num_processes=1)
    assert sorted(result.corrupt) == [6, 7, 8, 9]
    assert "the shard ends after 0 of its" in result.corrupt[6]
