"""Disturb one run many times, and compare it with an undisturbed one.

    make chaos KILLS=20

A Ray cluster of a head and two nodes on this machine trains with two workers. At random steps something is killed,
stopped, or does not answer (`DISTURBANCES`); what needs a user (a driver that died) is started again, by the same
command. Prints a line for each, a table, and whether both runs ended in the same weights, bit for bit; writes
build/chaos.json. Exits with 1 if they did not, if a sample was not used exactly once, or if training did not go on
within 20 s; for a worker that makes no progress these begin after `cluster.stall_minutes`.

The runs are on a small file system of their own, which is filled for "disk full"; where it cannot be mounted (it needs
root on Linux), that disturbance is left out, with a line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from drawn_shards import write_drawn_shards
from mlflow_server import MlflowServer
from ray_nodes import ray_nodes
from raydetr import recipes
from raydetr.config import RunConfig, override, to_yaml
from raydetr.tracking.events import Event, EventReader, Metrics, read_events
from raydetr.training import checkpoint

OUT = Path("build/chaos.json")
STEPS_PER_KILL = (
    50  # of the whole run: some disturbances stop nothing, and last for more than a hundred steps
)
MAX_STEPS_BETWEEN = 30  # from the moment when training goes on to the next disturbance
BATCH, SAMPLES = 8, 96
EVALUATED_EPOCHS = 3
LIMIT_SECONDS = 20.0  # until training goes on
OUTAGE_SECONDS = 6.0
STALL_MINUTES = 0.1
DISK_MB = 3000  # two runs with hundreds of evaluations each
PATIENCE_SECONDS = 180.0
STARTS = ("started", "resumed")  # events at a start of the workers


@dataclass
class Chaos:
    """The cluster, the driver that is disturbed, and what happened so far."""

    cluster: Cluster
    mlflow: MlflowServer
    folder: Path  # of the run
    command: list[str]  # that begins the run, or continues it
    random: random.Random
    disk: Path | None  # a file system that can be filled
    log: Path  # of all drivers
    driver: subprocess.Popen[str] | None = None
    reader: EventReader = field(init=False)
    events: list[Event] = field(default_factory=list)  # of the run, so far

    def __post_init__(self) -> None:
        self.reader = EventReader(self.folder)

    def start(self) -> None:
        """Start the driver."""
        with self.log.open("a") as log:
            self.driver = subprocess.Popen(self.command, stdout=log, stderr=log, text=True)

    def workers(self, class_name: str = "RayTrainWorker") -> list[psutil.Process]:
        """Return the processes of the cluster's actors of a class."""
        rows = list_actors(self.cluster.address, [("class_name", "=", class_name)], limit=1000, detail=True)
        pids = {row.pid for row in rows if row.state == "ALIVE"}
        return [process for process in psutil.process_iter() if process.pid in pids]

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Wait for a condition.

        Raises:
            RuntimeError: the driver has ended, or it takes too long.
        """
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            self.events += self.reader.read()
            if condition():
                return
            has_ended = self.driver is not None and self.driver.poll() is not None
            if has_ended or time.monotonic() > until:
                tail = self.log.read_text()[-3000:]
                raise RuntimeError(f"{'the driver has ended' if has_ended else 'too long'}: {what}\n{tail}")
            time.sleep(0.005)

    def last_position(self) -> int:
        """Return the position that the run has reached, also if it is behind it again."""
        return max((event["position"] for event in self.events if event["kind"] == "step"), default=0)


# --- Disturbances: each returns when the cause is gone ---


def kill_worker(chaos: Chaos) -> None:
    """Kill a worker at any moment."""
    time.sleep(chaos.random.uniform(0, 0.5))
    chaos.random.choice(chaos.workers()).kill()


def kill_in_checkpoint(chaos: Chaos) -> None:
    """Kill all workers, with the one that writes, while a checkpoint is being written."""
    workers = chaos.workers()
    chaos.wait_for(lambda: list(chaos.folder.glob("checkpoints/*/*.tmp")), "no checkpoint is being written")
    for worker in workers:
        worker.kill()


def kill_in_evaluation(chaos: Chaos) -> None:
    """Kill a worker while the model is evaluated."""
    workers = chaos.workers()

    def is_evaluating() -> bool:
        events = chaos.events
        at = max((index for index, event in enumerate(events) if event["kind"] == "step"), default=0)
        period = EVALUATED_EPOCHS * SAMPLES
        is_evaluated = any(event["kind"] == "evaluation" for event in events[at:])
        return bool(events[at].get("position", 1) % period == 0 and not is_evaluated)

    chaos.wait_for(is_evaluating, "no evaluation")
    time.sleep(0.1)
    chaos.random.choice(workers).kill()


def lose_node(chaos: Chaos) -> None:
    """Kill all processes of a node with a worker; another node joins 3 s later."""
    node = chaos.random.choice(chaos.cluster.workers)
    chaos.cluster.workers.remove(node)
    chaos.cluster.remove_node(node, allow_graceful=False)
    time.sleep(3)
    chaos.cluster.workers.append(chaos.cluster.add_node(num_cpus=1))


def kill_controller(chaos: Chaos) -> None:
    """Kill Ray Train's controller."""
    for process in chaos.workers("TrainController"):
        process.kill()


