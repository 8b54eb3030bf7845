"""What the driver reads while workers train. Light: it runs in a process of its own.

What a Ray Train worker runs: a session whose checkpoints and progress go through Ray.

Runs a session on Ray Train: finds or starts a cluster, starts the workers, shows their progress.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchTrainer

from raydetr.config import ClusterConfig
from raydetr.console import Display, Progress, say
from raydetr.data.corrupt import Damage
from raydetr.runs.evaluate import share_of_results
from raydetr.runs.session import Assignment, run_session
from raydetr.training import checkpoint
from raydetr.training.world import World


class Board:
    """A small actor that holds the latest word of the first worker to the driver."""

    def __init__(self) -> None:
        self._latest: Any = None

    def post(self, word: Any) -> None:
        """Replace what is held."""
        self._latest = word

    def read(self) -> Any:
        """What was posted last; None before the first."""
        return self._latest


# the same input gives them again: faulty data or settings, too many steps that are not finite, our own mistakes
FINAL = (ValueError, FloatingPointError, AssertionError)


class FinalError(RuntimeError):
    """A worker failed with an error that no retry can help; the message is the worker's."""


class StopAtFinalErrors(ray.train.UserCallback):
    """Ends a run at once where Ray Train would start all workers again, to meet the same error again.

    Ray Train's controller calls it before it decides about a retry, and retries no error of a callback. Workers
    that wait for the failed one are ended by the controller.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Look at what the workers raised.

        Raises:
            FinalError: a retry cannot help.
        """
        for rank, error in sorted(worker_exceptions.items()):
            if isinstance(error, FINAL):
                raise FinalError(f"worker {rank}: {error}")


class RayHost:
    """Publishes through `ray.train.report`, which every worker calls equally often."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def publish(self, name: str, metrics: Mapping[str, Any], write: checkpoint.Writer | None) -> None:
        """Hand a checkpoint to Ray Train, which copies it to the run's storage.

        The name is a function of the epoch, so that an epoch trained again after a failure
        overwrites what the first try left.
        """
        with tempfile.TemporaryDirectory(prefix="raydetr-") as temporary:
            kept = None
            if write is not None:
                write(Path(temporary))
                kept = ray.train.Checkpoint.from_directory(temporary)
            group = ray.util.get_current_placement_group()  # a search frees it should it stop this run
            assert group is not None
            reported = {**metrics, "placement_group": group.id.hex()}
            ray.train.report(reported, checkpoint=kept, checkpoint_dir_name=name)

    def show(self, progress: Progress) -> None:
        """Post to the board, without waiting."""
        self._board.post.remote(progress)


def train_worker(settings: dict[str, Any]) -> None:
    """Train as one worker: `settings` = {"assignment": Assignment.as_dict(), "board", "cpus"}."""
    assignment = Assignment(**settings["assignment"])
    _check_storage(Path(assignment.folder))
    run_session(_continued(assignment), _world(settings["cpus"]), RayHost(settings["board"]))


def evaluate_worker(settings: dict[str, Any]) -> None:
    """Evaluate as one worker: `settings` = {"checkpoint", "data", "board", "cpus"}."""
    world = _world(settings["cpus"])
    results = share_of_results(Path(settings["checkpoint"]), settings["data"], world)
    if world.is_first:
        ray.get(settings["board"].post.remote(results))


def _world(cpus: int) -> World:
    torch.set_num_threads(cpus)
    context = ray.train.get_context()
    return World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())


def _continued(assignment: Assignment) -> Assignment:
    """After a failure Ray Train starts the workers again, with the last checkpoint they reported."""
    last = ray.train.get_checkpoint()
    if last is None:
        return assignment
    return Assignment(**{**assignment.as_dict(), "resume_from": str(last.path)})


def _check_storage(folder: Path) -> None:
    if not (folder / "config.yaml").exists():
        node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        raise FileNotFoundError(
            f"{folder} (storage.path) is not seen from node {node}: "
            "with more than one node, storage.path must be on storage that all nodes mount"
        )


POLL_SECONDS = 0.5  # between two looks at the progress board
WAITING_SECONDS = 60.0  # without a first step, before a line says what the run waits for

# Ray reads these when it starts its processes; a value that the user has set stays
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",  # else a token in the home folder decides, and other clusters refuse us
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for this poll: 2 s by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints would appear twice
    "RAY_raylet_start_wait_time_s": "120",  # 30 s are too few on a busy machine
}


class LaunchError(RuntimeError):
    """A run that could not be carried out on the cluster; the message says why."""


def launch(
    assignment: Assignment,
    cluster: ClusterConfig,
    attempt: str,
    keep_checkpoints: int,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Train on Ray Train workers; returns the last reported metrics with `checkpoint`, its path.

    Checkpoints go to `assignment.folder`/`attempt`.

    Raises:
        LaunchError: the cluster cannot hold the workers, or the training failed for good.
    """
    with connected(cluster) as address:
        check_resources(cluster, address)
        board = _new_board()
        trainer = build_trainer(assignment, cluster, attempt, keep_checkpoints, board, callbacks)
        with Display() as display, _polling(board, display, cluster):
            result = fit(trainer)
        kept = result.checkpoint
        return {**(result.metrics or {}), "checkpoint": None if kept is None else str(kept.path)}


