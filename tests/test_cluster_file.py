"""Ray accepts ray_cluster.yaml, and it has none of the mistakes that Ray does not detect."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER_FILE = Path(__file__).parents[1] / "ray_cluster.yaml"

# The keys that Ray's AWS provider reads (its schema accepts any key), and the fields of EC2's RunInstances that a
# cluster can use (Ray adds SubnetIds). Below a key without a value everything is accepted.
KNOWN_KEYS: dict[str, Any] = yaml.safe_load("""
provider: {
  type, region, availability_zone, cache_stopped_nodes, use_internal_ips, use_external_head_ip,
  security_group, key_pair, aws_credentials, cloudwatch, disable_node_updaters}
node_config:
  BlockDeviceMappings:
    Ebs: {
      DeleteOnTermination, Encrypted, Iops, KmsKeyId, SnapshotId, Throughput, VolumeSize, VolumeType}
    DeviceName:
    NoDevice:
    VirtualName:
  CapacityReservationSpecification:
    CapacityReservationPreference:
    CapacityReservationTarget: {CapacityReservationId, CapacityReservationResourceGroupArn}
  CpuOptions: {CoreCount, ThreadsPerCore, AmdSevSnp}
  CreditSpecification: {CpuCredits}
  DisableApiTermination:
  EbsOptimized:
  IamInstanceProfile: {Arn, Name}
  ImageId:
  InstanceInitiatedShutdownBehavior:
  InstanceMarketOptions:
    MarketType:
    SpotOptions: {BlockDurationMinutes, InstanceInterruptionBehavior, MaxPrice, SpotInstanceType, ValidUntil}
  InstanceType:
  KeyName:
  LaunchTemplate: {LaunchTemplateId, LaunchTemplateName, Version}
  MetadataOptions: {
    HttpEndpoint, HttpProtocolIpv6, HttpPutResponseHopLimit, HttpTokens, InstanceMetadataTags}
  Monitoring: {Enabled}
  NetworkInterfaces:
  Placement: {
    Affinity, AvailabilityZone, GroupId, GroupName, HostId, HostResourceGroupArn, PartitionNumber,
    SpreadDomain, Tenancy}
  SecurityGroupIds:
  SubnetId:
  SubnetIds:
  TagSpecifications: {ResourceType, Tags}
  UserData:
""")


def problems(cluster: Mapping[str, Any]) -> list[str]:
    """The problems of a cluster file that Ray's own validation does not detect."""
    found = _unknown(cluster["provider"], KNOWN_KEYS["provider"], "provider")
    for name, node_type in cluster["available_node_types"].items():
        found += _problems_of_node_type(f"available_node_types.{name}", node_type, cluster["max_workers"])
    found += _problems_of_head(cluster["available_node_types"][cluster["head_node_type"]])
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in cluster[key]:
            found += _problems_of_starting(key, command)
    return found


def _problems_of_node_type(path: str, node_type: Mapping[str, Any], max_workers: int) -> list[str]:
    found = _unknown(node_type["node_config"], KNOWN_KEYS["node_config"], f"{path}.node_config")
    own = node_type.get("max_workers", 0)
    if own > max_workers:
        found.append(f"{path}.max_workers: {own} is out of reach: the cluster's is {max_workers}")
    return found


def _problems_of_head(head: Mapping[str, Any]) -> list[str]:
    found = []
    if head.get("resources", {}).get("CPU") != 0:
        found.append('the head has CPUs: resources: {"CPU": 0} keeps workers off it')
    if "InstanceMarketOptions" in head["node_config"]:
        found.append("the head is a spot instance: without it the cluster is lost")
    return found


def _problems_of_starting(key: str, command: str) -> list[str]:
    found = []
    if "ray start" in command and "RAY_AUTH_MODE=token " not in command:
        found.append(f"{key}: `ray start` without RAY_AUTH_MODE=token depends on the version of Ray")
    if "ray start --head" in command and "--dashboard-host=127.0.0.1" not in command:
        found.append(f"{key}: the dashboard executes commands of anyone: set --dashboard-host=127.0.0.1")
    return found


