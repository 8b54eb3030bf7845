"""Run a Ray head node with `ray start`, in separate processes that are ended by their ids."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 120

# Ray's workers are nice by default: beside other tests, all on the same cores, they would hardly run
NICENESS = {"RAY_worker_niceness": "0"}
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "OMP_NUM_THREADS": "1",
    "RAY_raylet_start_wait_time_s": str(START_SECONDS),  # 30 s are too short on a busy machine
    **NICENESS,
}


@dataclass(frozen=True)
class RayHead:
    """Addresses and folder of a head node."""

    address: str
    dashboard: str  # URL
    folder: Path
    python: Path = Path(sys.executable)  # of the head and its jobs
    variables: Mapping[str, str] = field(default_factory=dict)  # of its environment, beside ENVIRONMENT

    def environment(self) -> dict[str, str]:
        """Return the environment of a client: `python` is the head's, and no variable points to another cluster."""
        others = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
        inherited = {name: value for name, value in os.environ.items() if name not in others}
        path = os.pathsep.join([str(self.python.parent), inherited.get("PATH", os.defpath)])
        return inherited | ENVIRONMENT | self.variables | {"PATH": path}

    def get(self, path: str) -> Any:
        """Request a path of the dashboard."""
        token = self.variables.get("RAY_AUTH_TOKEN")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return urllib.request.urlopen(
            urllib.request.Request(self.dashboard + path, headers=headers), timeout=30
        )

    def living(self, resource: str) -> list[dict[str, Any]]:
        """List the actors, placement_groups or nodes of the cluster that have not ended, with the REST API."""
        with self.get(f"/api/v0/{resource}?limit=1000&detail=1") as response:
            rows: list[dict[str, Any]] = json.load(response)["data"]["result"]["result"]
        return [row for row in rows if row.get("state") not in ("DEAD", "REMOVED")]

    def processes(self) -> list[psutil.Process]:
        """List the processes of this cluster, including workers and drivers."""
        named = [process for process in psutil.process_iter() if str(self.folder) in _command(process)]
        # Workers have other command lines, such as ray::IDLE, and are children of their raylet
        found = dict.fromkeys(named)
        for process in named:
            with suppress(psutil.NoSuchProcess):
                found |= dict.fromkeys(process.children(recursive=True))
        return list(found)


@contextmanager
def ray_head(
    num_cpus: int, python: Path = Path(sys.executable), variables: Mapping[str, str] | None = None
) -> Iterator[RayHead]:
    """Start a head node with a dashboard on free loopback ports; kill all its processes afterwards.

    `python` and `variables` are the interpreter and environment variables of the head and its jobs.
    """
    # It holds sockets, for which the paths of pytest's folders are too long
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        port, dashboard, agent, metrics, client, environment_agent, grpc = free_ports(7)
        url = f"http://127.0.0.1:{dashboard}"
        head = RayHead(f"127.0.0.1:{port}", url, folder, python, variables or {})
        with (folder / "head.log").open("w") as log:
            process = subprocess.Popen(
                [
                    *(str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                    *("--node-ip-address=127.0.0.1", f"--port={port}", f"--num-cpus={num_cpus}"),
                    *(
                        "--include-dashboard=true",
                        "--dashboard-host=127.0.0.1",
                        f"--dashboard-port={dashboard}",
                    ),
                    *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"),
                    *(f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}"),
                    *(f"--runtime-env-agent-port={environment_agent}", f"--temp-dir={folder}"),
                    "--disable-usage-stats",
                ],
                # Ray's own actors would ask another cluster on this machine for the state of theirs
                env=head.environment() | {"RAY_ADDRESS": head.address},
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                _wait_for(head, process)
                yield head
            finally:
                _end(process, head)


def free_ports(count: int) -> list[int]:
    """Return different free ports."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_for(head: RayHead, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with head.get("/api/version"):
                if head.living("nodes"):
                    return
        except (OSError, KeyError, TypeError):
            pass
        time.sleep(0.5)
    log = (head.folder / "head.log").read_text()
    raise RuntimeError(f"no Ray head node within {START_SECONDS} s:\n{log}")


def _end(process: subprocess.Popen[bytes], head: RayHead) -> None:
    """Kill all at once: asked to end, a raylet with actors waits for half a minute."""
    family = {*psutil.Process(process.pid).children(recursive=True), *head.processes()}
    process.kill()
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
