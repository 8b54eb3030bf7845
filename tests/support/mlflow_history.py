"""Read the metrics of a run with MLflow's own client."""

from __future__ import annotations

import math

from mlflow import MlflowClient


def fetch_history(uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Return the values of all metrics, {name: [(step, value), ...]}, sorted by step.

    If a resumed run repeated a step, the later value is returned.
    """
    client = MlflowClient(tracking_uri=uri)
    history = {}
    for name in client.get_run(run_id).data.metrics:
        points = sorted(client.get_metric_history(run_id, name), key=lambda point: point.timestamp)
        history[name] = sorted({point.step: _restore_infinity(point.value) for point in points}.items())
    return history


def _restore_infinity(value: float) -> float:
    # MLflow's database stores an infinity as the largest finite number
    return math.copysign(math.inf, value) if abs(value) >= 1.79e308 else value