def kill_driver(chaos: Chaos) -> None:
    """Kill the driver; its run is resumed at once."""
    assert chaos.driver is not None
    chaos.driver.kill()
    chaos.driver.wait()
    chaos.start()


def stop_driver(chaos: Chaos) -> None:
    """Stop the driver with SIGTERM; its run is resumed."""
    assert chaos.driver is not None
    chaos.driver.terminate()
    code = chaos.driver.wait(PATIENCE_SECONDS)
    if code != 128 + signal.SIGTERM:
        raise RuntimeError(f"exit code {code} after SIGTERM:\n{chaos.log.read_text()[-2000:]}")
    chaos.start()


def stop_worker(chaos: Chaos) -> None:
    """Suspend a worker: the run makes no progress."""
    chaos.random.choice(chaos.workers()).suspend()


def refuse_storage(chaos: Chaos) -> None:
    """Let the storage of checkpoints and events fail for some seconds."""
    for name in ("checkpoints", "events"):
        (chaos.folder / name).rename(chaos.folder / f"{name}.away")
        (chaos.folder / name).touch()
    time.sleep(OUTAGE_SECONDS)
    for name in ("checkpoints", "events"):
        (chaos.folder / name).unlink()
        (chaos.folder / f"{name}.away").rename(chaos.folder / name)


def fill_disk(chaos: Chaos) -> None:
    """Fill the disk for some seconds."""
    assert chaos.disk is not None
    filler = chaos.disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            time.sleep(OUTAGE_SECONDS)
    filler.unlink()


def kill_mlflow(chaos: Chaos) -> None:
    """Kill the MLflow server, and start it again after some seconds, while the next disturbances come."""
    chaos.mlflow.kill()
    time.sleep(OUTAGE_SECONDS)
    threading.Thread(target=chaos.mlflow.start, name="mlflow").start()


DISTURBANCES: dict[str, Callable[[Chaos], None]] = {
    "worker": kill_worker,
    "worker in a checkpoint": kill_in_checkpoint,
    "worker in an evaluation": kill_in_evaluation,
    "node, replaced": lose_node,
    "controller": kill_controller,
    "driver": kill_driver,
    "driver, SIGTERM": stop_driver,
    "worker stalls": stop_worker,
    "storage refuses": refuse_storage,
    "disk full": fill_disk,
    "MLflow server": kill_mlflow,
}
# Training goes on meanwhile
WITHOUT_RESTART = ("storage refuses", "disk full", "MLflow server")


