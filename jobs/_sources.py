"""Make the packages importable from a checkout or from the working directory of a job."""

from __future__ import annotations

import sys
from pathlib import Path


def add_sources() -> None:
    """Put `platform/` and `models/` first on the import path: what was submitted runs, not what is installed."""
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root / "platform"), str(root / "models")]
