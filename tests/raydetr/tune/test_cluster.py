from __future__ import annotations

import pytest

from raydetr.config import ClusterConfig
from raydetr.tune.cluster import count_fitting_trials


@pytest.mark.parametrize(
    ("nodes", "cluster", "expected"),
    [
        ([{"CPU": 2}], ClusterConfig(num_workers=2), 1),
        ([{"CPU": 2}], ClusterConfig(num_workers=1), 2),
        ([{"CPU": 2}], ClusterConfig(num_workers=3), 0),
        # A worker needs one node, a trial can use several
        ([{"CPU": 3}, {"CPU": 3}], ClusterConfig(num_workers=1, cpus_per_worker=2), 2),
        ([{"CPU": 3}, {"CPU": 3}], ClusterConfig(num_workers=2, cpus_per_worker=2), 1),
        # A head without CPUs, and nodes limited by GPUs or by CPUs
        (
            [{}, {"CPU": 16, "GPU": 2}, {"CPU": 4, "GPU": 8}],
            ClusterConfig(use_gpu=True, cpus_per_worker=4),
            3,
        ),
        ([{"CPU": 64}], ClusterConfig(use_gpu=True), 0),
    ],
)
def test_trials_are_counted_by_the_workers_that_fit(
    nodes: list[dict[str, float]], cluster: ClusterConfig, expected: int
) -> None:
    assert count_fitting_trials(nodes, cluster) == expected