def main() -> None:
    """Run both runs, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", choices=DISTURBANCES, action="append", help="draw from these; may be repeated"
    )
    arguments = parser.parse_args()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        disk = stack.enter_context(small_disk(work / "disk"))
        names = [name for name in arguments.only or DISTURBANCES if name != "disk full" or disk is not None]
        if not names:
            sys.exit("nothing is left to draw from")
        server = MlflowServer(work)
        server.start()
        stack.callback(server.kill)
        cluster = stack.enter_context(ray_nodes(2, cpus=1))
        config = configure(work, cluster.address, server.uri, arguments.kills)
        (work / "run.yaml").write_text(to_yaml(config))
        program = str(Path(sys.executable).with_name("raydetr"))
        command = [program, "train", "--config", str(work / "run.yaml"), "--or-resume", "--name"]
        runs = work / "disk"
        print(f"{arguments.kills * STEPS_PER_KILL} steps without a disturbance", flush=True)
        subprocess.run([*command, "calm"], check=True, capture_output=True)
        chaos = Chaos(
            cluster,
            server,
            folder=runs / "disturbed",
            command=[*command, "disturbed"],
            random=random.Random(arguments.seed),
            disk=disk,
            log=work / "driver.log",
        )
        kills = disturb(chaos, names, arguments.kills)
        result = report(chaos.folder, runs / "calm", kills)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {OUT}")
    good = result["identical"] and not result["samples_not_exactly_once"]
    sys.exit(0 if good and result["seconds_to_training"]["max"] <= LIMIT_SECONDS else 1)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Mount a small file system; yield None where that is not possible."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode != 0:
        print(f"without 'disk full': {mounted.stderr.decode().strip()}")
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def configure(work: Path, address: str, tracking_uri: str, kills: int) -> RunConfig:
    """Write small data; return the configuration of both runs."""
    write_drawn_shards(work, SAMPLES, 24)
    return override(
        recipes.quickstart(),
        {
            "data.train": str(work / "train"),
            "data.val": str(work / "val"),
            "data.synthetic": None,
            "data.batch_size": BATCH,
            "data.eval_batch_size": 4,
            "optim.epochs": max(1, kills * STEPS_PER_KILL * BATCH // SAMPLES),
            "evaluation.every_epochs": EVALUATED_EPOCHS,
            "cluster.address": address,
            "cluster.num_workers": 2,
            "cluster.max_failures": -1,  # two disturbances can hit the same step
            "cluster.stall_minutes": STALL_MINUTES,
            "storage.path": str(work / "disk"),
            "storage.checkpoint_steps": 8,
            "tracking.uri": tracking_uri,
            "tracking.log_every_steps": 1,
            "tracking.register_model": False,
        },
    )


def disturb(chaos: Chaos, names: list[str], kills: int) -> list[dict[str, Any]]:
    """Train, and disturb the run at random positions; return what happened each time."""
    chaos.start()
    done = []
    for number in range(1, kills + 1):
        # Beyond what the run has reached before: it makes progress between two failures
        step = chaos.last_position() // BATCH + chaos.random.randint(1, MAX_STEPS_BETWEEN)
        chaos.wait_for(lambda step=step: chaos.last_position() >= step * BATCH, f"step {step} is not reached")
        name = chaos.random.choice(names)
        began, reached = time.time(), chaos.last_position()
        DISTURBANCES[name](chaos)
        needs_restart = name not in WITHOUT_RESTART
        chaos.wait_for(
            lambda since=began, r=needs_restart: goes_on(chaos.events, since, r), f"nothing after {name}"
        )
        seconds = longest_pause(chaos.events, began)
        if name == "worker stalls":
            seconds -= 60 * STALL_MINUTES  # it cannot be noticed earlier
        done.append(
            {"kind": name, "step": step, "position": reached, "seconds_to_training": round(seconds, 1)}
        )
        print(f"{number:4}  step {step:5}  {name:24} training again after {seconds:5.1f} s", flush=True)
    assert chaos.driver is not None
    code = chaos.driver.wait(600)
    if code != 0:
        raise RuntimeError(f"the driver ended with {code}:\n{chaos.log.read_text()[-3000:]}")
    return done


def goes_on(events: Iterable[Event], since: float, needs_restart: bool) -> bool:
    """Return whether a step was trained after a time; with `needs_restart`, by workers that started after it."""
    events = [event for event in events if event["time"] > since]
    starts = [event["time"] for event in events if event["kind"] in STARTS]
    if needs_restart and not starts:
        return False
    after = starts[-1] if needs_restart else since
    return any(event["kind"] == "step" and event["time"] > after for event in events)


def longest_pause(events: list[Event], began: float) -> float:
    """Return the longest time without a step or an evaluation since a disturbance began."""
    times = sorted(event["time"] for event in events if event["kind"] in ("step", "evaluation"))
    pauses = [after - max(before, began) for before, after in itertools.pairwise(times) if after > began]
    return max(pauses, default=0.0)


def report(disturbed: Path, calm: Path, kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare both runs; print the table and return the result."""
    events = read_events(disturbed)
    seconds = [kill["seconds_to_training"] for kill in kills]
    result = {
        "kills": len(kills),
        "recoveries": recoveries(events),
        "restarts": sum(event["kind"] in STARTS for event in events) - 1,
        "recomputed_seconds": round(recomputed_seconds(events), 1),
        "seconds_to_training": {"median": median(seconds), "max": max(seconds)},
        "samples_not_exactly_once": samples_not_exactly_once(events, read_events(calm)),
        "identical": same_weights(disturbed, calm),
        "by_kind": {
            name: {"number": len(own), "median": median(own), "max": max(own)}
            for name in DISTURBANCES
            if (own := [kill["seconds_to_training"] for kill in kills if kill["kind"] == name])
        },
        "restart_reasons": [event["reason"] for event in events if event["kind"] == "restart"],
        "each": kills,
    }
    print(f"\n{'disturbance':24} {'number':>6} {'median s':>9} {'max s':>7}")
    for name, row in result["by_kind"].items():
        print(f"{name:24} {row['number']:6} {row['median']:9.1f} {row['max']:7.1f}")
    for name in ("kills", "recoveries", "restarts", "recomputed_seconds", "samples_not_exactly_once"):
        print(f"{name.replace('_', ' ')}: {result[name]}")
    print(f"identical: {'yes' if result['identical'] else 'no'}")
    return result


