"""Start a Ray cluster of several nodes on this machine, and connect this process to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.cluster_utils import Cluster

from ray_head import NICENESS, free_ports
from raydetr.runs.ray_cluster import SETTINGS


@contextmanager
def ray_nodes(num_nodes: int, cpus: int) -> Iterator[Cluster]:
    """Start a head without CPUs, and nodes, which `workers` of the cluster lists."""
    for name, value in (SETTINGS | NICENESS).items():
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
    nodes.workers = [nodes.add_node(num_cpus=cpus) for _ in range(num_nodes)]
    ray.init(address=nodes.address, log_to_driver=False)
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()
