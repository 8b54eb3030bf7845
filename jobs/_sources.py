"""Make the packages importable from a checkout or from the working directory of a job."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def add_sources() -> None:
    """Add `platform/` and `models/` to the import path, unless `raydetr` is installed."""
    if importlib.util.find_spec("raydetr") is None:
        root = Path(__file__).resolve().parent.parent
        sys.path[:0] = [str(root / "platform"), str(root / "models")]
