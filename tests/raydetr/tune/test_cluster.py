from __future__ import annotations

import pytest

from raydetr.config import ClusterConfig
from raydetr.tune.cluster import num_fitting


@pytest.mark.parametrize(
    ("nodes", "cluster", "expected"),
    [
        ([{"CPU": 2}], ClusterConfig(num_workers=2), 1),
        ([{"CPU": 2}], ClusterConfig(num_workers=1), 2),
        ([{"CPU": 2}], ClusterConfig(num_workers=3), 0),
        # a worker does not stretch over nodes, a trial does
        ([{"CPU": 3}, {"CPU": 3}], ClusterConfig(num_workers=1, cpus_per_worker=2), 2),
        ([{"CPU": 3}, {"CPU": 3}], ClusterConfig(num_workers=2, cpus_per_worker=2), 1),
        # a head without CPUs, and nodes whose GPUs are fewer than their CPUs allow
        (
            [{}, {"CPU": 16, "GPU": 2}, {"CPU": 4, "GPU": 8}],
            ClusterConfig(use_gpu=True, cpus_per_worker=4),
            3,
        ),
        ([{"CPU": 64}], ClusterConfig(use_gpu=True), 0),
    ],
)
def test_as_many_trials_fit_as_their_workers_do(
    nodes: list[dict[str, float]], cluster: ClusterConfig, expected: int
) -> None:
    assert num_fitting(nodes, cluster) == expected
