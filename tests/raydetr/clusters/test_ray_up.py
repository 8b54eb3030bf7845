"""Mistakes in cluster files for `ray up`, those that Ray finds and those that it accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster_files import AWS, GCP, OF_ANY_KIND, REMOVED, change, load, paths
from raydetr.clusters.ray_up import check

WORKER = "available_node_types.gpu_worker"
HEAD = "available_node_types.head"
START = "RAY_AUTH_MODE=token ray start"

ANYWHERE = [
    ("max_wokers", 4, "max_wokers: no such key; did you mean max_workers?"),
    ("max_workers", "4", "max_workers: '4' where an integer is expected"),
    ("upscaling_speed", "fast", "upscaling_speed: 'fast' where a number is expected"),
    ("cluster_name", REMOVED, "cluster_name: is missing"),
    ("cluster_name", 7, "cluster_name: 7 where a string is expected; put it in quotes"),
    ("provider.regoin", "a", "provider.regoin: no such key; did you mean region?"),
    ("provider.type", "azure", "provider.type: 'azure' where one of aws, gcp is expected"),
    ("provider.cache_stopped_nodes", "no", "provider.cache_stopped_nodes: 'no' where a boolean is expected"),
    ("provider.availability_zone", "eu-west1-b", "availability_zone: eu-west1-b is not in the region"),
    ("head_node_type", "haed", "head_node_type: haed is none of available_node_types; did you mean head?"),
    (f"{WORKER}.node_config", "big", "node_config: 'big' where a mapping is expected"),
    (f"{WORKER}.node_config", REMOVED, f"{WORKER}.node_config: is missing"),
    (f"{WORKER}.max_wokers", 1, f"{WORKER}.max_wokers: no such key; did you mean max_workers?"),
    (f"{WORKER}.max_workers", 99, "max_workers: 99 is out of reach: the cluster's max_workers is 4"),
    (f"{WORKER}.min_workers", 5, f"{WORKER}.min_workers: 5 is more than its max_workers, 4"),
    (f"{WORKER}.resources.GPU", 4, f"{WORKER}.resources.GPU: 4, and a g"),
    (f"{WORKER}.resources.GPU", REMOVED, f"{WORKER}.resources.GPU: 0, and a g"),
    (f"{WORKER}.resources.CPU", 16, "has 8: declare 8 or fewer"),
    (f"{WORKER}.resources.CPU", -1, "resources.CPU: Ray refuses it: -1 is less than the minimum of 0"),
    (f"{HEAD}.resources.CPU", 8, "the head has CPUs"),
    (f"{HEAD}.resources", {}, "the head has CPUs"),
    (f"{HEAD}.resources", REMOVED, f"{HEAD}.resources: is missing"),
    ("worker_start_ray_commands", ["ray start --address=$RAY_HEAD_IP:6379"], "without RAY_AUTH_MODE=token"),
    ("head_start_ray_commands", [f"{START} --head"], "set --dashboard-host=127.0.0.1"),
    (
        "head_start_ray_commands",
        [f"{START} --head --dashboard-host=0.0.0.0"],
        "set --dashboard-host=127.0.0.1",
    ),
    ("head_start_ray_commands", REMOVED, "head_start_ray_commands: is missing"),
    ("setup_commands", "make", "setup_commands: 'make' where a list is expected"),
    ("file_mounts", {"~/raydetr": "."}, "file_mounts: no node has the token of the cluster"),
    ("docker", {"imgae": "a"}, "docker.imgae: no such key; did you mean image?"),
    ("docker", {"image": "a"}, "Ray refuses the file: "),
]
ON_AWS = [
    (
        f"{WORKER}.node_config.InstanceTyp",
        "g6.xlarge",
        "InstanceTyp: no such key; did you mean InstanceType?",
    ),
    (f"{WORKER}.node_config.instanceType", "g6.xlarge", "did you mean InstanceType?"),
    (f"{WORKER}.node_config.InstanceMarketOptions.MarketTyp", "spot", "did you mean MarketType?"),
    (f"{WORKER}.node_config.InstanceMarketOptions.MarketType", "sopt", "'sopt' where one of spot, "),
    (f"{WORKER}.node_config.BlockDeviceMappings", [{"Ebs": {"Size": 1}}], "[0].Ebs.Size: no such key"),
    (f"{WORKER}.node_config.BlockDeviceMappings", {"Ebs": {}}, "where a list is expected"),
    (
        f"{WORKER}.node_config.BlockDeviceMappings.0.Ebs.VolumeSize",
        "200",
        "'200' where an integer is expected",
    ),
    (f"{WORKER}.node_config.IamInstanceProfile", "name", "'name' where a mapping with Arn, Name is expected"),
    (f"{WORKER}.node_config.InstanceType", "m7i.2xlarge", "resources.GPU: 1, and a m7i.2xlarge has 0"),
    (f"{WORKER}.node_config.ImageId", None, "ImageId: nothing where a string is expected"),
    (f"{HEAD}.node_config.InstanceMarketOptions", {"MarketType": "spot"}, "without it the cluster is lost"),
    (f"{HEAD}.node_config.InstanceMarketOptions", {}, "without it the cluster is lost"),
    ("provider.project_id", "a", "provider.project_id: no such key"),
]
ON_GCP = [
    (f"{WORKER}.node_config.machine_type", "g2-standard-8", "no such key; did you mean machineType?"),
    (f"{WORKER}.node_config.InstanceType", "g6.xlarge", "InstanceType: no such key"),
    (f"{WORKER}.node_config.acceleratorType", "v4-8", "acceleratorType: no such key"),
    (
        f"{WORKER}.node_config.disks.0.autodelete",
        True,
        "disks[0].autodelete: no such key; did you mean autoDelete?",
    ),
    (f"{WORKER}.node_config.disks.0.boot", "yes", "disks[0].boot: 'yes' where a boolean is expected"),
    (f"{WORKER}.node_config.scheduling.provisioningModel", "spot", "'spot' where one of FLEX_START, "),
    (f"{WORKER}.node_config.scheduling", {}, "onHostMaintenance: machines with GPUs cannot migrate"),
    (f"{WORKER}.node_config.scheduling", [{"preemptable": True}], "did you mean preemptible?"),
    (f"{WORKER}.node_config.serviceAccounts", [{"mail": "a"}], "serviceAccounts[0].mail: no such key"),
    (f"{WORKER}.node_config.metadata", {"items": [{"key": "a", "valeu": "b"}]}, "did you mean value?"),
    (f"{WORKER}.node_config.labels", {"team": True}, "labels.team: true where a string is expected"),
    (
        f"{WORKER}.node_config.tags",
        ["ray"],
        "tags: ['ray'] where a mapping with fingerprint, items is expected",
    ),
    (f"{WORKER}.node_config.networkInterfaces", [{"subnet": "a"}], "did you mean subnetwork?"),
    (
        f"{WORKER}.node_config.guestAccelerators",
        [{"acceleratorType": "nvidia-tesla-t4", "acceleratorCount": 2}],
        "resources.GPU: 1, and a g2-standard-8 has 2",
    ),
    (f"{WORKER}.node_config.machineType", "n2-standard-8", "resources.GPU: 1, and a n2-standard-8 has 0"),
    (f"{WORKER}.node_config.machineType", REMOVED, "machineType: is missing"),
    (f"{HEAD}.node_config.scheduling", {"preemptible": True}, "without it the cluster is lost"),
    (f"{HEAD}.node_config.scheduling", [{"provisioningModel": "SPOT"}], "without it the cluster is lost"),
    ("provider.project_id", REMOVED, "provider.project_id: is missing"),
    ("provider.security_group", {}, "provider.security_group: no such key"),
]


@pytest.mark.parametrize(
    ("file", "path", "value", "expected"),
    [
        *((AWS, *case) for case in ANYWHERE + ON_AWS),
        *((GCP, *case) for case in ANYWHERE + ON_GCP),
    ],
)
def test_a_mistake_is_reported(file: Any, path: str, value: Any, expected: str) -> None:
    cluster = load(file)
    change(cluster, path, value)
    problems, _ = check(cluster)
    assert any(expected in line for line in problems), problems
    assert all("\n" not in line for line in problems)


def test_all_mistakes_are_reported_at_once() -> None:
    cluster = load(AWS)
    for path, value in (
        ("max_wokers", 1),
        (f"{WORKER}.node_config.InstanceTyp", "g6.xlarge"),
        (f"{WORKER}.resources.GPU", 4),
        (f"{HEAD}.resources.CPU", 8),
        ("worker_start_ray_commands", ["ray start"]),
    ):
        change(cluster, path, value)
    assert len(check(cluster)[0]) == 5


@pytest.mark.parametrize(
    "file", [pytest.param(AWS, id="aws"), pytest.param(GCP, id="gcp", marks=pytest.mark.slow)]
)
def test_a_value_of_another_kind_at_any_place_is_no_traceback(file: Path) -> None:
    # A dot would be a step of the path
    places = [path for path in paths(load(file)) if "~" not in path]
    assert len(places) > 60
    for path in places:
        for value in OF_ANY_KIND:
            cluster = load(file)
            change(cluster, path, value)
            check(cluster)


def test_ray_refuses_more_nodes_than_the_cluster_may_have() -> None:
    cluster = load(AWS)
    change(cluster, "available_node_types.other", load(AWS)["available_node_types"]["gpu_worker"])
    for name in ("gpu_worker", "other"):
        change(cluster, f"available_node_types.{name}.min_workers", 3)
    (problem,) = check(cluster)[0]
    assert problem.startswith("Ray refuses the file: ")
    assert "`max_workers` is smaller than the sum of `min_workers`" in problem


def test_scheduling_may_be_a_list_of_one_as_in_rays_examples() -> None:
    cluster = load(GCP)
    change(cluster, f"{WORKER}.node_config.scheduling", [{"preemptible": True}])
    assert check(cluster)[0] == []


def test_the_nodes_are_those_of_the_file() -> None:
    cluster = load(AWS)
    change(cluster, "max_workers", 3)
    _, nodes = check(cluster)
    assert nodes is not None
    assert str(nodes) == "gpu_worker: up to 3, 8 CPUs and 1 GPU each"
    assert nodes.head.cpus == 0
    assert nodes.mounts == ("/mnt/raydetr",)


@pytest.mark.parametrize(
    ("commands", "expected"),
    [
        (["sudo mount -t nfs a:/b /mnt/x"], ("/mnt/x",)),
        (["(mountpoint -q /x || sudo mount -t nfs a:/ /x) && sudo chown me /x"], ("/x",)),
        (["gcsfuse bucket /data/", "mount-s3 bucket /other"], ("/data", "/other")),
        (["mkdir /mnt/x", "echo 'mount a /b"], None),
    ],
)
def test_folders_that_setup_commands_mount(commands: list[str], expected: Any) -> None:
    cluster = load(AWS)
    change(cluster, "setup_commands", commands)
    _, nodes = check(cluster)
    assert nodes is not None
    assert nodes.mounts == expected
