"""Tracking where nodes are on several machines: SQLite is refused, and the documented server is reached.

A node with another loopback address stands for another machine.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from cluster_files import AWS, GCP, KUBERAY, load
from mlflow_proxy import MlflowProxy
from mlflow_server import MlflowServer
from ray_nodes import ray_nodes
from raydetr.config import ConfigError, RunConfig, override
from raydetr.runs import run
from raydetr.runs.ray_cluster import check_tracking
from raydetr.runs.sync import sync_runs
from raydetr.tracking import mlflow_run
from raydetr.training import checkpoint

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:ray"),
    pytest.mark.timeout(400),
]
NOWHERE = "http://127.0.0.1:9"  # nothing listens there
OTHER_MACHINE = "127.0.0.2"
HEAD = {"NodeManagerAddress": "10.0.0.1", "NodeManagerHostname": "head", "Alive": True}
WORKER = {"NodeManagerAddress": "10.0.0.2", "NodeManagerHostname": "worker", "Alive": True}


@pytest.fixture
def tiny_run(tiny_run: RunConfig) -> RunConfig:
    return override(tiny_run, {"tracking.upload": True})


# --- The check ---


@pytest.mark.parametrize("uri", [None, "sqlite:////mnt/raydetr/runs/mlflow.db"])
def test_sqlite_is_refused_on_several_machines(uri: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        check_tracking(uri, [HEAD, WORKER])
    message = str(error.value)
    assert message.startswith(
        f"tracking.uri is {uri or 'unset, which is SQLite in storage.path'}, and the cluster"
    )
    assert "head (10.0.0.1), worker (10.0.0.2)." in message  # which machines
    assert "locks do not hold" in message  # why
    assert message.endswith("set tracking.uri=http://HEAD_IP:5000")  # what to set


def test_many_machines_are_counted() -> None:
    nodes = [{**HEAD, "NodeManagerAddress": f"10.0.0.{i}"} for i in range(8)]
    with pytest.raises(ConfigError, match=r"head \(10.0.0.2\) and 5 more\. SQLite"):
        check_tracking(None, nodes)


@pytest.mark.parametrize(
    "uri", ["http://10.0.0.1:5000", "https://mlflow.example.com", "databricks", "/mnt/mlruns"]
)
def test_another_tracking_is_not_refused(uri: str) -> None:
    check_tracking(uri, [HEAD, WORKER])


@pytest.mark.parametrize("nodes", [[], [HEAD], [HEAD, HEAD], [HEAD, {**WORKER, "Alive": False}]])
def test_sqlite_is_not_refused_on_one_machine(nodes: list[dict[str, Any]]) -> None:
    check_tracking(None, nodes)


# --- On a cluster ---


@pytest.fixture
def head() -> Iterator[Cluster]:
    """A head without CPUs."""
    with ray_nodes(0, cpus=0) as nodes:
        yield nodes


@pytest.mark.slow  # what is refused is tested above
def test_a_run_is_refused_before_it_trains(head: Cluster, tiny_run: RunConfig) -> None:
    head.add_node(num_cpus=1, node_ip_address=OTHER_MACHINE)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"127\.0\.0\.2.*set tracking\.uri=http://HEAD_IP:5000"):
        run.start(tiny_run, name="refused")
    assert time.monotonic() - began < 60
    assert checkpoint.complete_checkpoints(Path(tiny_run.storage.path) / "refused") == []


# --- The documented server ---


def options_of(file: Path, folder: Path) -> list[str]:
    """The options of `mlflow server` in a cluster file, with a free port and files in `folder`."""
    if file == KUBERAY:
        return _options_in_manifest(folder)
    (command,) = (each for each in load(file)["head_start_ray_commands"] if "mlflow server" in each)
    # The shell of the head puts in its own address and home
    script = f"printf '%s\\n' {command.partition('mlflow server ')[2]}"
    environment = {"HOME": str(folder), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    output = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    return _moved(output.splitlines(), folder)


def _options_in_manifest(folder: Path) -> list[str]:
    (server,) = (each for each in yaml.safe_load_all(KUBERAY.read_text()) if each["kind"] == "Deployment")
    command = server["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:2] == ["mlflow", "server"]
    return _moved([option.replace("/database/", f"{folder}/") for option in command[2:]], folder)


def _moved(options: list[str], folder: Path) -> list[str]:
    assert any("/mnt/raydetr" in option for option in options)
    return [
        option.replace("5000", "PORT").replace("/mnt/raydetr", str(folder / "storage")) for option in options
    ]


def own_address() -> str:
    return subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("mlflow")
    started = MlflowServer(folder, options_of(AWS, folder))
    started.start()
    yield started
    started.kill()


def test_the_cluster_files_start_the_server_with_the_same_options(tmp_path: Path) -> None:
    assert options_of(AWS, tmp_path) == options_of(GCP, tmp_path)
    text = " ".join(load(AWS)["head_start_ray_commands"])
    assert "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" in text


def test_the_documented_server_is_reached_by_the_address_of_the_head(server: MlflowServer) -> None:
    address = own_address()
    assert not address.startswith("127.")
    for host in (address, "localhost", "127.0.0.1"):
        uri = f"http://{host}:{server.port}"
        client = MlflowClient(uri)
        found = client.get_experiment_by_name("experiment")
        experiment = client.create_experiment("experiment") if found is None else found.experiment_id
        run_id = client.create_run(experiment).info.run_id
        client.log_text(run_id, "content", "file.txt")
        assert mlflow_run.fetch_run(uri, run_id).status == "RUNNING"
    assert (server.folder / "mlflow.db").is_file()
    assert [file.read_text() for file in (server.folder / "storage").rglob("file.txt")] == ["content"] * 3


@pytest.mark.parametrize("name", ["attacker.example.com", "head"])
def test_the_documented_server_refuses_other_names(server: MlflowServer, name: str) -> None:
    url = f"http://127.0.0.1:{server.port}/api/2.0/mlflow/experiments/search"
    response = requests.post(
        url, json={"max_results": 1}, headers={"Host": f"{name}:{server.port}"}, timeout=30
    )
    assert response.status_code == 403
    response = requests.post(url, json={"max_results": 1}, timeout=30)
    assert response.status_code == 200


def test_the_server_of_the_manifest_is_reached_by_the_name_of_its_service(tmp_path: Path) -> None:
    started = MlflowServer(tmp_path, options_of(KUBERAY, tmp_path))
    started.start()
    try:
        url = f"http://127.0.0.1:{started.port}/api/2.0/mlflow/experiments/search"
        for name, code in (("raydetr-mlflow", 200), ("other", 403)):
            headers = {"Host": f"{name}:{started.port}"}
            assert (
                requests.post(url, json={"max_results": 1}, headers=headers, timeout=30).status_code == code
            )
        # The readiness probe addresses the pod by its address
        health = f"http://{own_address()}:{started.port}/health"
        assert requests.get(health, timeout=30).status_code == 200
    finally:
        started.kill()


def test_a_run_on_several_machines_is_logged_by_the_documented_server(
    head: Cluster, tiny_run: RunConfig, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if only the driver knows the token of the server, and reaches it."""
    head.add_node(num_cpus=1, node_ip_address=OTHER_MACHINE)
    uri = f"http://{own_address()}:{server.port}"
    proxy = MlflowProxy(uri)
    proxy.token = "secret"
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")  # the nodes were started without it
    try:
        result = run.start(override(tiny_run, {"tracking.uri": proxy.uri, "optim.epochs": 1}), name="logged")
    finally:
        proxy.stop()
    assert result.pending_upload is None
    logged = MlflowClient(uri).get_run(result.mlflow_run_id)
    assert logged.info.status == "FINISHED"
    assert "AP" in " ".join(logged.data.metrics)


@pytest.mark.slow
def test_a_run_on_several_machines_trains_while_the_server_is_down(
    head: Cluster, tiny_run: RunConfig, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    head.add_node(num_cpus=1, node_ip_address=OTHER_MACHINE)
    result = run.start(override(tiny_run, {"tracking.uri": NOWHERE, "optim.epochs": 1}), name="untracked")
    assert result.pending_upload is not None
    uri = f"http://{own_address()}:{server.port}"
    assert ["sent" in line for line in sync_runs([str(result.folder)], uri)] == [True]
    logged = MlflowClient(uri).get_run(result.mlflow_run_id)
    assert logged.info.status == "FINISHED"
    assert "AP" in " ".join(logged.data.metrics)
