"""Background threads: they run calls, and they end."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from raydetr.store.background import BackgroundThreads


class Owner:
    """Calls its own methods in the background, like code that fetches files."""

    def __init__(self, name: str) -> None:
        self.threads = BackgroundThreads(3, name)

    def double(self, number: int) -> int:
        """Return twice the number; raise for 7."""
        if number == 7:
            raise ValueError("seven")
        return 2 * number


def test_threads_end_with_their_owner() -> None:
    name = "threads-of-a-test"
    owner = Owner(name)
    futures = [owner.threads.submit(owner.double, number) for number in range(10)]
    results = [future.result(10) for number, future in enumerate(futures) if number != 7]
    assert results == [0, 2, 4, 6, 8, 10, 12, 16, 18]
    with pytest.raises(ValueError, match="seven"):
        futures[7].result(10)
    assert sum(thread.name == name for thread in threading.enumerate()) == 3
    del owner, futures
    gc.collect()
    deadline = time.monotonic() + 10
    while any(thread.name == name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
