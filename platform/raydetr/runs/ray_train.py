"""Run workers on Ray Train: find or start a cluster, start the workers, show their progress."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
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
from ray.train.torch import TorchTrainer

from raydetr.config import ClusterConfig
from raydetr.console import Display, ProgressActor, RunProgress, print_status
from raydetr.runs.fatal_errors import FatalError, StopAtFatalErrors
from raydetr.runs.session import Run, run_session
from raydetr.training import checkpoint
from raydetr.training.world import World

POLL_SECONDS = 0.5  # between two readings of the progress
WAITING_SECONDS = 60.0  # without a first step, before a line names what the run waits for

# Ray reads these when it starts its processes. A value that the user has set is kept.
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",  # with a token in the home folder, other clusters would refuse the connection
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for this poll; 2 s by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints would appear twice
    "RAY_raylet_start_wait_time_s": "120",  # 30 s are too few on a busy machine
}


class LaunchError(RuntimeError):
    """A run failed on the cluster, or could not start there; the message has the reason."""


# --- In the driver ---


def train_on_ray(run: Run, attempt: str, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train on Ray Train workers; return the last reported metrics with `checkpoint`, its path.

    Checkpoints go to `run.folder`/`attempt`.

    Raises:
        LaunchError: the workers do not fit on the cluster, or failed for good: at a fatal error, or after
            `cluster.max_failures` restarts.
        ConnectionError: no cluster answers at `cluster.address`.
    """
    cluster = run.config.cluster
    with connected(cluster) as address:
        check_resources(cluster, address)
        progress = _new_progress_actor()
        trainer = build_trainer(run, attempt, progress, callbacks)
        with Display() as display, _polling(progress, display, cluster):
            result = fit(trainer)
        kept = result.checkpoint
        return {**(result.metrics or {}), "checkpoint": None if kept is None else str(kept.path)}


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
        result = _new_progress_actor()
        run_config = ray.train.RunConfig(name=scratch.name, storage_path=str(scratch.parent))
        fit(_trainer(partial(_work, work, result, cluster.cpus_per_worker), cluster, run_config))
        return ray.get(result.read.remote())


def build_trainer(run: Run, attempt: str, progress: Any, callbacks: Sequence[Any] = ()) -> TorchTrainer:
    """Return the Ray Train trainer of `run`; its workers send their progress to the actor `progress`."""
    cluster, storage = run.config.cluster, run.config.storage
    all_callbacks: list[Any] = [*callbacks, StopAtFatalErrors()]
    run_config = ray.train.RunConfig(
        name=attempt,
        storage_path=str(run.folder),
        failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=storage.keep_checkpoints),
        callbacks=all_callbacks,
    )
    return _trainer(partial(_train, run, progress), cluster, run_config)


def fit(trainer: TorchTrainer) -> ray.train.Result:
    """Train to the end.

    Raises:
        LaunchError: the workers failed for good; the message is that of the worker with the lowest rank.
    """
    try:
        result = trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
        raise LaunchError(f"the workers failed: {_root_cause(error)}") from error
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


def _new_progress_actor() -> Any:
    return ray.remote(num_cpus=0)(ProgressActor).remote()


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


@contextmanager
def _polling(actor: Any, display: Display, cluster: ClusterConfig) -> Iterator[None]:
    """Show the latest progress from a thread, while the caller waits for the training."""
    done = threading.Event()

    def show_latest() -> bool:
        progress = ray.get(actor.read.remote())
        if progress is not None:
            display.show(progress)
        return progress is not None

    def poll() -> None:
        wait_until = time.monotonic() + WAITING_SECONDS
        while not done.wait(POLL_SECONDS):
            if show_latest():
                continue
            if time.monotonic() > wait_until:
                wait_until += WAITING_SECONDS
                print_status(_waiting(cluster))

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    show_latest()  # with a warning of the last moment


# --- In the workers ---


def _train(run: Run, progress: Any) -> None:
    """Train as one worker."""
    _check_storage(run.folder)
    run_session(_continued(run), _world(run.config.cluster.cpus_per_worker), _RayReporter(progress))


def _work(work: Callable[[World], Any], result: Any, cpus: int) -> None:
    """Call `work` as one worker; rank 0 sends the result to the actor `result`."""
    world = _world(cpus)
    value = work(world)
    if world.is_main:
        ray.get(result.update.remote(value))


class _RayReporter:
    """Publishes through `ray.train.report`, which every worker must call equally often."""

    def __init__(self, progress_actor: Any) -> None:
        self._progress_actor = progress_actor

    def publish(self, name: str, metrics: Mapping[str, Any], write: checkpoint.Writer | None) -> None:
        # The name is a function of the epoch: an epoch that is trained again after a failure overwrites its checkpoint
        with tempfile.TemporaryDirectory(prefix="raydetr-") as temporary:
            kept = None
            if write is not None:
                # Ray guarantees no order of the copied files: in the copy, meta.json is not always written last, and
                # only the size and the checksum in it show that a checkpoint is complete.
                write(Path(temporary))
                kept = ray.train.Checkpoint.from_directory(temporary)
            group = ray.util.get_current_placement_group()  # a search removes it if it stops this run
            assert group is not None
            reported = {**metrics, "placement_group": group.id.hex()}
            ray.train.report(reported, checkpoint=kept, checkpoint_dir_name=name)

    def show(self, progress: RunProgress) -> None:
        self._progress_actor.update.remote(progress)  # not waited for


def _world(cpus: int) -> World:
    torch.set_num_threads(cpus)
    context = ray.train.get_context()
    return World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())


def _continued(run: Run) -> Run:
    """Return the run with the last reported checkpoint: after a failure Ray Train starts the workers again."""
    last = ray.train.get_checkpoint()
    return run if last is None else dataclasses.replace(run, resume_from=Path(last.path))


def _check_storage(folder: Path) -> None:
    if not (folder / "config.yaml").exists():
        node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        raise FileNotFoundError(
            f"{folder} (storage.path) does not exist on node {node}: "
            "with more than one node, storage.path must be on storage that all nodes mount"
        )
