"""The cluster under a search: how many trials it holds at once, and what they must not leave on it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state import list_actors, list_placement_groups
from ray.util.state.exception import RayStateApiException

from raydetr.config import ClusterConfig
from raydetr.runs.ray_train import LaunchError

PATIENCE_SECONDS = 20.0  # for what ends by itself after a search; Ray's own cleaners look once a second
# Ray's own, one for all jobs of a cluster; it holds no resources and stays as long as the cluster
RAY_SERVICES = ("_AutoscalingCoordinatorActor",)
STATE_LIMIT = 10_000  # actors and placement groups that the cluster is asked for


@dataclass(frozen=True)
class LeakedResource:
    """Something on the cluster that a search's job has made and that is not gone."""

    kind: str  # "actor" or "placement group"
    id: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind} {self.id} ({self.what})"


def check_dashboard() -> None:
    """Refuse a cluster on which every stopped trial would keep its CPUs and GPUs.

    Ray Train finds out through the dashboard that a stopped trial's controller is gone, and only then frees
    what its workers had.

    Raises:
        LaunchError: the dashboard does not answer.
    """
    try:
        list_actors(_address(), limit=1, raise_on_missing_output=False)
    except (RayStateApiException, ConnectionError, OSError) as error:
        raise LaunchError(
            "the cluster's dashboard does not answer, and without it trials that are stopped early would "
            "never free their workers: install ray[default] and start the head with --include-dashboard=true "
            f"({str(error).strip().splitlines()[0]})"
        ) from error


def concurrent_trials(cluster: ClusterConfig, wanted: int) -> int:
    """How many trials may run at once: those that are wanted, at most those that fit.

    Raises:
        LaunchError: the cluster does not hold the workers of a single trial, and does not grow.
    """
    if _grows():
        return wanted
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    fitting = num_fitting(nodes, cluster)
    if fitting == 0:
        have = ", ".join(f"{node.get('CPU', 0):.0f} CPUs and {node.get('GPU', 0):.0f} GPUs" for node in nodes)
        raise LaunchError(
            f"not even one trial fits: its {cluster.num_workers} workers (cluster.num_workers) need "
            f"{cluster.cpus_per_worker} CPUs{' and a GPU' if cluster.use_gpu else ''} each, and the nodes of "
            f"the cluster have {have}: lower cluster.num_workers or cluster.cpus_per_worker, or use a "
            "larger cluster"
        )
    return min(wanted, fitting)


def num_fitting(nodes: list[Mapping[str, float]], cluster: ClusterConfig) -> int:
    """How many trials nodes with these resources hold, when nothing else runs there."""
    workers = 0
    for node in nodes:
        by_cpu = int(node.get("CPU", 0) // cluster.cpus_per_worker)
        workers += min(by_cpu, int(node.get("GPU", 0))) if cluster.use_gpu else by_cpu
    return workers // cluster.num_workers


def list_leaked_resources(job_id: str) -> list[LeakedResource]:
    """The living actors and the placement groups that a job has made."""
    actors = list_actors(
        _address(), filters=[("job_id", "=", job_id), ("state", "!=", "DEAD")], limit=STATE_LIMIT, detail=True
    )
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


def clear(job_id: str, before: list[LeakedResource]) -> list[LeakedResource]:
    """Wait until what the job has made since `before` is gone.

    What stays is returned; its placement groups are removed, so that it holds no CPUs and GPUs.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while left := [resource for resource in list_leaked_resources(job_id) if resource not in before]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    for resource in left:
        if resource.kind == "placement group":
            remove_group(resource.id)
    return left


def remove_group(group_id: str) -> None:
    """Free what a placement group holds; Ray ends the workers that run in it. One that is gone does no harm."""
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))


def _address() -> str:
    """Of the cluster we are connected to: on its own, the state API is at a loss where a machine has two."""
    return str(ray.get_runtime_context().gcs_address)


def _grows() -> bool:
    """Whether nodes come on demand: on Kubernetes, or where `ray up` has made the head."""
    on_head = (Path.home() / "ray_bootstrap_config.yaml").exists()
    return on_head or "KUBERNETES_SERVICE_HOST" in os.environ
