"""Check KubeRay manifests: the fields of the CRD, what KubeRay refuses, and what keeps a run from going on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from raydetr import config as configuration
from raydetr import recipes
from raydetr.clusters import fields, pods
from raydetr.clusters.fields import integer, mapping, sequence
from raydetr.clusters.nodes import Nodes, NodeType
from raydetr.config import ConfigError, RunConfig, nearest

KINDS = {"RayJob": 47, "RayCluster": 53}  # with the largest number of characters of a name
API_VERSION = "ray.io/v1"
RAY_WITH_TOKENS = (2, 52)
UNLIMITED = 2**31 - 1  # KubeRay's default of maxReplicas

_SPOT_LABELS = {
    "cloud.google.com/gke-spot": "true",
    "cloud.google.com/gke-preemptible": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


def check(manifest: Mapping[str, Any]) -> tuple[list[str], Nodes | None]:
    """Return the problems of a RayJob or RayCluster, a line each, and its nodes if it has some."""
    kind = manifest["kind"]
    manifest = _without_nulls(manifest)
    known = fields.load("kuberay")
    spec, path = mapping(manifest.get("spec")), "spec"
    found = _metadata_problems(manifest.get("metadata"), kind)
    if kind == "RayCluster":
        # The spec of a RayCluster is the rayClusterSpec of a RayJob
        known = {**known, "spec": known["spec"]["rayClusterSpec"]}
        found += fields.mismatches(manifest, known, "")
        cluster = spec
    else:
        found += fields.mismatches(manifest, known, "") + _job_problems(spec)
        cluster, path = mapping(spec.get("rayClusterSpec")), "spec.rayClusterSpec"
    if not cluster:
        return found + ([] if spec else ["spec: is missing"]), None
    return found + _cluster_problems(cluster, path), _nodes(cluster)


def job_config(manifest: Mapping[str, Any]) -> RunConfig | None:
    """Return the configuration that the entrypoint of a RayJob trains; None if it trains none by a recipe.

    Raises:
        ConfigError: the recipe does not exist, or an override does not fit.
    """
    words = _training_arguments(mapping(manifest.get("spec")).get("entrypoint"))
    if any(word.startswith(("--config", "--resume")) for word in words):
        return None
    values_of_name = [place + 1 for place, word in enumerate(words) if word == "--name"]
    named = [
        word for place, word in enumerate(words) if not word.startswith("-") and place not in values_of_name
    ]
    if not named or "=" in named[0]:
        return None
    try:
        assignments = configuration.parse_assignments(named[1:])
        return configuration.override(recipes.find(named[0]), assignments)
    except ConfigError as error:
        raise ConfigError(f"spec.entrypoint: {error}") from None


# --- RayJob ---


def _metadata_problems(metadata: Any, kind: str) -> list[str]:
    name = mapping(metadata).get("name")
    longest = KINDS[kind]
    if name is None:
        return ["metadata.name: is missing: retries and commands need it"]
    if isinstance(name, str) and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= longest:
        return []
    return [
        f"metadata.name: {fields.show(name)} where at most {longest} lower-case letters, digits and hyphens are "
        "expected, a letter first"
    ]


def _job_problems(spec: Mapping[str, Any]) -> list[str]:
    found = []
    retries = integer(spec, "backoffLimit", 0)
    if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
        found.append("spec.rayClusterSpec: is missing, and so is clusterSelector: give one")
    modes = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    mode = spec.get("submissionMode", modes[0])
    if isinstance(mode, str) and mode not in modes:
        hint = nearest(mode, modes)
        found.append(f"spec.submissionMode: {mode!r} where one of {', '.join(modes)} is expected{hint}")
    if retries < 0:
        found.append(f"spec.backoffLimit: {retries} where a number of retries is expected")
    for other, is_set in (
        ("clusterSelector", bool(spec.get("clusterSelector"))),
        ("submissionMode: InteractiveMode", mode == "InteractiveMode"),
    ):
        if retries > 0 and is_set:
            found.append(f"spec.backoffLimit: KubeRay refuses it with {other}: remove one")
    if "entrypoint" not in spec and mode != "InteractiveMode":
        found.append("spec.entrypoint: is missing: give the command of the job")
    return found + _entrypoint_problems(spec.get("entrypoint"), retries)


def _entrypoint_problems(entrypoint: Any, retries: int) -> list[str]:
    """Check that a retry goes on with the run: it is a new driver on a new cluster."""
    words = _training_arguments(entrypoint)
    if not words or retries <= 0:
        return []
    has_name = any(word.split("=")[0] == "--name" for word in words)
    missing = [] if has_name else ["--name NAME"]
    missing += [] if "--or-resume" in words else ["--or-resume"]
    if not missing:
        return []
    return [
        f"spec.entrypoint: without {' '.join(missing)} a retry (spec.backoffLimit: {retries}) does not go on with "
        "the run that was interrupted: add it"
    ]


def _training_arguments(entrypoint: Any) -> list[str]:
    """Return the arguments of `raydetr train` or `jobs/train_detector.py` in a command; none for other commands."""
    try:
        words = shlex.split(entrypoint) if isinstance(entrypoint, str) else []
    except ValueError:  # a quote that does not end
        return []
    for place, word in enumerate(words):
        if word.endswith("train_detector.py"):
            return words[place + 1 :]
        if word == "train" and place > 0 and words[place - 1].endswith("raydetr"):
            return words[place + 1 :]
    return []


# --- The cluster ---


def _cluster_problems(cluster: Mapping[str, Any], path: str) -> list[str]:
    found = _token_problems(cluster, path)
    head = mapping(cluster.get("headGroupSpec"))
    if head:
        found += _head_problems(head, f"{path}.headGroupSpec")
    autoscales = cluster.get("enableInTreeAutoscaling") is True
    for place, group in enumerate(_groups(cluster)):
        found += _group_problems(group, f"{path}.workerGroupSpecs[{place}]", autoscales=autoscales)
    return found


def _token_problems(cluster: Mapping[str, Any], path: str) -> list[str]:
    if mapping(cluster.get("authOptions")).get("mode") != "token":
        return [f"{path}.authOptions.mode: without a token any pod can run commands: set mode: token"]
    text = cluster.get("rayVersion")
    version = re.match(r"(\d+)\.(\d+)", text) if isinstance(text, str) else None
    if version is None:
        return [f"{path}.rayVersion: is missing or no version: tokens need it"]
    if (int(version[1]), int(version[2])) < RAY_WITH_TOKENS:
        return [f"{path}.rayVersion: {text} has no tokens: 2.52 or newer is needed"]
    return []


def _head_problems(head: Mapping[str, Any], path: str) -> list[str]:
    found = _container_problems(head, path)
    if pods.cpus(head) != 0:
        found.append(f'{path}.rayStartParams.num-cpus: the head has CPUs: num-cpus: "0" keeps workers off it')
    selector = mapping(pods.pod(head).get("nodeSelector"))
    for label, value in _SPOT_LABELS.items():
        if selector.get(label) == value:
            found.append(
                f"{path}.template.spec.nodeSelector.{label}: the head is on a spot instance: without it the cluster "
                "is lost; remove this"
            )
    return found


def _group_problems(group: Mapping[str, Any], path: str, *, autoscales: bool) -> list[str]:
    found = _container_problems(group, path)
    least, most = integer(group, "minReplicas", 0), integer(group, "maxReplicas", UNLIMITED)
    if not autoscales:
        found += [
            f"{path}.{name}: is missing: without enableInTreeAutoscaling KubeRay requires it"
            for name in ("minReplicas", "maxReplicas")
            if name not in group
        ]
    found += [
        f"{path}.{name}: {group[name]} is negative"
        for name in ("minReplicas", "maxReplicas", "replicas")
        if integer(group, name, 0) < 0
    ]
    if least > most:
        found.append(f"{path}.minReplicas: {least} is more than maxReplicas, {most}")
    replicas = integer(group, "replicas", least)
    if least <= most and not least <= replicas <= most:
        found.append(
            f"{path}.replicas: {replicas} is not between minReplicas, {least}, and maxReplicas, {most}"
        )
    declared, limit = pods.declared(group, "num-gpus", "GPU"), pods.gpu_limit(group)
    if declared is not None and declared != limit:
        found.append(
            f"{path}.rayStartParams.num-gpus: {declared}, and the limit nvidia.com/gpu of the container is "
            f"{limit}: remove num-gpus, Ray takes the limit"
        )
    return found


def _container_problems(group: Mapping[str, Any], path: str) -> list[str]:
    pod = pods.pod(group)
    found = []
    if not sequence(pod.get("containers")):
        found.append(f"{path}.template.spec.containers: is empty: the first container is that of Ray")
    volumes = [mapping(volume).get("name") for volume in sequence(pod.get("volumes"))]
    for place, mount in enumerate(sequence(pods.container(group).get("volumeMounts"))):
        name = mapping(mount).get("name")
        if isinstance(name, str) and name not in volumes:
            hint = nearest(name, [each for each in volumes if isinstance(each, str)])
            found.append(
                f"{path}.template.spec.containers[0].volumeMounts[{place}].name: {name} is no volume of the pod{hint}"
            )
    return found


def _nodes(cluster: Mapping[str, Any]) -> Nodes | None:
    head, groups = mapping(cluster.get("headGroupSpec")), _groups(cluster)
    if not head:
        return None
    autoscales = cluster.get("enableInTreeAutoscaling") is True
    workers = tuple(
        NodeType(
            str(group.get("groupName", f"workerGroupSpecs[{place}]")),
            cpus=pods.cpus(group),
            gpus=pods.gpus(group),
            max_nodes=integer(group, "maxReplicas", UNLIMITED)
            if autoscales
            else integer(group, "replicas", 0),
        )
        for place, group in enumerate(groups)
    )
    mounts = [pods.mounts(each) for each in (head, *groups)]
    shared = tuple(path for path in mounts[0] if all(path in others for others in mounts[1:]))
    total = sum(each.max_nodes for each in workers)
    return Nodes(NodeType("head", pods.cpus(head), pods.gpus(head), 1), workers, total, shared)


# --- Parts of the manifest ---


def _without_nulls(value: Any) -> Any:
    """Return the value without fields that are null, which Kubernetes takes as absent."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(below) for key, below in value.items() if below is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _groups(cluster: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [mapping(group) for group in sequence(cluster.get("workerGroupSpecs"))]