def _unknown(value: Any, known: Mapping[str, Any] | None, path: str) -> list[str]:
    """The keys in `value`, at any depth, that are not in the tree `known`."""
    if known is None:
        return []
    if isinstance(value, list):
        return [line for i, item in enumerate(value) for line in _unknown(item, known, f"{path}[{i}]")]
    if not isinstance(value, Mapping):
        return [f"{path}: {value!r} where {', '.join(known)} is expected"]
    found = []
    for key, below in value.items():
        if key in known:
            found += _unknown(below, known[key], f"{path}.{key}")
        else:
            found.append(f"{path}.{key}: no such key{_nearest(key, known)}")
    return found


def _nearest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


@pytest.fixture
def cluster() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(CLUSTER_FILE.read_text())
    return content


def test_ray_accepts_the_cluster_file(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    # Ray replaces a missing list with its defaults, which are for the environment of an old image
    assert prepared["head_setup_commands"] == cluster["setup_commands"] + cluster["head_setup_commands"]
    assert prepared["worker_setup_commands"] == cluster["setup_commands"]


def test_the_cluster_file_has_no_mistake_that_ray_does_not_detect(cluster: dict[str, Any]) -> None:
    assert problems(cluster) == []


def test_gpu_workers_scale_from_zero_and_are_spot_instances(cluster: dict[str, Any]) -> None:
    workers = {**cluster["available_node_types"]}
    del workers[cluster["head_node_type"]]
    assert workers
    for worker in workers.values():
        assert worker["min_workers"] == 0
        assert worker["max_workers"] >= 1
        assert worker["resources"]["GPU"] >= 1
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_every_node_installs_the_wheel_and_sees_the_shared_storage(cluster: dict[str, Any]) -> None:
    commands = " ".join(cluster["setup_commands"])
    assert "pip wheel -q --no-build-isolation" in commands
    assert "dist/raydetr-*.whl" in commands
    assert "mount -t nfs4" in commands
    assert "-c constraints.txt" in commands


def test_folders_that_are_copied_exist_in_the_checkout(cluster: dict[str, Any]) -> None:
    sources = [source for source in cluster["file_mounts"].values() if not source.startswith("~")]
    assert sources == ["."]
    assert all((CLUSTER_FILE.parent / name).exists() for name in cluster["rsync_filter"])


WORKER = "available_node_types.gpu_worker"
HEAD = "available_node_types.head"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("provider.regoin", "us-east-1", "provider.regoin: no such key; did you mean region?"),
        (f"{WORKER}.node_config.InstanceTyp", "g6.xlarge", "did you mean InstanceType?"),
        (f"{WORKER}.node_config.InstanceMarketOptions.MarketTyp", "spot", "did you mean MarketType?"),
        (
            f"{WORKER}.node_config.BlockDeviceMappings",
            [{"Ebs": {"Size": 1}}],
            "[0].Ebs.Size: no such key",
        ),
        (f"{WORKER}.node_config.IamInstanceProfile", "name", "'name' where Arn, Name is expected"),
        (f"{WORKER}.max_workers", 99, "max_workers: 99 is out of reach: the cluster's is 4"),
        (f"{HEAD}.resources.CPU", 8, "the head has CPUs"),
        (f"{HEAD}.resources", {}, "the head has CPUs"),
        (
            f"{HEAD}.node_config.InstanceMarketOptions",
            {"MarketType": "spot"},
            "without it the cluster is lost",
        ),
        (
            "worker_start_ray_commands",
            ["ray start --address=$RAY_HEAD_IP:6379"],
            "without RAY_AUTH",
        ),
        ("head_start_ray_commands", ["RAY_AUTH_MODE=token ray start --head"], "--dashboard-host=127.0.0.1"),
    ],
)
def test_a_mistake_that_ray_does_not_detect_is_reported(
    cluster: dict[str, Any], path: str, value: Any, expected: str
) -> None:
    *parents, last = path.split(".")
    node = cluster
    for key in parents:
        node = node[key]
    node[last] = value
    validate_config(prepare_config(copy.deepcopy(cluster)))
    (found,) = problems(cluster)
    assert expected in found
