"""A Ray cluster that all tests of runs share: starting one takes longer than most of what they do on it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from ray_head import NICENESS, free_ports
from raydetr.runs import ray_train


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes with two each; this process is connected to it."""
    for name, value in (ray_train.SETTINGS | NICENESS).items():
        os.environ.setdefault(name, value)
    nodes = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": free_ports(1)[0],
        },
    )
    for _ in range(2):
        nodes.add_node(num_cpus=2)
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()
