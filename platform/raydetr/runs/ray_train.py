"""Run workers on Ray Train: find or start a cluster, start the workers, show their progress."""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.autoscaler.sdk import request_resources
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydetr.config import ClusterConfig
from raydetr.console import Display, RunActor, RunProgress, print_status
from raydetr.runs.fatal_errors import FatalError, StopAtFatalErrors
from raydetr.runs.session import Run, run_session
from raydetr.runs.signals import StopSignals
from raydetr.tracking.events import EventLog
from raydetr.training import checkpoint
from raydetr.training.world import World

POLL_SECONDS = 0.5  # between two readings of the progress
WAITING_SECONDS = 30.0  # between two lines about what the run waits for
SETTLE_SECONDS = 3.0  # after a failure, before the nodes are counted
RESTART_SECONDS = "20"  # for the start of workers after a failure
LOOK_SECONDS = 10.0  # between two looks for nodes that have joined
RAY_FILES = ".ray"  # folder of the run, for Ray Train's own files
STACKS = "stacks"  # folder of the run

# Ray reads these when it starts its processes. A value that the user has set is kept.
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",  # with a token in the home folder, other clusters would refuse the connection
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for this poll; 2 s by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints would appear twice
    "RAY_raylet_start_wait_time_s": "120",  # 30 s are too few on a busy machine
}


class LaunchError(RuntimeError):
    """A run failed on the cluster, or could not start there; the message has the reason.

    With `is_fatal`, the same would happen again: in the data or the settings is an error. With `is_waiting`, nothing
    has failed: the cluster had no room for the workers in time.
    """

    def __init__(self, message: str, *, is_fatal: bool = False, is_waiting: bool = False) -> None:
        super().__init__(message)
        self.is_fatal, self.is_waiting = is_fatal, is_waiting


# --- In the driver ---


def train_on_ray(run: Run, callbacks: Sequence[Any], stop: StopSignals, log: EventLog) -> None:
    """Train on Ray Train workers, to the end or until `stop`; start the workers again when some of them fail.

    Every start continues from the newest valid checkpoint of the run. While nodes are missing for longer than
    `cluster.wait_minutes`, it goes on with fewer workers, at least `cluster.min_workers`.

    Raises:
        LaunchError: the workers do not fit on the cluster, or failed for good: at a fatal error, or at more than
            `cluster.max_failures` failures without progress between them.
        ConnectionError: no cluster answers at `cluster.address`.
    """
    cluster = run.config.cluster
    with connected(cluster) as address, Display() as display:
        stop.install()  # Ray has replaced the handlers
        check_resources(cluster, address)
        failures = Failures(cluster.max_failures, log)
        num_workers = cluster.num_workers
        while not stop.is_set():
            last = checkpoint.newest_valid(run.folder, lambda message: print_status(f"skipped: {message}"))
            resumed = dataclasses.replace(run, resume_from=last or run.resume_from)
            start = Start(resumed, num_workers, failures.number)
            try:
                if start.fit(callbacks, display, stop, log):
                    return
            except LaunchError as error:
                if stop.is_set():
                    return
                if not error.is_waiting:
                    last = checkpoint.newest_valid(run.folder, lambda message: None)
                    failures.add(error, max(start.position, checkpoint.position_of(last)))
            # Ray notices a lost node late, and a start before that waits for its workers in vain: not for Ray's 60 s,
            # which a first start may need to install packages
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", RESTART_SECONDS)
            num_workers = wait_for_nodes(cluster, address, stop, log)


class Failures:
    """Counts failures since the last progress, and decides whether the workers are started again."""

    def __init__(self, limit: int, log: EventLog) -> None:
        self._limit, self._log = limit, log
        self._since_progress: list[str] = []
        self._position = -1
        self.number = 0  # of all failures

    def add(self, error: LaunchError, position: int) -> None:
        """Log a failure of the workers, which had reached a position.

        Raises:
            LaunchError: the workers are not started again.
        """
        if position > self._position:
            self._since_progress = []
        self._position = max(position, self._position)
        self._since_progress.append(str(error))
        self.number += 1
        if error.is_fatal:
            raise error
        count = len(self._since_progress)
        if 0 <= self._limit < count:
            listed = "".join(f"\n  {number}. {line}" for number, line in enumerate(self._since_progress, 1))
            raise LaunchError(
                f"the workers failed {count} times without progress in between (cluster.max_failures="
                f"{self._limit}):{listed}"
            )
        self._log.append("restart", reason=str(error), failures_since_progress=count, position=position)
        most = f" of {self._limit}" if self._limit >= 0 else ""
        print_status(f"{error}; starting them again ({count}{most} without progress)")


