"""Whether a configuration fits on nodes, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from raydetr import recipes
from raydetr.clusters.nodes import Nodes, NodeType, notices_of, problems_of
from raydetr.config import override

HEAD = NodeType("head", cpus=0, gpus=0, max_nodes=1)
SMALL = NodeType("small", cpus=8, gpus=1, max_nodes=4)
LARGE = NodeType("large", cpus=48, gpus=4, max_nodes=2)
SERVER = "http://10.0.0.1:5000"


def nodes(*workers: NodeType, head: NodeType = HEAD, most: int = 99, mounts: Any = ("/mnt/a",)) -> Nodes:
    return Nodes(head, workers, most, mounts)


@pytest.mark.parametrize(
    ("described", "cpus", "gpus", "expected"),
    [
        (nodes(SMALL), 4, 1, 4),  # one GPU each
        (nodes(SMALL), 4, 0, 8),
        (nodes(SMALL), 8, 1, 4),
        (nodes(SMALL), 9, 1, 0),
        (nodes(SMALL, LARGE), 12, 1, 8),
        (nodes(SMALL, LARGE), 8, 1, 12),
        (nodes(LARGE), 24, 1, 4),  # two per node, for which CPUs are left
        (nodes(SMALL, LARGE, most=3), 8, 1, 9),  # both large ones, and one small one
        (nodes(SMALL, most=2), 8, 1, 2),
        (nodes(), 1, 0, 0),
        (nodes(head=SMALL), 2, 1, 1),
        (nodes(SMALL, head=SMALL), 8, 1, 5),
    ],
)
def test_how_many_workers_nodes_can_hold(described: Nodes, cpus: int, gpus: int, expected: int) -> None:
    assert described.capacity(cpus, gpus) == expected


def find(described: Nodes, **changes: Any) -> list[str]:
    base = {
        "cluster.num_workers": 4,
        "cluster.use_gpu": True,
        "cluster.cpus_per_worker": 8,
        "storage.path": "/mnt/a/runs",
        "tracking.uri": SERVER,
    }
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return problems_of(override(recipes.quickstart(), base | given), described)


def test_a_run_that_fits_has_no_problem() -> None:
    assert find(nodes(SMALL)) == []
    assert find(nodes(SMALL), cluster__use_gpu=False, cluster__num_workers=4) == []


def test_too_many_workers_for_the_nodes() -> None:
    (problem,) = find(nodes(SMALL), cluster__num_workers=5)
    assert problem.startswith(
        "cluster.num_workers: 5 workers with cluster.cpus_per_worker=8 and 1 GPU each, and the nodes hold 4 (small: "
    )
    (problem,) = find(nodes(SMALL), cluster__cpus_per_worker=9, cluster__use_gpu=False)
    assert "the nodes hold 0" in problem
    assert "GPU each, and" not in problem


@pytest.mark.parametrize("path", ["runs", "/mnt/ab/runs", "/tmp/runs"])
def test_storage_that_is_not_on_all_nodes(path: str) -> None:
    (problem,) = find(nodes(SMALL), storage__path=path)
    assert (
        problem == f"storage.path: {path} is on no folder that all nodes mount: set storage.path=/mnt/a/runs"
    )
    (problem,) = find(nodes(SMALL, mounts=()), storage__path=path)
    assert problem.endswith("that all nodes mount: mount one")
    assert find(nodes(SMALL, mounts=None), storage__path=path) == []  # it cannot be told


@pytest.mark.parametrize("uri", [None, "sqlite:////mnt/a/runs/mlflow.db"])
def test_sqlite_on_several_nodes(uri: str | None) -> None:
    (problem,) = find(nodes(SMALL), tracking__uri=uri)
    assert problem.startswith("tracking.uri: ")
    assert "tracking.uri=http://HEAD_IP:5000" in problem
    alone = NodeType("head", cpus=64, gpus=8, max_nodes=1)
    assert find(nodes(head=alone), tracking__uri=uri) == []
    assert find(nodes(SMALL, head=alone, most=0), tracking__uri=uri) == []


def test_files_that_workers_read_and_that_are_not_mounted_are_notices() -> None:
    changes = {
        "data.train": "s3://bucket/train",
        "data.val": "shards/val",
        "model.backbone.weights": "/home/a.pth",
        "init.checkpoint": "/mnt/a/checkpoint",
    }
    config = override(recipes.quickstart(), changes)
    found = notices_of(config, nodes(SMALL))
    assert [line.partition(":")[0] for line in found] == ["data.val", "model.backbone.weights"]
    assert notices_of(config, nodes(SMALL, mounts=None)) == []
