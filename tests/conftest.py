"""Settings of the whole test suite."""

from __future__ import annotations

import os

# torch starts a thread per core in each process. With several test processes that is many more threads than cores, and
# tests take twice as long. Set before torch is imported; processes that tests start inherit it.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads))