def recoveries(events: list[Event]) -> int:
    """Return how many restarts were followed by a step, before the next one."""
    kinds = [event["kind"] for event in sorted(events, key=lambda event: event["time"])]
    marks = [kind in STARTS for kind in kinds if kind == "step" or kind in STARTS]
    return sum(is_start and not is_next for is_start, is_next in itertools.pairwise(marks[1:]))


def samples_not_exactly_once(disturbed: list[Event], calm: list[Event]) -> int:
    """Return how many samples only one of two runs has trained on, or the disturbed one more than once."""
    positions, expected = (
        [row["position"] for row in Metrics(events).rows if "loss" in row] for events in (disturbed, calm)
    )
    steps = len(set(positions) ^ set(expected)) + len(positions) - len(set(positions))
    return steps * BATCH


def recomputed_seconds(events: list[Event]) -> float:
    """Return the time of the steps that were trained again after a restart."""
    total, last = 0.0, None
    steps: list[tuple[int, float]] = []
    for event in sorted(events, key=lambda event: event["time"]):
        if event["kind"] in STARTS:
            total += sum(seconds for position, seconds in steps if position > event["position"])
            steps = [step for step in steps if step[0] <= event["position"]]
            last = None
        elif event["kind"] == "step":
            steps.append((event["position"], 0.0 if last is None else event["time"] - last))
            last = event["time"]
        elif event["kind"] == "evaluation":
            last = event["time"]
    return total


def same_weights(first: Path, second: Path) -> bool:
    """Return whether the last checkpoints of two runs have the same state, bit for bit."""
    states = [
        torch.utils._pytree.tree_leaves(
            torch.load(checkpoint.complete_checkpoints(run)[0] / "state.pt", weights_only=True)
        )
        for run in (first, second)
    ]
    return len(states[0]) == len(states[1]) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*states, strict=True)
    )


if __name__ == "__main__":
    main()
