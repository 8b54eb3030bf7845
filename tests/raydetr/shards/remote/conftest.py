"""Each test has a folder of its own for temporary files, where the processes of a node share manifest and index."""

from __future__ import annotations

import tempfile
from multiprocessing import util
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    util.get_temp_dir()  # chosen once per process; the paths of its sockets must be short
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
