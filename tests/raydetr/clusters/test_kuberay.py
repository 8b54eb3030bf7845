"""Mistakes in KubeRay manifests: against the CRD, what KubeRay refuses, and what keeps a run from going on."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from cluster_files import KUBERAY, OF_ANY_KIND, REMOVED, change, load, paths
from raydetr.clusters.kuberay import check, job_config
from raydetr.config import ConfigError

CLUSTER = "spec.rayClusterSpec"
HEAD = f"{CLUSTER}.headGroupSpec"
GROUP = f"{CLUSTER}.workerGroupSpecs.0"
POD = f"{GROUP}.template.spec"
TRAIN = "python jobs/train_detector.py quickstart"

MISTAKES = [
    # Fields of the CRD
    ("spec.entrypiont", "a", "spec.entrypiont: no such key; did you mean entrypoint?"),
    ("spec.backoffLimit", "3", "spec.backoffLimit: '3' where an integer is expected"),
    ("spec.shutdownAfterJobFinishes", 1, "spec.shutdownAfterJobFinishes: 1 where a boolean is expected"),
    ("spec.entrypointNumCpus", "1", "spec.entrypointNumCpus: '1' where a number is expected"),
    (f"{CLUSTER}.workerGroupSpec", [], "workerGroupSpec: no such key; did you mean workerGroupSpecs?"),
    (
        f"{CLUSTER}.authOptions.mode",
        "tokens",
        "'tokens' where one of disabled, token is expected; did you mean token?",
    ),
    (f"{CLUSTER}.autoscalerOptions.version", "v3", "'v3' where one of v1, v2 is expected"),
    (f"{CLUSTER}.headGroupSpec", REMOVED, "spec.rayClusterSpec.headGroupSpec: is missing"),
    (f"{HEAD}.template", REMOVED, "headGroupSpec.template: is missing"),
    (
        f"{HEAD}.rayStartParams.num-cpus",
        0,
        "rayStartParams.num-cpus: 0 where a string is expected; put it in quotes",
    ),
    (f"{HEAD}.template.spec.containers", {}, "containers: {} where a list is expected"),
    (f"{HEAD}.template.spec.container", [], "did you mean containers?"),
    (f"{GROUP}.groupName", REMOVED, "workerGroupSpecs[0].groupName: is missing"),
    (f"{GROUP}.maxReplica", 1, "workerGroupSpecs[0].maxReplica: no such key; did you mean maxReplicas?"),
    (f"{POD}.containers.0.name", REMOVED, "containers[0].name: is missing"),
    (f"{POD}.containers.0.resource", {}, "did you mean resources?"),
    (f"{POD}.containers.0.resources.limits.memory", True, "limits.memory: true where a quantity is expected"),
    (f"{POD}.containers.0.env", {"A": "b"}, "env: {'A': 'b'} where a list is expected"),
    (f"{POD}.containers.0.env", [{"name": "A", "value": 1}], "env[0].value: 1 where a string is expected"),
    (f"{POD}.containers.0.volumeMounts.0.path", "/a", "volumeMounts[0].path: no such key"),
    (f"{POD}.volumes.0.persistentVolumeClaim", {"name": "a"}, "persistentVolumeClaim.claimName: is missing"),
    (f"{POD}.volumes.1.emptyDir.meduim", "Memory", "emptyDir.meduim: no such key; did you mean medium?"),
    (f"{POD}.nodeSelector", ["gpu"], "nodeSelector: ['gpu'] where a mapping is expected"),
    (f"{POD}.tolerations.0.efect", "NoSchedule", "tolerations[0].efect: no such key; did you mean effect?"),
    # What KubeRay refuses
    ("metadata.name", REMOVED, "metadata.name: is missing"),
    ("metadata.name", "a" * 48, "where at most 47 lower-case letters"),
    ("metadata.name", "1run", "a letter first"),
    ("metadata.name", "my_run", "metadata.name: 'my_run' where"),
    ("spec.submissionMode", "K8sJob", "'K8sJob' where one of K8sJobMode, "),
    ("spec.submissionMode", "InteractiveMode", "KubeRay refuses it with submissionMode: InteractiveMode"),
    ("spec.clusterSelector", {"ray.io/cluster": "a"}, "KubeRay refuses it with clusterSelector"),
    ("spec.backoffLimit", -1, "spec.backoffLimit: -1 where a number of retries"),
    ("spec.rayClusterSpec", REMOVED, "spec.rayClusterSpec: is missing, and so is clusterSelector"),
    ("spec.entrypoint", REMOVED, "spec.entrypoint: is missing"),
    ("spec", REMOVED, "spec: is missing"),
    (f"{CLUSTER}.rayVersion", "2.40.0", "rayVersion: 2.40.0 has no tokens: 2.52 or newer"),
    (f"{CLUSTER}.rayVersion", REMOVED, "rayVersion: is missing or no version"),
    (f"{HEAD}.template.spec.containers", [], "containers: is empty"),
    (f"{GROUP}.minReplicas", 5, "minReplicas: 5 is more than maxReplicas, 4"),
    (f"{GROUP}.minReplicas", -1, "minReplicas: -1 is negative"),
    (f"{GROUP}.replicas", 9, "replicas: 9 is not between minReplicas, 0, and maxReplicas, 4"),
    (
        f"{POD}.containers.0.volumeMounts.0.name",
        "storrage",
        "storrage is no volume of the pod; did you mean storage?",
    ),
    # What keeps a run from going on
    (f"{CLUSTER}.authOptions", REMOVED, "authOptions.mode: without a token any pod can run commands"),
    (f"{CLUSTER}.authOptions.mode", "disabled", "authOptions.mode: without a token any pod can run commands"),
    (f"{HEAD}.rayStartParams", {}, "the head has CPUs"),
    (
        f"{HEAD}.template.spec.nodeSelector",
        {"cloud.google.com/gke-spot": "true"},
        "the head is on a spot instance",
    ),
    (
        f"{HEAD}.template.spec.nodeSelector",
        {"eks.amazonaws.com/capacityType": "SPOT"},
        "the head is on a spot",
    ),
    (
        f"{GROUP}.rayStartParams",
        {"num-gpus": "2"},
        "num-gpus: 2, and the limit nvidia.com/gpu of the container is 1",
    ),
    ("spec.entrypoint", f"{TRAIN} --or-resume", "spec.entrypoint: without --name NAME a retry"),
    ("spec.entrypoint", f"{TRAIN} --name a", "spec.entrypoint: without --or-resume a retry"),
    (
        "spec.entrypoint",
        "raydetr train quickstart",
        "spec.entrypoint: without --name NAME --or-resume a retry",
    ),
]


@pytest.mark.parametrize(("path", "value", "expected"), MISTAKES)
def test_a_mistake_is_reported(path: str, value: Any, expected: str) -> None:
    job = load(KUBERAY)
    change(job, path, value)
    problems, _ = check(job)
    assert any(expected in line for line in problems), problems
    assert all("\n" not in line for line in problems)


def test_all_mistakes_are_reported_at_once() -> None:
    job = load(KUBERAY)
    for path, value in (
        ("metadata.name", "A"),
        ("spec.entrypiont", "a"),
        (f"{HEAD}.rayStartParams", {}),
        (f"{POD}.volumes.1.emptyDir.meduim", "Memory"),
        (f"{GROUP}.minReplicas", 5),
    ):
        change(job, path, value)
    assert len(check(job)[0]) == 5


def test_replicas_have_limits_without_the_autoscaler() -> None:
    job = load(KUBERAY)
    change(job, f"{CLUSTER}.enableInTreeAutoscaling", False)
    assert check(job)[0] == []
    for name in ("minReplicas", "maxReplicas"):
        change(job, f"{GROUP}.{name}", REMOVED)
    assert [line.partition(":")[0].rpartition(".")[2] for line in check(job)[0]] == [
        "minReplicas",
        "maxReplicas",
    ]


def test_null_is_absent_as_for_kubernetes() -> None:
    job = load(KUBERAY)
    change(job, f"{GROUP}.template.metadata", {"creationTimestamp": None})
    change(job, f"{POD}.nodeSelector", None)
    assert check(job)[0] == []
    change(job, f"{GROUP}.groupName", None)
    assert check(job)[0] == ["spec.rayClusterSpec.workerGroupSpecs[0].groupName: is missing"]


def test_a_raycluster_has_the_same_fields() -> None:
    job = load(KUBERAY)
    cluster = {**job, "kind": "RayCluster", "spec": job["spec"]["rayClusterSpec"]}
    problems, nodes = check(cluster)
    assert problems == []
    assert str(nodes) == "gpu-worker: up to 4, 7 CPUs and 1 GPU each"
    change(cluster, "spec.entrypoint", "a")
    change(cluster, "metadata.name", "a" * 50)
    assert check(cluster)[0] == ["spec.entrypoint: no such key"]


@pytest.mark.slow
def test_a_value_of_another_kind_at_any_place_is_no_traceback() -> None:
    # A dot would be a step of the path
    places = [path for path in paths(load(KUBERAY)) if "nvidia" not in path and path != "kind"]
    assert len(places) > 80
    for path in places:
        for value in OF_ANY_KIND:
            job = load(KUBERAY)
            change(job, path, value)
            check(job)
            with suppress(ConfigError):
                job_config(job)


# --- The nodes ---


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (f"{POD}.containers.0.resources.limits.cpu", "7500m", "8 CPUs and 1 GPU"),
        (f"{POD}.containers.0.resources.limits.cpu", 2.5, "3 CPUs and 1 GPU"),
        (f"{POD}.containers.0.resources.limits.cpu", REMOVED, "7 CPUs and 1 GPU"),  # the request
        (f"{POD}.containers.0.resources.limits", {"cpu": 1, "amd.com/gpu": 2}, "1 CPU and 2 GPUs"),
        (f"{POD}.containers.0.resources", {}, "0 CPUs each"),
        (f"{GROUP}.rayStartParams", {"num-cpus": "3"}, "3 CPUs and 1 GPU"),
        (f"{GROUP}.maxReplicas", 2, "up to 2, "),
        (f"{CLUSTER}.enableInTreeAutoscaling", False, "up to 0, "),
    ],
)
def test_the_nodes_are_those_of_the_manifest(path: str, value: Any, expected: str) -> None:
    job = load(KUBERAY)
    change(job, path, value)
    assert expected in str(check(job)[1])


def test_folders_that_all_pods_share() -> None:
    job = load(KUBERAY)
    nodes = check(job)[1]
    assert nodes is not None
    assert nodes.mounts == ("/mnt/raydetr",)  # and not /dev/shm
    change(job, f"{HEAD}.template.spec.containers.0.volumeMounts", [])
    nodes = check(job)[1]
    assert nodes is not None
    assert nodes.mounts == ()


# --- The configuration of the job ---


def _job(entrypoint: Any) -> dict[str, Any]:
    return {"kind": "RayJob", "spec": {"entrypoint": entrypoint}}


@pytest.mark.parametrize(
    "entrypoint",
    [
        f"{TRAIN} optim.lr=1e-3 --name a --or-resume",
        "raydetr train --name a quickstart optim.lr=1e-3",
        "cd x && .venv/bin/raydetr train --or-resume quickstart --name=a optim.lr=1e-3",
    ],
)
def test_the_entrypoint_names_a_recipe_and_overrides(entrypoint: str) -> None:
    config = job_config(_job(entrypoint))
    assert config is not None
    assert (config.recipe, config.optim.lr) == ("quickstart", 1e-3)


@pytest.mark.parametrize(
    "entrypoint",
    [
        "raydetr train --config a.yaml optim.lr=1",
        "raydetr train --resume runs/a optim.lr=1",
        "raydetr tune quickstart",
        "python a.py",
        "echo 'a",
        None,
        3,
    ],
)
def test_another_entrypoint_names_none(entrypoint: Any) -> None:
    assert job_config(_job(entrypoint)) is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("quickstrat", "spec.entrypoint: .*quickstart"),
        ("quickstart optim.rl=1", "spec.entrypoint: optim.rl.*optim.lr"),
    ],
)
def test_a_mistake_in_the_entrypoint_is_an_error(arguments: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        job_config(_job(f"raydetr train {arguments}"))
