"""Tasks for pools of processes, which find them by their module's name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable


def process_of(task: int, advance: Callable[[int], None]) -> tuple[int, int]:
    """The task and the process that did it; odd tasks take longer."""
    time.sleep(0.05 * (task % 2))
    advance(1)
    return task, os.getpid()


def failing(task: int, advance: Callable[[int], None]) -> int:
    """Task 2 fails as a full disk does; the others take their time, in small steps."""
    if task == 2:
        raise OSError(28, "No space left on device")
    for _ in range(100):
        time.sleep(0.05)
        advance(1)
    return task
