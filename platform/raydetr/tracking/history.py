"""Record the metrics of a run in a JSON Lines file in the run's folder; a resumed run continues the file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class History:
    """Rows {"step", "position", metric: value, ...} in chronological order; a value that is no number is None."""

    def __init__(self, path: Path, position: int, is_writer: bool) -> None:
        """Read the rows up to `position`; drop those after it.

        An interrupted process may have logged rows after its last checkpoint. The run trains these steps again, and
        would otherwise have them twice.
        """
        self._path, self._is_writer = path, is_writer
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [row for line in lines if (row := _parse(line)) is not None]
        self.rows: list[dict[str, Any]] = [row for row in rows if row["position"] <= position]
        if is_writer:
            path.write_text("".join(_format(row) for row in self.rows))

    def append(self, step: int, position: int, metrics: Mapping[str, float]) -> None:
        """Append a row, also to the file."""
        assert self._is_writer
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        row = {"step": step, "position": position, **numbers}
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(_format(row))

    def last_ap(self) -> float | None:
        """Return the AP of the last evaluation; None before the first."""
        values = [row["AP"] for row in self.rows if "AP" in row]
        return values[-1] if values else None

    def curves(self, prefix: str, over: str) -> dict[str, list[tuple[float, float]]]:
        """Return the metrics whose names start with `prefix`, as points (value of `over`, value)."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            for name, value in row.items():
                if name.startswith(prefix) and over in row and value is not None:
                    curves.setdefault(name, []).append((row[over], value))
        return curves


def _format(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _parse(line: str) -> dict[str, Any] | None:
    """Parse a line; return None for one that was cut off when the process was killed."""
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row
