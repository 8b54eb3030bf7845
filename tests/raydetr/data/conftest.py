from __future__ import annotations

import os
from pathlib import Path

import pytest

from made_coco import write_coco
from raydetr.data.index import Shards, open_shards
from raydetr.data.writing.shards import write_shards


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images and annotations of 53 made pictures."""
    return write_coco(tmp_path_factory.mktemp("coco"), 53)


@pytest.fixture(scope="session")
def shards(coco: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """The same in four shards."""
    out = tmp_path_factory.mktemp("shards") / "made"
    write_shards(*coco, out, samples_per_shard=15)
    return open_shards(out)


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    folder = os.environ.get("RAYDETR_COCO_TINY")
    if not folder:
        pytest.skip("RAYDETR_COCO_TINY does not name a folder with annotations/, train2017/ and val2017/")
    return Path(folder)
