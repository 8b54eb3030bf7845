"""Watch the workers of a run from the driver: progress, stalls, nodes that leave and that join."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from raydetr.config import ClusterConfig
from raydetr.console import RunProgress, print_status
from raydetr.runs.ray_cluster import (
    POLL_SECONDS,
    WAITING_SECONDS,
    LaunchError,
    leaving_nodes,
    missing_resources,
    num_free,
)
from raydetr.store.folders import Folder, remove_folder, with_retry_seconds
from raydetr.tracking.events import EventLog

STACKS = "stacks"  # folder of the run
ABORT_SECONDS = 1.0  # for stalled workers to write down where they are
LOOK_SECONDS = 10.0  # between two looks for nodes that have joined
MAX_ACTORS, STATE_SECONDS = 1000, 5  # of a look at Ray's state
DEATHS = {"WORKER_DIED": "was killed or crashed", "NODE_DIED": "was lost with its node"}  # reasons of Ray
FIRST_STEP_MINUTES = 10.0  # at least, for the first step: until then there is no progress to see


class Watch:
    """Watches the workers of one start.

    Args:
        cluster: of this start, with the number of its workers.
        log: of the run.
        stacks: folder in which stalled workers write where they are.
    """

    def __init__(self, cluster: ClusterConfig, log: EventLog, stacks: Folder) -> None:
        self._cluster, self._log, self._stacks = cluster, log, with_retry_seconds(stacks, ABORT_SECONDS)
        with suppress(OSError):  # those of an earlier start
            remove_folder(self._stacks)
        self._wait_until = time.monotonic() + WAITING_SECONDS
        self._look_until = time.monotonic() + LOOK_SECONDS
        self._latest: RunProgress | None = None
        self._moved_at: float | None = None  # None: no worker has started
        self._stalled: str | None = None
        self._kill_at = math.inf

    def look(self, progress: RunProgress | None, actor: Any) -> None:
        """Take the latest progress into account; end workers that make none for `cluster.stall_minutes`."""
        now = time.monotonic()
        if now > self._kill_at:
            self._kill_at = math.inf
            _kill(ray.get(actor.processes.remote()))
        if self._moved_at is None:
            if progress is None and not ray.get(actor.processes.remote()):
                self._wait_for_room(now)
                return
            self._moved_at = now
        if progress != self._latest:
            self._latest, self._moved_at = progress, now
            return
        minutes = self._cluster.stall_minutes
        limit = max(minutes, FIRST_STEP_MINUTES) if progress is None else minutes
        if self._stalled is None and now - self._moved_at > 60 * limit:
            at = "before the first step" if progress is None else f"at step {progress.step}"
            self._stalled = f"no progress for {limit:g} minutes (cluster.stall_minutes), {at}"
            self._log.append("stalled", reason=self._stalled)
            print_status(f"{self._stalled}: the stacks of all workers go to {STACKS} in the run's folder")
            actor.request_abort.remote()
            self._kill_at = now + ABORT_SECONDS + 2 * POLL_SECONDS

    def _wait_for_room(self, now: float) -> None:
        if now > self._wait_until:
            self._wait_until += WAITING_SECONDS
            print_status(missing_resources(self._cluster))

    def is_leaving(self, actor: Any) -> bool:
        """Return whether a node that workers run on is about to be taken away (preempted, or drained)."""
        leaving = leaving_nodes()
        if not leaving:
            return False
        nodes = {node for node, _ in ray.get(actor.processes.remote())}
        found = {node: seconds for node, seconds in leaving.items() if node in nodes}
        for node, seconds in found.items():
            when = "soon" if seconds is None else f"in {seconds:.0f} s"
            reason = f"node {node[:12]} will be taken away {when}"
            self._log.append("preempted", reason=reason)
            print_status(f"{reason}: a checkpoint after this step, and on with other nodes")
        return bool(found)

    def can_grow(self, num_workers: int, wanted: int) -> bool:
        """Return whether the cluster has room for the workers that are missing, beside those that run."""
        now = time.monotonic()
        if num_workers >= wanted or now < self._look_until:
            return False
        self._look_until = now + LOOK_SECONDS
        if num_workers + num_free(self._cluster) < wanted:
            return False
        self._log.append("layout", workers=wanted, reason="nodes have joined")
        print_status(f"nodes have joined: going on with {wanted} workers after this step")
        return True

    def explain(self, error: BaseException, actor: Any) -> BaseException:
        """Return the error of the workers and which of them died, or why they were ended; log their stacks."""
        if self._stalled is None:
            if not isinstance(error, LaunchError) or error.is_fatal or error.is_waiting:
                return error
            # The error is often that of a worker that waited for the one that died
            deaths = _describe_deaths(actor)
            return LaunchError("; ".join([str(error), *deaths])) if deaths else error
        with suppress(OSError):  # the storage may be the reason of the stall
            files: list[Folder] = sorted(self._stacks.glob("*.txt"))
            for file in files:
                self._log.append("stack", worker=file.stem, stack=file.read_text())
        return LaunchError(self._stalled)


def _describe_deaths(run_actor: Any) -> list[str]:
    """Return a phrase for each worker that died, unless Ray Train has ended it; none if Ray's state cannot be read."""
    try:
        ranks = ray.get(run_actor.processes.remote())
        actors = list_actors(
            filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "DEAD")],
            detail=True,
            limit=MAX_ACTORS,
            timeout=STATE_SECONDS,
        )
    except (
        RayStateApiException,
        ray.exceptions.RayError,
    ):  # no dashboard, a busy one, or the actor died as well
        return []
    phrases = {}
    for actor in actors:
        rank = ranks.get((actor.node_id or "", actor.pid or 0))
        context = (actor.death_cause or {}).get("actor_died_error_context", {})
        if rank is not None and context.get("reason") in DEATHS:
            where = f"process {actor.pid} on node {context.get('node_ip_address')}"
            phrases[rank] = f"worker {rank} ({where}) {DEATHS[context['reason']]}"
    return [phrases[rank] for rank in sorted(phrases)]


def _kill(processes: Iterable[tuple[str, int]]) -> None:
    """Kill workers that could not end themselves, such as stopped ones; Ray would ask them first, for 5 s each time."""
    for node, pid in processes:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": there, "max_retries": 0}
        ray.remote(**options)(_kill_here).remote(pid)  # not waited for: most have ended


def _kill_here(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
