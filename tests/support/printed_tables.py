"""Read the tables that a command prints."""

from __future__ import annotations

import re


def cells(text: str) -> dict[str, list[str]]:
    """First cell of each line -> the other cells. Of lines with the same first cell, the last one counts."""
    rows = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip())
    return {row[0]: row[1:] for row in rows}
