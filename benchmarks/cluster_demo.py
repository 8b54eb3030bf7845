"""Show a cluster that loses a node: the quickstart as a job, on nodes of this machine.

    make cluster-demo

Starts a head without CPUs and two nodes with one CPU each, with token authentication. Submits the quickstart twice with
`raydetr submit`: once undisturbed; once a node is killed half-way, with everything on it, and another one joins. Both
must end with the same AP, digit for digit. Needs about eight minutes on two cores.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from ray_head import RayHead, free_ports, ray_head
from raydetr.tracking.events import read_events
from raydetr.training import checkpoint

OUT = Path("build/cluster-demo")
# Of the driver's side; they may not be on a node that can be lost
ON_THE_HEAD = ("RunActor", "TrainController", "JobSupervisor")
REPLACED_SECONDS = 5.0


class Node:
    """A node with one CPU."""

    def __init__(self, head: RayHead, number: int) -> None:
        self.number = number
        agent, metrics, environment, grpc = free_ports(4)
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={head.address}"),
            *("--node-ip-address=127.0.0.1", "--num-cpus=1", "--disable-usage-stats"),
            *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"),
            *(f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={environment}"),
        ]
        with (OUT / f"node-{number}.log").open("w") as log:
            self._process = subprocess.Popen(command, env=head.environment(), stdout=log, stderr=log)

    def kill(self) -> None:
        """Kill the node with all its processes."""
        family = psutil.Process(self._process.pid).children(recursive=True)
        for process in (psutil.Process(self._process.pid), *family):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait()


def main() -> None:
    """Run the demonstration; exit with 1 if the APs differ."""
    OUT.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(32)
    with ExitStack() as stack:
        runs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="runs-", dir=OUT))).absolute()
        variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_health_check_period_ms": "1000"}
        head = stack.enter_context(ray_head(0, variables=variables))
        nodes: list[Node] = []
        stack.callback(lambda: [node.kill() for node in nodes])
        for number in (1, 2):  # one after the other: on one machine they would take the same ports
            nodes.append(Node(head, number))
            wait_for(lambda: len(head.living("nodes")) == len(nodes) + 1, "a node does not join")
        print(f"a head and two nodes at {head.address}, with token authentication", flush=True)
        calm, _ = follow(head, runs, "undisturbed")
        total = max(
            event["position"] for event in read_events(runs / "undisturbed") if event["kind"] == "step"
        )
        disturbed, seconds = follow(
            head, runs, "disturbed", lambda: lose_a_node(head, nodes, runs, total // 2)
        )
        restarts = [
            event["reason"] for event in read_events(runs / "disturbed") if event["kind"] == "restart"
        ]
        again = seconds_to_training(runs / "disturbed")
    result = {
        "AP": calm["AP"], "AP_disturbed": disturbed["AP"], "identical": calm["AP"] == disturbed["AP"],
        "restarts": len(restarts), "seconds_to_training": again, "seconds": round(seconds, 1),
    }  # fmt: skip
    (OUT / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(0 if result["identical"] and restarts else 1)


def follow(head: RayHead, runs: Path, name: str, disturb: Any = None) -> tuple[dict[str, Any], float]:
    """Submit the quickstart and follow it to the end; return its metrics and the seconds."""
    began = time.monotonic()
    command = [
        *(str(Path(sys.executable).with_name("raydetr")), "submit", "train", "quickstart", "--name", name),
        *("--address", head.dashboard, f"storage.path={runs}"),
        *(f"data.{split}={Path('build/quickstart').absolute() / split}" for split in ("train", "val")),
    ]
    print(f"{name}: {' '.join(command[1:])}", flush=True)
    job = subprocess.Popen(command, env=head.environment())
    try:
        if disturb is not None:
            disturb()
        code = job.wait(1200)
    finally:
        job.kill()
    if code != 0:
        raise RuntimeError(f"raydetr submit ended with {code}")
    last = checkpoint.complete_checkpoints(runs / name)[0]
    return checkpoint.read_metrics(last), time.monotonic() - began


def lose_a_node(head: RayHead, nodes: list[Node], runs: Path, position: int) -> None:
    """Kill a node at a position of the run, and let another one join."""
    run = runs / "disturbed"
    wait_for(
        lambda: any(event.get("position", 0) >= position for event in read_events(run)), "no progress", 900
    )
    check_actors(head)
    nodes.pop(0).kill()
    print("killed a node", flush=True)
    time.sleep(REPLACED_SECONDS)
    nodes.append(Node(head, 3))
    print("another node joins", flush=True)


def check_actors(head: RayHead) -> None:
    """Check that the two workers are on two nodes, and that nothing else of the run is on a node that may be lost."""
    (own,) = [node["node_id"] for node in head.living("nodes") if node.get("is_head_node")]
    actors = [(actor["class_name"], actor["node_id"]) for actor in head.living("actors")]
    workers = [node for name, node in actors if name == "RayTrainWorker"]
    assert len(set(workers)) == 2, actors
    assert own not in workers, actors
    elsewhere = [name for name, node in actors if name.split(".")[-1] in ON_THE_HEAD and node != own]
    assert not elsewhere, f"not on the head: {elsewhere}"
    print("two workers on two nodes; controller, driver and our actor are on the head", flush=True)


def seconds_to_training(run: Path) -> float:
    """Return the longest time between two steps with a restart between them."""
    events = sorted(read_events(run), key=lambda event: event["time"])
    longest, before, restarted = 0.0, None, False
    for event in events:
        restarted = restarted or event["kind"] == "resumed"
        if event["kind"] == "step":
            if restarted and before is not None:
                longest = max(longest, event["time"] - before)
            before, restarted = event["time"], False
    return round(longest, 1)


def wait_for(condition: Any, what: str, seconds: float = 120.0) -> None:
    """Wait for a condition.

    Raises:
        RuntimeError: it takes too long.
    """
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(what)
        time.sleep(0.2)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