class Start:
    """One start of the workers of a run; they may be fewer than `cluster.num_workers`."""

    def __init__(self, run: Run, num_workers: int, number: int) -> None:
        self._run, self._number = run, number
        self._cluster = run.config.cluster.model_copy(update={"num_workers": num_workers})
        self.position = -1  # reached, as far as the driver knows

    def fit(self, callbacks: Sequence[Any], display: Display, stop: StopSignals, log: EventLog) -> bool:
        """Train; return False if the workers have stopped to be started again in full number.

        Raises:
            LaunchError: the workers failed.
        """
        wanted = self._run.config.cluster.num_workers
        actor = _new_run_actor()
        scratch = self._run.folder / RAY_FILES
        work = partial(_train, self._run, actor)
        trainer = build_trainer(work, self._cluster, f"start-{self._number:03d}", scratch, callbacks)
        failed: list[BaseException] = []

        def fit_trainer() -> None:
            try:
                fit(trainer)
            except BaseException as error:  # raised again by the caller
                failed.append(error)

        # In a thread, where Ray Train does not replace the handlers of signals
        thread = threading.Thread(target=fit_trainer, name="ray-train", daemon=True)
        thread.start()
        watch = Watch(self._cluster, log)
        grows = False
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            progress = ray.get(actor.read.remote())
            self._show(progress, display)
            watch.look(progress, actor)
            grows = grows or (progress is not None and watch.can_grow(self._cluster.num_workers, wanted))
            if stop.is_set() or grows:
                actor.request_stop.remote()
        self._show(ray.get(actor.read.remote()), display)  # with a warning of the last moment
        shutil.rmtree(scratch, ignore_errors=True)
        if failed:
            raise watch.explain(failed[0], self._run.folder / STACKS)
        return not grows or stop.is_set() or self._is_complete()

    def _show(self, progress: RunProgress | None, display: Display) -> None:
        if progress is not None:
            self.position = max(self.position, progress.step * self._run.config.data.batch_size)
            display.show(progress)

    def _is_complete(self) -> bool:
        last = checkpoint.newest_valid(self._run.folder, lambda message: None)
        return last is not None and checkpoint.is_complete(last, self._run.config)


class Watch:
    """Watches the workers of one start from the driver: for progress, and for nodes that join."""

    def __init__(self, cluster: ClusterConfig, log: EventLog) -> None:
        self._cluster, self._log = cluster, log
        self._wait_until = time.monotonic() + WAITING_SECONDS
        self._look_until = time.monotonic() + LOOK_SECONDS
        self._latest: RunProgress | None = None
        self._moved_at: float | None = None
        self._stalled: str | None = None

    def look(self, progress: RunProgress | None, actor: Any) -> None:
        """Take the latest progress into account; end workers that make none for `cluster.stall_minutes`."""
        now = time.monotonic()
        if progress is None:
            if now > self._wait_until:
                self._wait_until += WAITING_SECONDS
                print_status(_waiting(self._cluster))
            return
        if progress != self._latest:
            self._latest, self._moved_at = progress, now
            return
        minutes = self._cluster.stall_minutes
        if self._stalled is None and self._moved_at is not None and now - self._moved_at > 60 * minutes:
            self._stalled = (
                f"no progress for {minutes:g} minutes (cluster.stall_minutes), at step {progress.step}"
            )
            self._log.append("stalled", reason=self._stalled)
            print_status(f"{self._stalled}: the stacks of all workers go to {STACKS} in the run's folder")
            actor.request_abort.remote()

    def can_grow(self, num_workers: int, wanted: int) -> bool:
        """Return whether the nodes of the cluster can hold the wanted number of workers, which are fewer now."""
        now = time.monotonic()
        if num_workers >= wanted or now < self._look_until:
            return False
        self._look_until = now + LOOK_SECONDS
        if _num_fitting(self._cluster) < wanted:
            return False
        self._log.append("layout", workers=wanted, reason="nodes have joined")
        print_status(f"nodes have joined: going on with {wanted} workers after this step")
        return True

    def explain(self, error: BaseException, stacks: Path) -> BaseException:
        """Return the error of the workers, or why they were ended; log the stacks that they left."""
        if self._stalled is None:
            return error
        for file in sorted(stacks.glob("*.txt")):
            self._log.append("stack", worker=file.stem, stack=file.read_text())
        return LaunchError(self._stalled)


