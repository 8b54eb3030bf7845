"""Run workers on Ray Train: start them, show their progress, start them again when some fail."""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import pickle
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydetr.config import ClusterConfig
from raydetr.console import Display, RunActor, RunProgress
from raydetr.runs.fatal_errors import FatalError, StopAtFatalErrors
from raydetr.runs.patience import Failures, StoragePatience
from raydetr.runs.ray_cluster import (
    POLL_SECONDS,
    LaunchError,
    Room,
    check_resources,
    check_tracking,
    connected,
)
from raydetr.runs.run_folder import Run
from raydetr.runs.session import run_session
from raydetr.runs.signals import StopSignals
from raydetr.runs.watch import ABORT_SECONDS, STACKS, Watch
from raydetr.store.folders import Folder, with_retry_seconds, write_file
from raydetr.tracking.events import EventLog
from raydetr.training import checkpoint
from raydetr.training.world import World, make_deterministic

RESTART_SECONDS = "20"  # for the start of workers after a failure
LOST_SECONDS = 60.0  # for the end of workers that can no longer be reached

OUT_OF_MEMORY = (
    "a process was killed because its node ran out of memory: lower data.batch_size, data.micro_batch_size or "
    "data.num_loader_workers, use more nodes, or set optim.activation_checkpointing=true"
)

T = TypeVar("T")


# --- In the driver ---


def train_on_ray(run: Run, callbacks: Sequence[Any], stop: StopSignals, log: EventLog) -> None:
    """Train on Ray Train workers, to the end or until `stop`; start the workers again when some of them fail.

    Every start continues from the newest valid checkpoint of the run. While nodes are missing for longer than
    `cluster.wait_minutes`, it goes on with fewer workers, at least `cluster.min_workers`.

    Raises:
        LaunchError: the workers do not fit on the cluster, or failed for good: at a fatal error, or at more than
            `cluster.max_failures` failures without progress between them.
        ConfigError: `tracking.uri` is a SQLite database, and the cluster has nodes on several machines.
        ConnectionError: no cluster answers at `cluster.address`.
    """
    cluster = run.config.cluster
    with connected(cluster) as address, Display() as display:
        stop.install()  # Ray has replaced the handlers
        check_resources(cluster, address)
        check_tracking(run.config.tracking.uri)
        failures, room = Failures(cluster.max_failures, log), Room(cluster, log)
        storage = StoragePatience(run, stop, log)
        num_workers, start_timeout = cluster.num_workers, None
        last = storage.call(lambda: checkpoint.newest_valid(run.folder))
        while not stop.is_set():
            resumed = dataclasses.replace(run, resume_from=last or run.resume_from)
            start = Start(resumed, num_workers, failures.number)
            try:
                with _start_timeout(start_timeout):
                    start.fit(callbacks, display, stop, log)
                if storage.call(lambda: _is_over(run)) or stop.is_set():
                    return
                last = storage.call(lambda: checkpoint.newest_valid(run.folder))
            except LaunchError as error:
                if stop.is_set():
                    return
                if error.is_waiting:
                    room.add_start_in_vain()
                else:
                    last = storage.call(lambda: checkpoint.newest_valid(run.folder))
                    position = 0 if last is None else checkpoint.position_of(last)
                    failures.add(error, max(start.position, position), position)
                    stop.sleep(failures.pause)
            if start.position >= 0:
                room.forget()
            # Ray notices a lost node late, and a start before that waits for its workers in vain: not for Ray's 60 s,
            # which a first start may need to install packages
            start_timeout = RESTART_SECONDS
            num_workers = room.wait(stop)


@contextmanager
def _start_timeout(seconds: str | None) -> Iterator[None]:
    """Set for how long Ray Train waits for resources, unless the user has set it."""
    name = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    if seconds is None or name in os.environ:
        yield
        return
    os.environ[name] = seconds
    try:
        yield
    finally:
        del os.environ[name]


