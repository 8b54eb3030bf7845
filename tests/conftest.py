"""Settings of the whole test suite."""

from __future__ import annotations

import os

import pytest

# torch starts a thread per core in each process. With several test processes that is many more threads than cores, and
# tests take twice as long. Set before torch is imported; processes that tests start inherit it.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads))


@pytest.hookimpl(optionalhook=True)  # there are runs without pytest-xdist
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run one process more than there are cores: those with tests on a Ray cluster wait for it most of the time."""
    return (os.cpu_count() or 1) + 1
