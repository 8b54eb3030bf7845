"""Connect to a Ray cluster, and wait until its nodes can hold the workers of a run."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray._private.state
from ray.autoscaler.sdk import request_resources

from raydetr.clusters.nodes import SQLITE_REASON
from raydetr.config import ClusterConfig, ConfigError
from raydetr.console import print_status
from raydetr.locations import in_ray_job, sqlite_file
from raydetr.runs.ray_address import check_address
from raydetr.runs.signals import StopSignals
from raydetr.tracking.events import EventLog

POLL_SECONDS = 0.5  # between two looks at what changes
WAITING_SECONDS = 30.0  # between two lines about what a run waits for
NOTICE_SECONDS = 20.0  # until Ray notices that a node is gone
CONNECT_SECONDS = 1.0  # for the connection to a node

# Ray reads these when it starts its processes. A value that the user has set is kept.
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",  # with a token in the home folder, other clusters would refuse the connection
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for this poll; 2 s by default
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # for workers that hang in a collective; 30 s by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints would appear twice
    "RAY_raylet_start_wait_time_s": "120",  # 30 s are too few on a busy machine
    "RAY_health_check_period_ms": "1000",  # a lost node is noticed after 6 s; 3000 by default, 14 s
}


class LaunchError(RuntimeError):
    """A run failed on the cluster, or could not start there; the message has the reason.

    With `is_fatal`, the same would happen again: in the data or the settings is an error. With `is_waiting`, nothing
    has failed: the cluster had no room for the workers in time.
    """

    def __init__(self, message: str, *, is_fatal: bool = False, is_waiting: bool = False) -> None:
        super().__init__(message)
        self.is_fatal, self.is_waiting = is_fatal, is_waiting


@contextmanager
def connected(cluster: ClusterConfig) -> Iterator[str]:
    """Connect to a Ray cluster; yield its address, or "existing" if this process is already connected.

    The cluster is that of `cluster.address`, that of the job that this process belongs to, or a new local one.

    Raises:
        ConfigError: the address is not one of a cluster for training, or TMPDIR is too long for a new one.
        ConnectionError: no cluster answers at the address.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():  # by a search, or by the caller
        yield "existing"
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    if not in_ray_job():  # a job is on its cluster
        check_address(address)
    ray.init(
        address=address,
        include_dashboard=True,  # on loopback; without it, stopped trials leak their resources
        log_to_driver=False,
        runtime_env=_runtime_env(),
        logging_level=logging.WARNING,
    )
    try:
        yield address
    finally:
        ray.shutdown()


def has_cluster(cluster: ClusterConfig) -> bool:
    """Return whether `connected` connects to a cluster that is there, instead of starting one on this machine."""
    return ray.is_initialized() or cluster.address is not None or "RAY_ADDRESS" in os.environ


def check_resources(cluster: ClusterConfig, address: str) -> None:
    """Check that the workers fit on a local cluster. It does not autoscale: Ray would wait for resources forever.

    Raises:
        LaunchError: the workers need more CPUs or GPUs than the machine has.
    """
    if address != "local":
        return
    have = _resources()
    for name, setting, need in (
        ("CPU", f"cpus_per_worker={cluster.cpus_per_worker}", cluster.num_workers * cluster.cpus_per_worker),
        ("GPU", f"use_gpu={cluster.use_gpu}", cluster.num_workers * cluster.use_gpu),
    ):
        if need > have.get(name, 0):
            raise LaunchError(
                f"cluster.num_workers={cluster.num_workers} with cluster.{setting} needs {need} {name}s, and this "
                f"machine has {have.get(name, 0):.0f}: lower them, or set cluster.address to a larger cluster"
            )


def check_tracking(uri: str | None, nodes: Iterable[Mapping[str, Any]] | None = None) -> None:
    """Check that the tracking is no SQLite database if the living nodes are on several machines.

    The driver alone writes it, but its default place is the storage that these machines share.

    Args:
        uri: `tracking.uri`; None stands for SQLite in `storage.path`.
        nodes: the nodes, as `ray.nodes()` describes them; default: those of the connected cluster.

    Raises:
        ConfigError: it is, and they are.
    """
    if uri is not None and sqlite_file(uri) is None:
        return
    if nodes is None:
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
    # Nodes on one machine have one address
    machines = {node["NodeManagerAddress"]: node["NodeManagerHostname"] for node in nodes if node["Alive"]}
    if len(machines) > 1:
        names = ", ".join(f"{name} ({address})" for address, name in sorted(machines.items())[:3])
        more = f" and {len(machines) - 3} more" if len(machines) > 3 else ""
        shown = "unset, which is SQLite in storage.path" if uri is None else uri
        raise ConfigError(
            f"tracking.uri is {shown}, and the cluster has several nodes: {names}{more}. {SQLITE_REASON}"
        )


def _resources() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


