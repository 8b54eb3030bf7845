"""Check a cluster file of `ray up` for AWS or GCP, also for mistakes that Ray accepts."""

from __future__ import annotations

import copy
import logging
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
from ray.autoscaler._private.util import prepare_config, validate_config

from raydetr.clusters import fields, machines
from raydetr.clusters.fields import integer, mapping, sequence
from raydetr.clusters.nodes import Nodes, NodeType
from raydetr.config import nearest

RAY_MAX_WORKERS = 2  # what Ray takes if max_workers is missing
TOKEN_FILE = "~/.ray/auth_token"
_MOUNTING = ("mount", "gcsfuse", "mount-s3", "s3fs")
_SPOT = "the head is a spot instance: without it the cluster is lost; remove this"


def check(cluster: Mapping[str, Any]) -> tuple[list[str], Nodes | None]:
    """Return the problems of a cluster file, a line each, and its nodes if they can be told."""
    shape = fields.mismatches(cluster, fields.load("ray_up"), "")
    found = shape + _provider_problems(mapping(cluster.get("provider")), cluster)
    found += [] if shape else _ray_problems(cluster)
    for name, node_type in _node_types(cluster).items():
        found += _node_type_problems(f"available_node_types.{name}", node_type, cluster)
    found += _head_problems(cluster)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in _texts(cluster.get(key)):
            found += _start_problems(key, command)
    found += _token_problems(cluster)
    return found, _nodes(cluster)


def _ray_problems(cluster: Mapping[str, Any]) -> list[str]:
    """Return what Ray's own validation finds: it stops at the first problem."""
    logging.getLogger(prepare_config.__module__).setLevel(logging.WARNING)
    try:
        validate_config(prepare_config(copy.deepcopy(dict(cluster))))
    except jsonschema.ValidationError as error:
        path = ".".join(str(key) for key in error.absolute_path)
        return [f"{path or 'the file'}: Ray refuses it: {error.message}"]
    except (ValueError, RuntimeError, AssertionError) as error:
        return [f"Ray refuses the file: {' '.join(str(error).split())}"]
    return []


def _provider_problems(provider: Mapping[str, Any], cluster: Mapping[str, Any]) -> list[str]:
    kind = provider.get("type")
    if kind not in ("aws", "gcp"):
        return []  # the fields of `ray_up` say so
    known = fields.load(kind)
    found = fields.mismatches(provider, known["provider"], "provider")
    for name, node_type in _node_types(cluster).items():
        if "node_config" in node_type:  # else the fields of `ray_up` say so
            config = _node_config(node_type) or node_type["node_config"]
            path = f"available_node_types.{name}.node_config"
            found += fields.mismatches(config, known["node_config"], path)
    region, zones = provider.get("region"), provider.get("availability_zone")
    if isinstance(region, str) and isinstance(zones, str):
        outside = [zone.strip() for zone in zones.split(",") if not zone.strip().startswith(region)]
        found += [f"provider.availability_zone: {zone} is not in the region {region}" for zone in outside]
    return found


def _node_type_problems(path: str, node_type: Mapping[str, Any], cluster: Mapping[str, Any]) -> list[str]:
    found = []
    least, most, limit = (
        integer(node_type, "min_workers", 0),
        integer(node_type, "max_workers", 0),
        _limit(cluster),
    )
    if most > limit:
        found.append(
            f"{path}.max_workers: {most} is out of reach: the cluster's max_workers is {limit}; raise that one"
        )
    if "max_workers" in node_type and least > most:
        found.append(f"{path}.min_workers: {least} is more than its max_workers, {most}")
    return found + _resource_problems(path, node_type, cluster)


def _resource_problems(path: str, node_type: Mapping[str, Any], cluster: Mapping[str, Any]) -> list[str]:
    """Compare the declared resources with those of the machine: Ray believes the declaration."""
    resources, config = mapping(node_type.get("resources")), _node_config(node_type)
    if mapping(cluster.get("provider")).get("type") == "gcp":
        machine = str(config.get("machineType", "")).rpartition("/")[2]
        cpus, gpus = machines.gcp_cpus(config), machines.gcp_gpus(config)
    else:
        machine = str(config.get("InstanceType", ""))
        cpus, gpus = machines.aws_cpus(machine), machines.aws_gpus(machine)
    found = []
    declared = integer(resources, "GPU", 0)
    if gpus is not None and declared != gpus:
        found.append(f"{path}.resources.GPU: {declared}, and a {machine} has {gpus}: declare what it has")
    declared = integer(resources, "CPU", 0)
    if cpus is not None and declared > cpus:
        found.append(f"{path}.resources.CPU: {declared}, and a {machine} has {cpus}: declare {cpus} or fewer")
    scheduling = mapping(config.get("scheduling"))
    migrates = (
        scheduling.get("onHostMaintenance", "TERMINATE" if _is_spot(config) else "MIGRATE") != "TERMINATE"
    )
    if "machineType" in config and gpus and migrates:
        found.append(
            f"{path}.node_config.scheduling.onHostMaintenance: machines with GPUs cannot migrate: set TERMINATE"
        )
    return found


