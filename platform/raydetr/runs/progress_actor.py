"""Hold the progress of a run. Import nothing large here: the process of the actor would wait for it, for seconds."""

from __future__ import annotations

from typing import Any


class ProgressActor:
    """Holds the latest value that rank 0 sent to the driver, in a process of its own."""

    def __init__(self) -> None:
        self._latest: Any = None

    def update(self, value: Any) -> None:
        """Replace the value."""
        self._latest = value

    def read(self) -> Any:
        """Return the latest value; None before the first."""
        return self._latest
