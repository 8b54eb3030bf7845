"""The cluster files of the repository have no mistakes, and do what their comments say."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster_files import AWS, GCP, KUBERAY, ROOT, load
from raydetr import recipes
from raydetr.clusters import kuberay
from raydetr.clusters.check import check_file
from raydetr.config import override

ON_SHARED_STORAGE = {
    "cluster.num_workers": 4,
    "data.train": "/mnt/raydetr/shards/train",
    "data.val": "/mnt/raydetr/shards/val",
    "model.backbone.weights": "/mnt/raydetr/resnet50.pth",
    "storage.path": "/mnt/raydetr/runs",
    "tracking.uri": "http://10.0.0.1:5000",
}
of_ray_up = pytest.mark.parametrize("file", [AWS, GCP], ids=["aws", "gcp"])


def test_all_cluster_files_are_known_here() -> None:
    found = {ROOT / "ray_cluster.yaml", *(ROOT / "clusters").iterdir()}
    assert found == {AWS, GCP, KUBERAY}


@pytest.mark.parametrize("file", [AWS, GCP, KUBERAY], ids=["aws", "gcp", "kuberay"])
def test_a_cluster_file_has_no_problem(file: Path) -> None:
    report = check_file(file)
    assert report.problems == ()
    assert all("FILL-IN" in notice for notice in report.notices)
    # Each value has a comment that says what to fill in; the image of the manifest is explained at its top
    assert len(re.findall(r"# +(?:.*\d\. )?.*FILL-IN", file.read_text())) >= 2
    assert report.to_text().endswith("GPU each")


@of_ray_up
def test_the_run_of_the_comments_fits_on_the_nodes(file: Path) -> None:
    config = override(recipes.find("dino_r50_4scale_12ep"), ON_SHARED_STORAGE)
    report = check_file(file, config)
    assert report.problems == ()
    assert [notice for notice in report.notices if "FILL-IN" not in notice] == []
    comments = " ".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    for path in ON_SHARED_STORAGE:
        assert f"{path}=" in comments


@of_ray_up
def test_ray_accepts_the_cluster_file(file: Path) -> None:
    cluster = load(file)
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    # Ray replaces a missing list with its defaults, which are for the environment of an old image
    assert prepared["head_setup_commands"] == cluster["setup_commands"] + cluster["head_setup_commands"]
    assert prepared["worker_setup_commands"] == cluster["setup_commands"]


@of_ray_up
def test_gpu_workers_scale_from_zero_and_are_spot_instances(file: Path) -> None:
    cluster = load(file)
    workers = {**cluster["available_node_types"]}
    del workers[cluster["head_node_type"]]
    assert workers
    for worker in workers.values():
        assert worker["min_workers"] == 0
        assert worker["max_workers"] >= 1
        assert worker["resources"]["GPU"] >= 1
        config = worker["node_config"]
        aws, gcp = config.get("InstanceMarketOptions", {}), config.get("scheduling", {})
        assert aws.get("MarketType") == "spot" or gcp.get("provisioningModel") == "SPOT"


@of_ray_up
def test_every_node_installs_the_wheel_and_sees_the_shared_storage(file: Path) -> None:
    commands = " ".join(load(file)["setup_commands"])
    assert "pip wheel -q --no-build-isolation" in commands
    assert "dist/raydetr-*.whl" in commands
    assert "mount -t nfs" in commands
    assert "-c constraints.txt" in commands


@of_ray_up
def test_folders_that_are_copied_exist_in_the_checkout(file: Path) -> None:
    cluster = load(file)
    sources = [source for source in cluster["file_mounts"].values() if not source.startswith("~")]
    assert sources == ["."]
    assert all((ROOT / name).exists() for name in cluster["rsync_filter"])


def test_gcp_has_the_same_commands_as_aws() -> None:
    def differing(key: str) -> list[tuple[str, str]]:
        pairs = zip(load(AWS)[key], load(GCP)[key], strict=True)
        return [pair for pair in pairs if pair[0] != pair[1]]

    assert differing("head_start_ray_commands") == differing("worker_start_ray_commands") == []
    ((aws, gcp),) = differing("setup_commands")
    assert "efs" in aws
    assert "FILL-IN-address" in gcp


# --- The manifest ---


@pytest.fixture
def objects() -> dict[str, Any]:
    found = yaml.safe_load_all(KUBERAY.read_text())
    return {each["kind"] + "/" + each["metadata"]["name"]: each for each in found}


def test_a_retry_of_the_rayjob_goes_on_with_the_run(objects: dict[str, Any]) -> None:
    job = objects["RayJob/raydetr-train"]
    assert job["spec"]["backoffLimit"] > 0
    words = job["spec"]["entrypoint"].split()
    assert words[words.index("--name") + 1] == job["metadata"]["name"]
    assert "--or-resume" in words
    # The shell of the submitter reads it first
    assert not set("'\"$`\\;&|") & set(job["spec"]["entrypoint"])


def test_the_rayjob_trains_a_recipe_on_all_its_nodes(objects: dict[str, Any]) -> None:
    config = kuberay.job_config(objects["RayJob/raydetr-train"])
    assert config is not None
    assert config.recipe == "dino_r50_4scale_12ep"
    (group,) = objects["RayJob/raydetr-train"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert config.cluster.num_workers == group["maxReplicas"]
    (pod,) = group["template"]["spec"]["containers"]
    assert config.cluster.cpus_per_worker <= int(pod["resources"]["limits"]["cpu"])


def test_the_image_has_the_version_of_ray_that_the_rayjob_names(objects: dict[str, Any]) -> None:
    version = objects["RayJob/raydetr-train"]["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"ray=={version}\n" in (ROOT / "constraints.txt").read_text()


def test_loader_processes_have_shared_memory(objects: dict[str, Any]) -> None:
    (group,) = objects["RayJob/raydetr-train"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (name,) = (
        each["name"] for each in pod["containers"][0]["volumeMounts"] if each["mountPath"] == "/dev/shm"
    )
    (volume,) = (each for each in pod["volumes"] if each["name"] == name)
    assert volume["emptyDir"]["medium"] == "Memory"


def test_the_rayjob_tracks_to_the_server_of_the_manifest(objects: dict[str, Any]) -> None:
    config = kuberay.job_config(objects["RayJob/raydetr-train"])
    service, server = objects["Service/raydetr-mlflow"], objects["Deployment/raydetr-mlflow"]
    assert config is not None
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert config.tracking.uri == f"http://{address}"
    pod = server["spec"]["template"]
    assert (
        service["spec"]["selector"] == pod["metadata"]["labels"] == server["spec"]["selector"]["matchLabels"]
    )
    assert any(
        option.startswith(f"--allowed-hosts={address},") for option in pod["spec"]["containers"][0]["command"]
    )
    claims = {kind.partition("/")[2] for kind in objects if kind.startswith("PersistentVolumeClaim/")}
    used = {each["persistentVolumeClaim"]["claimName"] for each in pod["spec"]["volumes"]}
    assert used == claims
