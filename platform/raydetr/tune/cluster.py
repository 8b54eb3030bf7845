"""Check the cluster of a search: how many trials fit at once, and which resources they leak."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.experimental import internal_kv
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state import list_actors, list_placement_groups
from ray.util.state.exception import RayStateApiException

from raydetr.config import ClusterConfig
from raydetr.runs.ray_cluster import LaunchError

CLEANUP_TIMEOUT_SECONDS = 20.0  # for Ray's own cleanup after a search, which polls once per second
# Ray's own actors: one for all jobs of a cluster, which holds no resources and lives as long as the cluster
RAY_SERVICES = ("_AutoscalingCoordinatorActor",)
LIVING = ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "ALIVE", "RESTARTING")  # states of an actor
WAITING_PREFIX = "raydetr-search-waits:"
WAITING_SECONDS = 30.0  # without a sign, after which a search that waited counts as dead
STATE_LIMIT = 10_000  # largest number of actors and placement groups in an answer of the state API


@dataclass(frozen=True)
class LeakedResource:
    """An actor or a placement group that a job has created and that still exists."""

    kind: str  # "actor" or "placement group"
    id: str
    description: str  # class of the actor, or size of the placement group

    def __str__(self) -> str:
        return f"{self.kind} {self.id} ({self.description})"


def check_dashboard() -> None:
    """Check that the cluster has a dashboard. Without it, every stopped trial would keep its CPUs and GPUs.

    Ray Train learns from the dashboard that the controller of a stopped trial has exited, and only then releases the
    resources of its workers.

    Raises:
        LaunchError: the dashboard does not answer.
    """
    try:
        list_actors(_address(), limit=1, raise_on_missing_output=False)
    except (RayStateApiException, ConnectionError, OSError) as error:
        raise LaunchError(
            "the cluster's dashboard does not answer, and without it trials that are stopped early would "
            "never release their workers: install ray[default] and start the head with --include-dashboard=true "
            f"({str(error).strip().splitlines()[0]})"
        ) from error


def limit_concurrency(cluster: ClusterConfig, max_concurrent: int) -> int:
    """Return `max_concurrent`, or the number of trials that fit on the cluster at once if that is smaller.

    Raises:
        LaunchError: the workers of a single trial do not fit, and the cluster does not autoscale.
    """
    if _autoscales():
        return max_concurrent
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    num_trials = count_fitting_trials(nodes, cluster)
    if num_trials == 0:
        have = ", ".join(f"{node.get('CPU', 0):.0f} CPUs and {node.get('GPU', 0):.0f} GPUs" for node in nodes)
        raise LaunchError(
            f"not even one trial fits: its {cluster.num_workers} workers (cluster.num_workers) need "
            f"{cluster.cpus_per_worker} CPUs{' and a GPU' if cluster.use_gpu else ''} each, and the nodes of "
            f"the cluster have {have}: lower cluster.num_workers or cluster.cpus_per_worker, or use a "
            "larger cluster"
        )
    return min(max_concurrent, num_trials)


def count_fitting_trials(nodes: list[Mapping[str, float]], cluster: ClusterConfig) -> int:
    """Return the number of trials that fit on idle nodes with these resources.

    A worker needs all its CPUs and its GPU on one node; the workers of a trial can be on different nodes.
    """
    workers = 0
    for node in nodes:
        by_cpu = int(node.get("CPU", 0) // cluster.cpus_per_worker)
        workers += min(by_cpu, int(node.get("GPU", 0))) if cluster.use_gpu else by_cpu
    return workers // cluster.num_workers


def list_leaked_resources(job_id: str) -> list[LeakedResource]:
    """Return the actors and placement groups of a job that still exist, without Ray's own services.

    Raises:
        RayStateApiException, ConnectionError: the dashboard does not answer.
    """
    # Ray applies "!=" after its limit, which the dead actors of a long search reach
    actors = [
        actor
        for state in LIVING
        for actor in list_actors(
            _address(),
            filters=[("job_id", "=", job_id), ("state", "=", state)],
            limit=STATE_LIMIT,
            detail=True,
        )
    ]
    groups = list_placement_groups(
        _address(),
        filters=[("creator_job_id", "=", job_id), ("state", "!=", "REMOVED")],
        limit=STATE_LIMIT,
        detail=True,
    )
    return [
        *(
            LeakedResource("actor", actor.actor_id, actor.class_name)
            for actor in actors
            if actor.class_name not in RAY_SERVICES
        ),
        *(
            LeakedResource("placement group", group.placement_group_id, f"{len(group.bundles or [])} bundles")
            for group in groups
        ),
    ]


def release_leaked_resources(job_id: str, before: list[LeakedResource]) -> list[LeakedResource]:
    """Wait until all resources that the job has created since `before` have ended; return those that have leaked.

    Leaked placement groups are removed, so that they hold no CPUs and GPUs.

    Raises:
        RayStateApiException, ConnectionError: the dashboard does not answer.
    """
    deadline = time.monotonic() + CLEANUP_TIMEOUT_SECONDS
    while leaked := [resource for resource in list_leaked_resources(job_id) if resource not in before]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    for resource in leaked:
        if resource.kind == "placement group":
            remove_group(resource.id)
    return leaked


class Turns:
    """Lets searches on one cluster take turns: none begins a trial while one of another search waits for workers.

    A search with small trials would take every worker that becomes free, and one with large trials would wait for ever.
    The cluster's key-value store has the time at which each search that waits was seen last.
    """

    def __init__(self, name: str) -> None:
        self._key = f"{WAITING_PREFIX}{name}".encode()
        self._is_waiting = False
        self.must_wait = False  # for another search

    def update(self, is_waiting: bool) -> None:
        """Tell whether a trial of this search waits for workers, and look whether one of another search does."""
        if is_waiting:
            internal_kv._internal_kv_put(self._key, str(time.time()).encode(), overwrite=True)
        elif self._is_waiting:
            internal_kv._internal_kv_del(self._key)
        self._is_waiting = is_waiting
        others = [key for key in internal_kv._internal_kv_list(WAITING_PREFIX) if key != self._key]
        seen = [internal_kv._internal_kv_get(key) for key in others]
        self.must_wait = any(
            each is not None and time.time() - float(each) < WAITING_SECONDS for each in seen
        )

    def close(self) -> None:
        """Tell that no trial of this search waits any more."""
        self.update(is_waiting=False)


def remove_group(group_id: str) -> None:
    """Remove a placement group, if it still exists; Ray kills the workers in it."""
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))


def _address() -> str:
    """Return the address of the connected cluster: the state API cannot choose on a machine with two clusters."""
    return str(ray.get_runtime_context().gcs_address)


def _autoscales() -> bool:
    """Return True if nodes start on demand: on Kubernetes, or on a head that `ray up` has started."""
    on_head = (Path.home() / "ray_bootstrap_config.yaml").exists()
    return on_head or "KUBERNETES_SERVICE_HOST" in os.environ
