"""Read what Ray gets of the pods of a KubeRay group: CPUs, GPUs, shared folders."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from raydetr.clusters.fields import mapping, sequence

# Volumes that pods on different nodes share; of the others, each pod has its own, or only reads it
_SHARED_VOLUMES = ("persistentVolumeClaim", "nfs", "csi", "cephfs", "glusterfs", "azureFile")


def mounts(group: Mapping[str, Any]) -> list[str]:
    """Return the folders of a group's Ray container that are on storage which pods share."""
    shared = [
        volume.get("name")
        for volume in map(mapping, sequence(pod(group).get("volumes")))
        if any(kind in volume for kind in _SHARED_VOLUMES)
    ]
    of_container = map(mapping, sequence(container(group).get("volumeMounts")))
    return [str(each.get("mountPath")).rstrip("/") for each in of_container if each.get("name") in shared]


def cpus(group: Mapping[str, Any]) -> int:
    """Return the CPUs that Ray schedules on a pod of the group."""
    own = declared(group, "num-cpus", "CPU")
    if own is not None:
        return own
    resources = mapping(container(group).get("resources"))
    value = mapping(resources.get("limits")).get("cpu", mapping(resources.get("requests")).get("cpu"))
    return _whole(value)


def gpus(group: Mapping[str, Any]) -> int:
    """Return the GPUs that Ray schedules on a pod of the group."""
    own = declared(group, "num-gpus", "GPU")
    return gpu_limit(group) if own is None else own


def gpu_limit(group: Mapping[str, Any]) -> int:
    """Return the GPUs that the container of the group has."""
    limits = mapping(mapping(container(group).get("resources")).get("limits"))
    return sum(_whole(value) for name, value in limits.items() if str(name).endswith("gpu"))


def declared(group: Mapping[str, Any], parameter: str, resource: str) -> int | None:
    """Return what the group declares to Ray; None if Ray takes it from the limits of the container."""
    parameters, resources = mapping(group.get("rayStartParams")), mapping(group.get("resources"))
    value = parameters.get(parameter, resources.get(resource))
    return int(value) if isinstance(value, str) and value.isdigit() else None


def _whole(quantity: Any) -> int:
    """Return a quantity of Kubernetes, such as 8, "8" or "7500m", rounded up as KubeRay does; 0 if it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", str(quantity))
    return math.ceil(float(found[1]) / (1000 if found[2] else 1)) if found else 0


def pod(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the spec of the group's pods."""
    return mapping(mapping(group.get("template")).get("spec"))


def container(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the container of Ray, the first one."""
    containers = sequence(pod(group).get("containers"))
    return mapping(containers[0]) if containers else {}
