"""MLflow's monitors measure this machine, and GPUs that a made driver describes."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from raydetr.tracking.system_metrics import SystemMetrics


def measure() -> Mapping[str, float]:
    """The first measurement of a node."""
    reports: queue.Queue[Mapping[str, float]] = queue.Queue()
    metrics = SystemMetrics("node-1", reports.put, interval_seconds=0.05)
    try:
        return reports.get(timeout=60)  # the import of the monitors takes a second
    finally:
        metrics.close()


def test_processor_and_memory_are_measured() -> None:
    measured = measure()
    assert all(name.startswith("system/node-1/") for name in measured)
    assert 0 <= measured["system/node-1/cpu_utilization_percentage"] <= 100
    megabytes = measured["system/node-1/system_memory_usage_megabytes"]
    total = psutil.virtual_memory().total / 1e6
    assert 0 < megabytes < total
    percentage = measured["system/node-1/system_memory_usage_percentage"]
    assert percentage == pytest.approx(100 * megabytes / total, abs=0.06)  # both are rounded to 0.1
    for name in ("disk_usage_percentage", "network_receive_megabytes", "network_transmit_megabytes"):
        assert f"system/node-1/{name}" in measured


def test_memory_and_utilization_of_every_gpu_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=(gpu + 1) * 10e9, total=80e9),
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=40 + gpu),
        "nvmlDeviceGetPowerUsage": lambda gpu: 350_000,
        "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 700_000,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    measured = measure()
    for gpu in (0, 1):
        values = {
            name: measured[f"system/node-1/gpu_{gpu}_{name}"]
            for name in ("utilization_percentage", "memory_usage_megabytes", "memory_usage_percentage")
        }
        assert values == {
            "utilization_percentage": 40 + gpu,
            "memory_usage_megabytes": (gpu + 1) * 10_000,
            "memory_usage_percentage": (gpu + 1) * 12.5,
        }


def test_a_machine_without_gpus_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    measured = measure()
    assert "system/node-1/cpu_utilization_percentage" in measured
    assert not any("gpu" in name for name in measured)
