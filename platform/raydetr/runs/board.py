"""What the driver reads while workers train. Light: it runs in a process of its own."""

from __future__ import annotations

from typing import Any


class Board:
    """A small actor that holds the latest word of the first worker to the driver."""

    def __init__(self) -> None:
        self._latest: Any = None

    def post(self, word: Any) -> None:
        """Replace what is held."""
        self._latest = word

    def read(self) -> Any:
        """What was posted last; None before the first."""
        return self._latest
