"""A worker that Ray kills because its node runs out of memory; the limit is put 2 GB above what is used now."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from ray_head import ray_head
from raydetr.runs.ray_train import OUT_OF_MEMORY

ROOM = 2_000_000_000  # bytes
CODE = """
import time
from raydetr.config import ClusterConfig
from raydetr.runs.ray_cluster import LaunchError
from raydetr.runs.ray_train import run_on_workers

def work(world):
    held = []
    for _ in range(80):
        held.append(bytearray(b"x" * 100_000_000))
        time.sleep(0.05)

try:
    run_on_workers(work, ClusterConfig(address={address!r}))
except LaunchError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.xdist_group("ray_head")
@pytest.mark.timeout(300)
def test_a_worker_that_is_killed_for_memory_is_told_so() -> None:
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + ROOM) / memory.total
    limits = {"RAY_memory_usage_threshold": f"{threshold:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    with ray_head(num_cpus=1, variables=limits) as head:
        done = subprocess.run(
            [sys.executable, "-c", CODE.format(address=head.address)],
            env=head.environment(), capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
    assert done.stdout.strip() == f"the workers failed: {OUT_OF_MEMORY}", done.stderr
