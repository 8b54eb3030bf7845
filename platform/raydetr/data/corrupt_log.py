"""The damaged samples that a run has met: a file of rows, a part of its checkpoints, and a budget."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from raydetr.data.corrupt import Damage

LEDGER = "damage.jsonl"
NUM_TOLD = 5  # damaged samples that a message lists


class DamageError(ValueError):
    """More samples are damaged than a run may meet; the message names the ledger, the first ones and a remedy."""


class Ledger:
    """All damage that a run met, in order. Every worker holds the same rows."""

    def __init__(self, rows: Iterable[Damage] = ()) -> None:
        self.rows = list(rows)
        self._samples = {(row.shard, row.key) for row in self.rows}  # kept, as it is asked for all the time

    @property
    def num_samples(self) -> int:
        """Different samples: one that is met again in a later epoch is counted once."""
        return len(self._samples)

    def to_plain(self) -> list[dict[str, Any]]:
        """As plain values, for a checkpoint."""
        return [dataclasses.asdict(row) for row in self.rows]

    @staticmethod
    def from_plain(rows: Iterable[dict[str, Any]]) -> Ledger:
        """What `to_plain` gave."""
        return Ledger(Damage(**row) for row in rows)

    def write(self, folder: Path) -> None:
        """Write all rows to `damage.jsonl` in the folder of a run; without rows it shall not exist."""
        (folder / LEDGER).unlink(missing_ok=True)
        self._append(folder, self.rows)

    def add(self, rows: Sequence[Damage], folder: Path | None) -> None:
        """Note what was met, also in the file, on disk at once, where `folder` is given."""
        self.rows += rows
        self._samples.update((row.shard, row.key) for row in rows)
        if folder is not None:
            self._append(folder, rows)

    def _append(self, folder: Path, rows: Sequence[Damage]) -> None:
        if rows:
            with (folder / LEDGER).open("a") as file:
                file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)

    def check(self, budget: int, folder: Path) -> None:
        """Make sure that not too many samples are damaged.

        Raises:
            DamageError: more than `budget` different ones are.
        """
        if self.num_samples <= budget:
            return
        first = list({(row.shard, row.key): str(row) for row in self.rows}.values())[:NUM_TOLD]
        listing = "".join(f"\n  {row}" for row in first)
        raise DamageError(
            f"{self.num_samples} samples are damaged, and data.max_damaged allows {budget}; "
            f"{folder / LEDGER} lists them, the first are:{listing}\n"
            "Copy these shards again, or write them again, and resume; or allow more with data.max_damaged."
        )


def default_budget(num_samples: int) -> int:
    """Damaged samples that a run without `data.max_damaged` may meet: one in a hundred, at least ten."""
    return max(num_samples // 100, 10)
