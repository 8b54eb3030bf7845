"""Run in this process, without Ray: for debugging and small data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from raydetr.config import ClusterConfig, ConfigError
from raydetr.console import Display, RunProgress
from raydetr.runs.run_folder import Run
from raydetr.runs.session import run_session
from raydetr.training.world import World, make_deterministic


def local_world(cluster: ClusterConfig) -> World:
    """Return this process as a world of one, on the GPU with `cluster.use_gpu`, and configure torch for it.

    Raises:
        ConfigError: `cluster.use_gpu` is set, and there is no GPU.
    """
    torch.set_num_threads(cluster.cpus_per_worker)
    if cluster.deterministic:
        make_deterministic()
    if cluster.use_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "cluster.use_gpu is true, but torch finds no GPU on this machine: set cluster.use_gpu=false, or see "
            "`raydetr doctor` for the reason"
        )
    return World.single_process(torch.device("cuda" if cluster.use_gpu else "cpu"))


def train_locally(run: Run, should_stop: Callable[[], bool]) -> None:
    """Train in this process, to the end or until `should_stop`.

    Raises:
        ConfigError: `cluster.use_gpu` is set, and there is no GPU.
        ValueError, OSError, FloatingPointError, RuntimeError: see `run_session`.
    """
    world = local_world(run.config.cluster)
    with Display() as display:
        run_session(run, world, _LocalReporter(display, should_stop))


@dataclass(frozen=True)
class _LocalReporter:
    """Shows progress at once."""

    display: Display
    should_stop: Callable[[], bool]

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Do nothing: the run's folder has the metrics."""

    def show(self, progress: RunProgress) -> None:
        self.display.show(progress)
