"""Measure the processor, the memory, the network and the GPUs of a node, with MLflow's own monitors."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 10.0  # between two measurements, as in MLflow


class SystemMetrics:
    """Measures in a thread, from the creation to `close`.

    Args:
        node: name of the node, which the names of its metrics contain.
        report: is called, in the thread, with the metrics by name: `system/NODE/cpu_utilization_percentage`, ...
        interval_seconds: between two calls.
    """

    def __init__(
        self,
        node: str,
        report: Callable[[Mapping[str, float]], None],
        interval_seconds: float = INTERVAL_SECONDS,
    ) -> None:
        self._node, self._report, self._interval = node, report, interval_seconds
        self._is_closed = threading.Event()
        threading.Thread(target=self._run, name="system-metrics", daemon=True).start()

    def close(self) -> None:
        """End the thread, without waiting for it."""
        self._is_closed.set()

    def _run(self) -> None:
        monitors = _monitors()  # in the thread, because the import takes a second
        while not self._is_closed.wait(self._interval):
            metrics: dict[str, float] = {}
            for monitor in monitors:
                try:
                    monitor.collect_metrics()
                    metrics |= monitor.aggregate_metrics()
                except Exception as error:  # of a driver, perhaps: the other metrics are still of use
                    log.warning("%s: %s", type(monitor).__name__, error)
                monitor.clear_metrics()
            self._report({f"system/{self._node}/{name}": float(value) for name, value in metrics.items()})


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    kinds: list[Any] = [CPUMonitor, DiskMonitor, NetworkMonitor]
    monitors = [kind() for kind in kinds]
    gpu_monitor: Any = GPUMonitor
    try:
        monitors.append(gpu_monitor())
    except (ImportError, RuntimeError) as error:  # no GPU, or nvidia-ml-py is not installed
        log.info("no metrics of GPUs: %s", error)
    return monitors
