"""Makes the packages importable from a checkout or a job's working directory when they are not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def add_sources() -> None:
    """Put `platform/` and `models/` on the path unless `raydetr` is installed."""
    if importlib.util.find_spec("raydetr") is None:
        root = Path(__file__).resolve().parent.parent
        sys.path[:0] = [str(root / "platform"), str(root / "models")]
