"""Describe the nodes of a cluster file, and check that a configuration fits on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from raydetr.config import RunConfig
from raydetr.locations import is_remote, sqlite_file

SQLITE_REASON = (
    "SQLite's file must be on the disk of one machine, not on a file system that several mount, where its locks do "
    "not hold: start a tracking server on the head (docs/clusters.md), and set tracking.uri=http://HEAD_IP:5000"
)


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind; `cpus` and `gpus` are what Ray schedules on each."""

    name: str
    cpus: int
    gpus: int
    max_nodes: int

    def __str__(self) -> str:
        gpus = f" and {self.gpus} GPU{'s' * (self.gpus != 1)}" if self.gpus else ""
        return f"{self.name}: up to {self.max_nodes}, {self.cpus} CPU{'s' * (self.cpus != 1)}{gpus} each"


@dataclass(frozen=True)
class Nodes:
    """The nodes that a cluster can have."""

    head: NodeType
    workers: tuple[NodeType, ...]
    max_workers: int  # nodes of all types together, without the head
    mounts: tuple[str, ...] | None  # folders on shared storage, on all nodes; None: it cannot be told

    def capacity(self, cpus: int, gpus: int) -> int:
        """Return how many workers with so many CPUs and GPUs each the nodes can hold."""
        left = self.max_workers
        total = _fitting(self.head, cpus, gpus)
        for node_type in sorted(self.workers, key=lambda each: -_fitting(each, cpus, gpus)):
            count = min(left, node_type.max_nodes)
            total += count * _fitting(node_type, cpus, gpus)
            left -= count
        return total

    def __str__(self) -> str:
        return "; ".join(str(each) for each in self.workers) or "only a head"


def problems_of(config: RunConfig, nodes: Nodes) -> list[str]:
    """Return what keeps a run of this configuration from training on the nodes, a line each."""
    cluster = config.cluster
    found = []
    capacity = nodes.capacity(cluster.cpus_per_worker, int(cluster.use_gpu))
    if capacity < cluster.num_workers:
        each = f"cluster.cpus_per_worker={cluster.cpus_per_worker}" + " and 1 GPU" * cluster.use_gpu
        found.append(
            f"cluster.num_workers: {cluster.num_workers} workers with {each} each, and the nodes hold {capacity} "
            f"({nodes}): lower them, or allow more or larger nodes"
        )
    is_here = not is_remote(config.storage.path)
    if nodes.mounts is not None and is_here and not _is_below(config.storage.path, nodes.mounts):
        found.append(
            f"storage.path: {config.storage.path} is on no folder that all nodes mount"
            + (f": set storage.path={nodes.mounts[0]}/runs" if nodes.mounts else ": mount one")
        )
    uri = config.tracking.uri
    several = min(nodes.max_workers, sum(each.max_nodes for each in nodes.workers)) > 0
    if several and (uri is None or sqlite_file(uri)):
        shown = "unset, which is SQLite in storage.path" if uri is None else uri
        found.append(f"tracking.uri: {shown}, and the cluster has several nodes. {SQLITE_REASON}")
    return found


def notices_of(config: RunConfig, nodes: Nodes) -> list[str]:
    """Return the files that workers read and that are on no folder which all nodes mount, a line each."""
    values = {
        "data.train": config.data.train,
        "data.val": config.data.val,
        "init.checkpoint": config.init.checkpoint,
        "model.backbone.weights": config.model.backbone.weights,
    }
    return [
        f"{name}: {value} is on no folder that all nodes mount: each node needs it at this place"
        for name, value in values.items()
        if nodes.mounts is not None
        and value is not None
        and not is_remote(str(value))
        and not _is_below(str(value), nodes.mounts)
    ]


def _fitting(node: NodeType, cpus: int, gpus: int) -> int:
    return min(node.cpus // cpus, node.gpus // gpus) if gpus else node.cpus // cpus


def _is_below(path: str, folders: Sequence[str]) -> bool:
    return any(PurePosixPath(path).is_relative_to(folder) for folder in folders)
