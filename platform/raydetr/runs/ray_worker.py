"""What a Ray Train worker runs: a session whose checkpoints and progress go through Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from raydetr.console import Progress
from raydetr.runs.evaluate import share_of_results
from raydetr.runs.session import Assignment, run_session
from raydetr.training import checkpoint
from raydetr.training.world import World

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
