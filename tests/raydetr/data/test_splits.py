"""Opening the splits of a configuration, and writing synthetic ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from raydetr import recipes
from raydetr.config import override
from raydetr.data.splits import write_missing_synthetic


@pytest.mark.parametrize("split", ["train", "val"])
def test_synthetic_data_cannot_be_written_to_a_server(tmp_path: Path, split: str) -> None:
    local = {"data.train": str(tmp_path / "train"), "data.val": str(tmp_path / "val")}
    config = override(recipes.quickstart(), {**local, f"data.{split}": "s3://bucket/data"})
    with pytest.raises(ValueError, match=r"not possible to s3://bucket/data: set data.synthetic=null"):
        write_missing_synthetic(config.data)
    assert list(tmp_path.iterdir()) == []
