"""Tasks for process pools, which import them from this module."""

from __future__ import annotations

import os
import time
from collections.abc import Callable


def process_of(task: int, advance: Callable[[int], None]) -> tuple[int, int]:
    """Return the task and the process that ran it; tasks with odd numbers take longer."""
    time.sleep(0.05 * (task % 2))
    advance(1)
    return task, os.getpid()


def failing(task: int, advance: Callable[[int], None]) -> int:
    """Fail in task 2 like a full disk; run the others for five seconds, in small steps."""
    if task == 2:
        raise OSError(28, "No space left on device")
    for _ in range(100):
        time.sleep(0.05)
        advance(1)
    return task