def _is_over(run: Run) -> bool:
    """Return whether the run has its last checkpoint; otherwise its workers have ended to be started elsewhere."""
    written = checkpoint.complete_checkpoints(run.folder)
    return bool(written) and checkpoint.has_reached(written[0], run.last_epoch)


class Start:
    """One start of the workers of a run; they may be fewer than `cluster.num_workers`."""

    def __init__(self, run: Run, num_workers: int, number: int) -> None:
        self._run, self._number = run, number
        self._cluster = run.config.cluster.model_copy(update={"num_workers": num_workers})
        self.position = -1  # reached, as far as the driver knows

    def fit(self, callbacks: Sequence[Any], display: Display, stop: StopSignals, log: EventLog) -> None:
        """Train until the workers end: at the end of the run, because it is to stop, or to be started on other nodes.

        Raises:
            LaunchError: the workers failed.
        """
        actor = _new_run_actor()
        # Ray Train's own files; the name is new, because it would go on with those of an older start
        scratch = Path(tempfile.mkdtemp(prefix="raydetr-ray-"))
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
        watch = Watch(self._cluster, log, self._run.folder / STACKS)
        try:
            self._follow(thread, actor, watch, display, stop)
        except ray.exceptions.RayError as error:
            thread.join(LOST_SECONDS)  # the workers end without it
            raise LaunchError(
                f"the process between driver and workers is gone: {str(error).splitlines()[0]}"
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if failed:
            raise watch.explain(failed[0], actor)

    def _follow(
        self, thread: threading.Thread, actor: Any, watch: Watch, display: Display, stop: StopSignals
    ) -> None:
        """Show the progress until the workers have ended; ask them to stop when they are to."""
        wanted, moves = self._run.config.cluster.num_workers, False
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            progress = ray.get(actor.read.remote())
            self._show(progress, display)
            watch.look(progress, actor)
            if progress is not None and not moves:
                moves = watch.is_leaving(actor) or watch.can_grow(self._cluster.num_workers, wanted)
            if stop.is_set() and stop.signal is None:  # another driver has taken the run over
                actor.request_leave.remote()
            elif stop.is_set() or moves:
                actor.request_stop.remote()
        self._show(ray.get(actor.read.remote()), display)  # with a warning of the last moment

    def _show(self, progress: RunProgress | None, display: Display) -> None:
        if progress is not None:
            self.position = max(self.position, progress.step * self._run.config.data.batch_size)
            display.show(progress)


def run_on_workers(work: Callable[[World], T], cluster: ClusterConfig) -> list[T]:
    """Call `work` on every Ray Train worker; return what it returned, in the order of the ranks.

    The results come through Ray's object store: the nodes need no folder that all of them mount.

    Args:
        work: a picklable function.
        cluster: the number of workers and their resources.

    Raises:
        LaunchError: the workers do not fit on the cluster, or one of them failed.
        ConnectionError: no cluster answers at `cluster.address`.
    """
    with connected(cluster) as address, tempfile.TemporaryDirectory(prefix="raydetr-ray-") as scratch:
        check_resources(cluster, address)
        result = _new_run_actor()
        run_config = ray.train.RunConfig(name="work", storage_path=scratch)
        fit(_trainer(partial(_work, work, result, cluster.cpus_per_worker), cluster, run_config))
        return [pickle.loads(each) for each in ray.get(result.results.remote())]


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
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        cause = getattr(error, "controller_failure", None)
        raise LaunchError(
            f"the workers failed: {_root_cause(error)}",
            is_fatal=isinstance(cause, FatalError),
            is_waiting=isinstance(cause, WorkerGroupStartupTimeoutError),
        ) from error
    if result.error is not None:
        raise LaunchError(f"the workers failed: {_root_cause(result.error)}") from result.error
    return result


def _new_run_actor() -> Any:
    # On the node of the driver: no other node's loss can take it
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
    return ray.remote(**options)(RunActor).remote()


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
    for text in map(str, (failures or {0: error}).values()):
        if is_out_of_memory(text):
            return OUT_OF_MEMORY
    if not failures:
        # Ray's text about a dead actor begins with what happened, one about an error ends with it
        lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
        is_dead = isinstance(error, ray.exceptions.RayActorError)
        return f"Ray Train's controller died: {lines[0]}" if is_dead else lines[-1].strip()
    # Rather a worker that died than one that waited for it
    rank, cause = min(
        failures.items(), key=lambda item: (not hasattr(item[1], "health_check_failure"), item[0])
    )
    if hasattr(cause, "health_check_failure"):
        first_line, _, _ = str(cause.health_check_failure).partition("\n")
        return f"worker {rank} does not answer: {first_line}"
    return f"worker {rank}: {getattr(cause, 'cause', None) or cause}"


def is_out_of_memory(text: str) -> bool:
    """Return whether Ray's text about a process that died says that the node had too little memory."""
    return "low on memory" in text or "OUT_OF_MEMORY" in text


# --- In the workers ---


def _train(run: Run, actor: Any) -> None:
    """Train as one worker."""
    _check_storage(run.folder)
    if run.config.cluster.deterministic:
        make_deterministic()
    world = _world(run.config.cluster.cpus_per_worker)
    run_session(run, world, _RayReporter(actor, run.folder / STACKS, world.rank))


def _work(work: Callable[[World], Any], result: Any, cpus: int) -> None:
    """Call `work` as one worker; send what it returned to the actor `result`."""
    world = _world(cpus)
    # As bytes, because the actor does not load the modules of a result
    ray.get(result.put_result.remote(world.rank, pickle.dumps(work(world))))


class _RayReporter:
    """Talks to the driver through an actor, and asks it from a thread for what the driver wants."""

    def __init__(self, actor: Any, stacks: Folder, rank: int) -> None:
        self._actor, self._stacks, self._rank = actor, stacks / f"rank-{rank}.txt", rank
        self._is_stopping = False
        threading.Thread(target=self._listen, name="driver", daemon=True).start()

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Report to Ray Train, from which a search gets the metrics."""
        group = ray.util.get_current_placement_group()  # a search removes it if it stops this run
        assert group is not None
        # Ray Tune stores what it gets, again and again: no tables
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        ray.train.report({**numbers, "placement_group": group.id.hex()})

    def show(self, progress: RunProgress) -> None:
        self._actor.update.remote(progress)  # not waited for

    def should_stop(self) -> bool:
        return self._is_stopping

    def _listen(self) -> None:
        node = ray.get_runtime_context().get_node_id()
        while True:
            try:
                wish = ray.get(self._actor.wish.remote(node, os.getpid(), self._rank))
            except ray.exceptions.RayError:
                # The driver has ended, and Ray ends this worker; or only the actor, and the driver starts all again
                os._exit(1)
            self._is_stopping = wish == "stop"
            if wish == "leave":
                os._exit(1)
            if wish == "abort":
                # The main thread may wait in a collective for ever: only the process can end
                with tempfile.TemporaryFile() as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                    file.seek(0)
                    with suppress(OSError):  # the storage may be the reason
                        write_file(with_retry_seconds(self._stacks, ABORT_SECONDS), file.read())
                # Ray ends all workers when one has ended: those that have not asked yet would leave no stack
                time.sleep(POLL_SECONDS)
                os._exit(1)
            time.sleep(POLL_SECONDS)


def _world(cpus: int) -> World:
    torch.set_num_threads(cpus)
    context = ray.train.get_context()
    return World(
        context.get_world_rank(),
        context.get_world_size(),
        ray.train.torch.get_device(),
        context.get_local_rank(),
    )


def _check_storage(folder: Folder) -> None:
    if not (folder / "config.yaml").exists():
        node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        raise FileNotFoundError(
            f"{folder} (storage.path) does not exist on node {node}: "
            "with more than one node, storage.path must be on storage that all nodes mount, or a URL"
        )