def _head_problems(cluster: Mapping[str, Any]) -> list[str]:
    name, node_types = cluster.get("head_node_type"), _node_types(cluster)
    if not isinstance(name, str) or not isinstance(cluster.get("available_node_types"), Mapping):
        return []  # the fields of `ray_up` say so
    if name not in node_types:
        hint = nearest(name, node_types)
        return [f"head_node_type: {name} is none of available_node_types{hint}"]
    head, path = node_types[name], f"available_node_types.{name}"
    found = []
    if mapping(head.get("resources")).get("CPU") != 0:
        found.append(f'{path}.resources.CPU: the head has CPUs: {{"CPU": 0}} keeps workers off it')
    config = _node_config(head)
    if _is_spot(config):
        where = "InstanceMarketOptions" if "InstanceMarketOptions" in config else "scheduling"
        found.append(f"{path}.node_config.{where}: {_SPOT}")
    return found


def _start_problems(key: str, command: str) -> list[str]:
    found = []
    if re.search(r"\bray start\b", command) and not re.search(r"\bRAY_AUTH_MODE=token\b", command):
        found.append(
            f"{key}: `ray start` without RAY_AUTH_MODE=token depends on the version of Ray: write "
            "RAY_AUTH_MODE=token ray start"
        )
    is_head = re.search(r"\bray start\b.*--head\b", command, re.DOTALL)
    if is_head and not re.search(r"--dashboard-host[= ](127\.0\.0\.1|localhost)\b", command):
        found.append(f"{key}: the dashboard executes commands of anyone: set --dashboard-host=127.0.0.1")
    return found


def _token_problems(cluster: Mapping[str, Any]) -> list[str]:
    starts = " ".join(
        _texts(cluster.get("head_start_ray_commands")) + _texts(cluster.get("worker_start_ray_commands"))
    )
    if TOKEN_FILE in mapping(cluster.get("file_mounts")) or "RAY_AUTH_TOKEN" in starts:
        return []
    return [f'file_mounts: no node has the token of the cluster: add "{TOKEN_FILE}": "{TOKEN_FILE}"']


# --- The nodes ---


def _nodes(cluster: Mapping[str, Any]) -> Nodes | None:
    node_types, head = _node_types(cluster), cluster.get("head_node_type")
    if not isinstance(head, str) or head not in node_types:
        return None
    limit = _limit(cluster)
    described = {
        name: NodeType(
            name,
            cpus=integer(mapping(each.get("resources")), "CPU", 0),
            gpus=integer(mapping(each.get("resources")), "GPU", 0),
            max_nodes=1 if name == head else min(limit, integer(each, "max_workers", limit)),
        )
        for name, each in node_types.items()
    }
    workers = tuple(each for name, each in described.items() if name != head)
    return Nodes(described[head], workers, limit, _mounts(cluster))


def _mounts(cluster: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the folders that the commands for every node mount; None if there is none that can be told."""
    commands = _texts(cluster.get("initialization_commands")) + _texts(cluster.get("setup_commands"))
    found = [folder for command in commands for folder in _mounted_by(command)]
    return tuple(dict.fromkeys(found)) or None


def _mounted_by(command: str) -> Iterator[str]:
    for part in re.split(r"&&|\|\||[;()\n]", command):
        try:
            words = shlex.split(part)
        except ValueError:  # a quote that another part closes: no plain mount
            continue
        words = words[1:] if words[:1] == ["sudo"] else words
        if words and words[0] in _MOUNTING and words[-1].startswith("/"):
            yield words[-1].rstrip("/")


# --- Parts of the file ---


def _node_types(cluster: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    node_types = mapping(cluster.get("available_node_types"))
    return {str(name): mapping(each) for name, each in node_types.items()}


def _node_config(node_type: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the node_config. Ray's examples for GCP write `scheduling` as a list of one mapping."""
    config = mapping(node_type.get("node_config"))
    scheduling = config.get("scheduling")
    if isinstance(scheduling, list) and len(scheduling) == 1:
        return {**config, "scheduling": scheduling[0]}
    return config


def _is_spot(config: Mapping[str, Any]) -> bool:
    scheduling = mapping(config.get("scheduling"))
    market = config.get("InstanceMarketOptions")
    return (
        (market is not None and mapping(market).get("MarketType", "spot") == "spot")
        or scheduling.get("preemptible") is True
        or scheduling.get("provisioningModel") == "SPOT"
    )


def _limit(cluster: Mapping[str, Any]) -> int:
    return integer(cluster, "max_workers", RAY_MAX_WORKERS)


def _texts(value: Any) -> list[str]:
    return [each for each in sequence(value) if isinstance(each, str)]
