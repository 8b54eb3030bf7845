"""Run in this process, without Ray: for debugging and small data."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raydetr.config import ClusterConfig, ConfigError
from raydetr.console import Display, RunProgress
from raydetr.runs.session import Run, run_session
from raydetr.training import checkpoint
from raydetr.training.world import World


def local_world(cluster: ClusterConfig) -> World:
    """Return this process as a world of one, on the GPU with `cluster.use_gpu`, and set its number of threads.

    Raises:
        ConfigError: `cluster.use_gpu` is set, and there is no GPU.
    """
    torch.set_num_threads(cluster.cpus_per_worker)
    if cluster.use_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "cluster.use_gpu is true, but torch finds no GPU on this machine: set cluster.use_gpu=false, or see "
            "`raydetr doctor` for the reason"
        )
    return World.single_process(torch.device("cuda" if cluster.use_gpu else "cpu"))


def train_locally(run: Run, attempt: str) -> dict[str, Any]:
    """Train in this process; return the last metrics with `checkpoint`, its path.

    Checkpoints go to `run.folder`/`attempt`.

    Raises:
        ConfigError: `cluster.use_gpu` is set, and there is no GPU.
        ValueError, OSError, FloatingPointError, RuntimeError: see `run_session`.
    """
    world = local_world(run.config.cluster)
    with Display() as display:
        reporter = _LocalReporter(run.folder / attempt, run.config.storage.keep_checkpoints, display)
        run_session(run, world, reporter)
    assert reporter.last is not None
    return reporter.last


class _LocalReporter:
    """Keeps checkpoints in a folder of the run and shows progress at once."""

    def __init__(self, folder: Path, keep_checkpoints: int, display: Display) -> None:
        self._folder, self._keep, self._display = folder, keep_checkpoints, display
        self.last: dict[str, Any] | None = None

    def publish(self, name: str, metrics: Mapping[str, Any], write: checkpoint.Writer | None) -> None:
        assert write is not None
        write(self._folder / name)
        for old in sorted(self._folder.iterdir())[: -self._keep]:
            shutil.rmtree(old)
        self.last = {**metrics, "checkpoint": str(self._folder / name)}

    def show(self, progress: RunProgress) -> None:
        self._display.show(progress)