class Room:
    """Waits until the nodes of the cluster can hold the workers of a run.

    Args:
        cluster: the number of workers that are wanted, and their resources.
        log: of the run.
    """

    def __init__(self, cluster: ClusterConfig, log: EventLog) -> None:
        self._cluster, self._log = cluster, log
        self._since: float | None = None  # workers are missing
        self._told_at = -math.inf
        self._only_free = False

    def add_start_in_vain(self) -> None:
        """Take into account that the workers found no room: what the nodes have is in use, by others perhaps."""
        self._only_free = True

    def forget(self) -> None:
        """Take into account that the workers have started."""
        self._since, self._only_free = None, False

    def wait(self, stop: StopSignals) -> int:
        """Wait until there is room; return how many workers to start.

        After `cluster.wait_minutes` fewer than `cluster.num_workers` are enough, at least `cluster.min_workers`.
        """
        cluster, began = self._cluster, time.monotonic()
        self._since = began if self._since is None else self._since
        wanted, least = cluster.num_workers, cluster.min_workers or cluster.num_workers
        has_requested = False
        try:
            while not stop.is_set():
                now = time.monotonic()
                # The workers of a lost node fail before Ray knows that it is lost; a start would wait for that node
                if now - began < NOTICE_SECONDS and silent_nodes():
                    stop.sleep(POLL_SECONDS)
                    continue
                fitting = num_free(cluster) if self._only_free else num_fitting(cluster)
                if fitting >= wanted:
                    return wanted
                if fitting >= least and now - self._since > 60 * cluster.wait_minutes:
                    waited = f"{(now - self._since) / 60:.0f} minutes"
                    reason = f"{wanted} do not fit after {waited}"
                    self._log.append("layout", workers=fitting, reason=reason)
                    print_status(f"going on with {fitting} of {wanted} workers, until nodes join")
                    return fitting
                if now - self._told_at > WAITING_SECONDS:
                    self._told_at, has_requested = now, True
                    self._log.append("waiting", reason=missing_resources(cluster))
                    print_status(missing_resources(cluster))
                    request_resources(bundles=[_bundle(cluster)] * wanted)  # an autoscaler starts nodes
                stop.sleep(POLL_SECONDS)
        finally:
            if has_requested:
                request_resources(bundles=[])
        return wanted


def _bundle(cluster: ClusterConfig) -> dict[str, float]:
    return {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": 1.0} if cluster.use_gpu else {})


def num_fitting(cluster: ClusterConfig) -> int:
    """Return how many workers the nodes that live, and are not about to be taken away, can hold when they are free."""
    leaving = leaving_nodes()
    nodes = (node["Resources"] for node in _living_nodes() if node["NodeID"] not in leaving)
    return sum(_fit(cluster, resources) for resources in nodes)


def num_free(cluster: ClusterConfig) -> int:
    """Return how many workers fit beside what runs now on the nodes that are not about to be taken away."""
    free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    leaving, living = leaving_nodes(), {node["NodeID"] for node in _living_nodes()}
    return sum(_fit(cluster, free[node]) for node in living & free.keys() - leaving.keys())


def _fit(cluster: ClusterConfig, resources: dict[str, float]) -> int:
    bundle = _bundle(cluster)
    return min(int(resources.get(name, 0) // need) for name, need in bundle.items())


def leaving_nodes() -> dict[str, float | None]:
    """Return the ids of the nodes that are about to be taken away, and in how many seconds, if that is known."""
    deadlines: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return {node: at / 1000 - time.time() if at else None for node, at in deadlines.items()}


def silent_nodes() -> list[str]:
    """Return the addresses of nodes that Ray takes for alive, and that accept no connection."""
    addresses = [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in _living_nodes()]
    with ThreadPoolExecutor(max(len(addresses), 1)) as threads:
        answers = list(threads.map(_answers, addresses))
    return [f"{host}:{port}" for (host, port), answer in zip(addresses, answers, strict=True) if not answer]


def _answers(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, CONNECT_SECONDS):
            return True
    except OSError:
        return False


def _living_nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def missing_resources(cluster: ClusterConfig) -> str:
    """Describe which resources the run needs, and which the cluster has."""
    have = _resources()
    need = (
        f"{cluster.num_workers} workers with {cluster.cpus_per_worker} CPUs" + " and 1 GPU" * cluster.use_gpu
    )
    return (
        f"waiting for {need} each; the cluster has {have.get('CPU', 0):.0f} CPUs and {have.get('GPU', 0):.0f} "
        "GPUs in all (more if it autoscales); `ray status` shows which are free"
    )


def _runtime_env() -> dict[str, Any]:
    """Return a runtime environment with which workers import the packages from a job's working directory.

    What was uploaded takes the place of installed packages. Empty if this process is no job, if its working directory
    is no checkout, or if the job sets PYTHONPATH itself.
    """
    in_job = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
    if not in_job or "PYTHONPATH" in in_job or not Path("platform/raydetr").exists():
        return {}
    return {"env_vars": {"PYTHONPATH": "platform:models"}}