def launch_evaluation(
    checkpoint: Path, data: str, cluster: ClusterConfig, scratch: Path
) -> tuple[list[dict[str, Any]], list[Damage]]:
    """COCO results of a checkpoint on the shards at `data`, and its damaged images, by Ray Train workers.

    Ray keeps its notes in `scratch`, a folder that all nodes see.

    Raises:
        LaunchError: the cluster cannot hold the workers, or the evaluation failed.
    """
    with connected(cluster) as address:
        check_resources(cluster, address)
        board = _new_board()
        settings = {"checkpoint": str(checkpoint), "data": data, "board": board}
        run_config = ray.train.RunConfig(name=scratch.name, storage_path=str(scratch.parent))
        fit(_trainer(evaluate_worker, settings, cluster, run_config))
        results: tuple[list[dict[str, Any]], list[Damage]] = ray.get(board.read.remote())
        return results


def build_trainer(
    assignment: Assignment,
    cluster: ClusterConfig,
    attempt: str,
    keep_checkpoints: int,
    board: Any,
    callbacks: Sequence[Any] = (),
) -> TorchTrainer:
    """The Ray Train run that carries out `assignment`."""
    with_ours: list[Any] = [*callbacks, StopAtFinalErrors()]
    run_config = ray.train.RunConfig(
        name=attempt,
        storage_path=assignment.folder,
        failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=keep_checkpoints),
        callbacks=with_ours,
    )
    settings = {"assignment": assignment.as_dict(), "board": board}
    return _trainer(train_worker, settings, cluster, run_config)


def fit(trainer: TorchTrainer) -> ray.train.Result:
    """Run to the end.

    Raises:
        LaunchError: the workers failed for good; the message is what the first of them said.
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
    """A Ray cluster: the one at `cluster.address`, that of the job we are in, or a new local one."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():  # a search, or a caller, holds the connection
        yield "existing"
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    ray.init(
        address=address,
        include_dashboard=True,  # on loopback; without it stopped trials leak their resources
        log_to_driver=False,
        runtime_env=_runtime_env(),
        logging_level=logging.WARNING,
    )
    try:
        yield address
    finally:
        ray.shutdown()


def check_resources(cluster: ClusterConfig, address: str) -> None:
    """Refuse what a local cluster, which never grows, would wait for without end.

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
                f"cluster.num_workers={cluster.num_workers} with cluster.{setting} needs {need} {name}s, this "
                f"machine has {have.get(name, 0):.0f}: lower them, or set cluster.address to a larger cluster"
            )


def _resources() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _new_board() -> Any:
    return ray.remote(num_cpus=0)(Board).remote()


def _runtime_env() -> dict[str, Any]:
    """Lets workers import the packages from a job's working directory where they are not installed."""
    in_job = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
    if not in_job or "PYTHONPATH" in in_job or not Path("platform/raydetr").exists():
        return {}
    return {"env_vars": {"PYTHONPATH": "platform:models"}}


def _trainer(
    work: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    cluster: ClusterConfig,
    run_config: ray.train.RunConfig,
) -> TorchTrainer:
    resources = {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": 1.0} if cluster.use_gpu else {})
    return TorchTrainer(
        work,
        train_loop_config={**settings, "cpus": cluster.cpus_per_worker},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        run_config=run_config,
    )


def _root_cause(error: BaseException) -> str:
    """What the first failing worker said, without the traces of Ray's own layers."""
    final = getattr(error, "controller_failure", None)
    if isinstance(final, FinalError):
        return str(final)
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return str(error)
    rank, cause = sorted(failures.items())[0]
    return f"worker {rank}: {getattr(cause, 'cause', None) or cause}"


def _waiting(cluster: ClusterConfig) -> str:
    """Why nothing has happened yet, as far as can be seen from here."""
    have = _resources()
    need = (
        f"{cluster.num_workers} workers with {cluster.cpus_per_worker} CPUs" + " and 1 GPU" * cluster.use_gpu
    )
    return (
        f"waiting for {need} each; the cluster has {have.get('CPU', 0):.0f} CPUs and {have.get('GPU', 0):.0f} "
        "GPUs in all (more, if it grows); `ray status` says what is free"
    )


@contextmanager
def _polling(board: Any, display: Display, cluster: ClusterConfig) -> Iterator[None]:
    """Show what is on the board from a thread, while the caller waits for the training."""
    done = threading.Event()

    def poll() -> None:
        wait_until = time.monotonic() + WAITING_SECONDS
        while not done.wait(POLL_SECONDS):
            progress = ray.get(board.read.remote())
            if progress is not None:
                display.show(progress)
            elif time.monotonic() > wait_until:
                wait_until += WAITING_SECONDS
                say(_waiting(cluster))

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