def wait_for_nodes(cluster: ClusterConfig, address: str, stop: StopSignals, log: EventLog) -> int:
    """Wait until the nodes of the cluster can hold the workers; return how many to start.

    After `cluster.wait_minutes` fewer than `cluster.num_workers` are enough, at least `cluster.min_workers`.
    """
    # The workers of a lost node fail before the cluster knows that the node is lost
    time.sleep(SETTLE_SECONDS)
    began, told_at = time.monotonic(), -math.inf
    wanted, least = cluster.num_workers, cluster.min_workers or cluster.num_workers
    bundle = {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": 1.0} if cluster.use_gpu else {})
    try:
        while not stop.is_set():
            fitting, waited = _num_fitting(cluster), time.monotonic() - began
            if fitting >= wanted:
                return wanted
            if fitting >= least and waited > 60 * cluster.wait_minutes:
                log.append(
                    "layout", workers=fitting, reason=f"{wanted} do not fit after {waited / 60:.0f} minutes"
                )
                print_status(f"going on with {fitting} of {wanted} workers, until nodes join")
                return fitting
            if time.monotonic() - told_at > WAITING_SECONDS:
                told_at = time.monotonic()
                log.append("waiting", reason=_waiting(cluster))
                print_status(_waiting(cluster))
                request_resources(bundles=[bundle] * wanted)  # an autoscaler starts nodes
            time.sleep(POLL_SECONDS)
    finally:
        if told_at > -math.inf:
            request_resources(bundles=[])
    return wanted


def _num_fitting(cluster: ClusterConfig) -> int:
    """Return how many workers the nodes that live can hold, when they are free."""
    alive: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in alive if node["Alive"]]
    by_cpu = (int(node.get("CPU", 0)) // cluster.cpus_per_worker for node in nodes)
    by_gpu = (int(node.get("GPU", 0)) for node in nodes)
    return sum(min(pair) if cluster.use_gpu else pair[0] for pair in zip(by_cpu, by_gpu, strict=True))


def run_on_workers(work: Callable[[World], Any], cluster: ClusterConfig, scratch: Path) -> Any:
    """Call `work` on every Ray Train worker; return its result on rank 0.

    Args:
        work: a picklable function.
        cluster: the number of workers and their resources.
        scratch: a folder on storage that all nodes mount, for Ray's own files.

    Raises:
        LaunchError: the workers do not fit on the cluster, or one of them failed.
        ConnectionError: no cluster answers at `cluster.address`.
    """
    with connected(cluster) as address:
        check_resources(cluster, address)
        result = _new_run_actor()
        run_config = ray.train.RunConfig(name=scratch.name, storage_path=str(scratch.parent))
        fit(_trainer(partial(_work, work, result, cluster.cpus_per_worker), cluster, run_config))
        return ray.get(result.read.remote())


def build_trainer(
    work: Callable[[], None], cluster: ClusterConfig, name: str, scratch: Path, callbacks: Sequence[Any] = ()
) -> TorchTrainer:
    """Return the Ray Train trainer of one start of a run.

    Ray Train itself starts no workers again: it counts failures over the whole run, says nothing about them, and knows
    nothing of the run's checkpoints.
    """
    all_callbacks: list[Any] = [*callbacks, StopAtFatalErrors()]
    no_retries: dict[str, Any] = {"max_failures": 0, "controller_failure_limit": 0}
    run_config = ray.train.RunConfig(
        name=name,
        storage_path=str(scratch),
        failure_config=ray.train.FailureConfig(**no_retries),
        callbacks=all_callbacks,
    )
    return _trainer(work, cluster, run_config)


def fit(trainer: TorchTrainer) -> ray.train.Result:
    """Train to the end.

    Raises:
        LaunchError: the workers failed for good; the message is that of the worker with the lowest rank.
    """
    try:
        result = trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
        cause = getattr(error, "controller_failure", None)
        raise LaunchError(
            f"the workers failed: {_root_cause(error)}",
            is_fatal=isinstance(cause, FatalError),
            is_waiting=isinstance(cause, WorkerGroupStartupTimeoutError),
        ) from error
    if result.error is not None:
        raise LaunchError(f"the workers failed: {_root_cause(result.error)}") from result.error
    return result


@contextmanager
def connected(cluster: ClusterConfig) -> Iterator[str]:
    """Connect to a Ray cluster; yield its address, or "existing" if this process is already connected.

    The cluster is that of `cluster.address`, that of the job that this process belongs to, or a new local one.

    Raises:
        ConnectionError: no cluster answers at the address.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():  # by a search, or by the caller
        yield "existing"
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
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


def _resources() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _new_run_actor() -> Any:
    # On the node of the driver: no other node's loss can take it
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
    return ray.remote(**options)(RunActor).remote()


def _runtime_env() -> dict[str, Any]:
    """Return a runtime environment with which workers import the packages from a job's working directory.

    Empty if this process is no job, or the packages are installed.
    """
    in_job = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
    if not in_job or "PYTHONPATH" in in_job or not Path("platform/raydetr").exists():
        return {}
    return {"env_vars": {"PYTHONPATH": "platform:models"}}


def _trainer(
    work: Callable[[], None], cluster: ClusterConfig, run_config: ray.train.RunConfig
) -> TorchTrainer:
    resources = {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": 1.0} if cluster.use_gpu else {})
    return TorchTrainer(
        work,
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        run_config=run_config,
    )


def _root_cause(error: BaseException) -> str:
    """Return the message of the failed worker with the lowest rank, without the tracebacks of Ray's own layers."""
    fatal = getattr(error, "controller_failure", None)
    if isinstance(fatal, FatalError):
        return str(fatal)
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return str(error)
    rank, cause = sorted(failures.items())[0]
    return f"worker {rank}: {getattr(cause, 'cause', None) or cause}"


def _waiting(cluster: ClusterConfig) -> str:
    """Describe which resources the run needs, and which the cluster has."""
    have = _resources()
    need = (
        f"{cluster.num_workers} workers with {cluster.cpus_per_worker} CPUs" + " and 1 GPU" * cluster.use_gpu
    )
    return (
        f"waiting for {need} each; the cluster has {have.get('CPU', 0):.0f} CPUs and {have.get('GPU', 0):.0f} "
        "GPUs in all (more if it autoscales); `ray status` shows which are free"
    )


# --- In the workers ---


def _train(run: Run, actor: Any) -> None:
    """Train as one worker."""
    _check_storage(run.folder)
    world = _world(run.config.cluster.cpus_per_worker)
    run_session(run, world, _RayReporter(actor, run.folder / STACKS / f"rank-{world.rank}.txt"))


def _work(work: Callable[[World], Any], result: Any, cpus: int) -> None:
    """Call `work` as one worker; rank 0 sends the result to the actor `result`."""
    world = _world(cpus)
    value = work(world)
    if world.is_main:
        ray.get(result.update.remote(value))


class _RayReporter:
    """Talks to the driver through an actor, and asks it from a thread for what the driver wants."""

    def __init__(self, actor: Any, stacks: Path) -> None:
        self._actor, self._stacks = actor, stacks
        self._is_stopping = False
        threading.Thread(target=self._listen, name="driver", daemon=True).start()

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Report to Ray Train, from which a search gets the metrics."""
        group = ray.util.get_current_placement_group()  # a search removes it if it stops this run
        assert group is not None
        ray.train.report({**metrics, "placement_group": group.id.hex()})

    def show(self, progress: RunProgress) -> None:
        self._actor.update.remote(progress)  # not waited for

    def should_stop(self) -> bool:
        return self._is_stopping

    def _listen(self) -> None:
        while True:
            try:
                wish = ray.get(self._actor.wish.remote())
            except ray.exceptions.RayError:  # the driver has ended, and Ray ends this worker
                return
            self._is_stopping = wish == "stop"
            if wish == "abort":
                # The main thread may wait in a collective for ever: only the process can end
                self._stacks.parent.mkdir(exist_ok=True)
                with self._stacks.open("a") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                os._exit(1)
            time.sleep(POLL_SECONDS)


def _world(cpus: int) -> World:
    torch.set_num_threads(cpus)
    context = ray.train.get_context()
    return World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())


def _check_storage(folder: Path) -> None:
    if not (folder / "config.yaml").exists():
        node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        raise FileNotFoundError(
            f"{folder} (storage.path) does not exist on node {node}: "
            "with more than one node, storage.path must be on storage that all nodes mount"
        )
