"""Measure what MLflow costs a training: a database, a server that is slow, frozen, or not there.

    make bench-tracking

Trains the quickstart's model in this process on one thread, and logs every step; in turns without an upload (as a trial
of a search, which the search uploads), with SQLite, and with a server that answers at once, after 5 seconds, is frozen,
or absent. Each case is compared with the trainings without an upload that took turns with it: by the wall time between
the first and the last logged step, of the fastest ones, because the machine is never faster than the program; and by
the CPU time of the process that trains, median of the rounds. After each training, the server answers again, and what
it lacks is uploaded: then it has every value of the events once. Prints a table and writes build/bench/tracking.json, a
list of {case, value, unit, target}; exits with 1 if a target is missed. Needs two free cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from mlflow import MlflowClient

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from drawn_shards import write_drawn_shards
from mlflow_proxy import MlflowProxy
from mlflow_server import MlflowServer
from raydetr import recipes
from raydetr.config import RunConfig, override
from raydetr.runs import run
from raydetr.runs.result import RunResult
from raydetr.tracking import upload_process
from raydetr.tracking.events import read_events
from raydetr.tracking.metric_names import metric_name
from raydetr.tracking.upload_state import read_run_id
from raydetr.tracking.uploader import KEY_TAG, Uploader

OUT = Path("build/bench/tracking.json")
IMAGES, BATCH = 64, 16
WARM_UP = 2  # logged steps
MAX_COST = 0.01
SLOW_SECONDS = 5.0
NOWHERE = "http://127.0.0.1:9"  # nothing listens there
_numbers = itertools.count()


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    torch.set_num_threads(1)
    # Only training is measured: at its end a run waits as long as the server answers, or for a minute
    upload_process.SILENT_SECONDS = 1.0
    with tempfile.TemporaryDirectory(prefix="tracking-") as name:
        server = MlflowServer(Path(name))
        server.start()
        proxy = MlflowProxy(server.uri)
        try:
            rows = measure(configure(Path(name), arguments.epochs), server, proxy, arguments.rounds)
        finally:
            proxy.stop()
            server.kill()
    print(f"\n{'case':<50} {'cost':>8}  target")
    for row in rows:
        missed = "" if row["value"] <= MAX_COST else " !"
        print(f"{row['case']:<50} {row['value']:8.2%}  <= {MAX_COST:.0%}{missed}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if all(row["value"] <= MAX_COST for row in rows) else 1)


def configure(work: Path, epochs: int) -> RunConfig:
    """Write small data; return the configuration of all runs, which log every step."""
    write_drawn_shards(work, IMAGES, 16)
    return override(
        recipes.quickstart(),
        {
            "data.train": str(work / "train"), "data.val": str(work / "val"), "data.synthetic": None,
            "data.batch_size": BATCH, "cluster.num_workers": 1, "cluster.cpus_per_worker": 1,
            "storage.path": str(work / "runs"), "optim.epochs": epochs, "evaluation.every_epochs": epochs,
            "tracking.log_every_steps": 1, "tracking.register_model": False,
        },
    )  # fmt: skip


def measure(config: RunConfig, server: MlflowServer, proxy: MlflowProxy, rounds: int) -> list[dict[str, Any]]:
    """Return how much slower each case is than training without an upload."""

    def slow() -> Spent:
        proxy.delay = SLOW_SECONDS
        try:
            return train(override(config, {"tracking.uri": proxy.uri}))
        finally:
            proxy.delay = 0.0

    def frozen() -> Spent:
        server.freeze()
        try:
            return train(override(config, {"tracking.uri": server.uri}))
        finally:
            server.thaw()

    cases = {
        "SQLite": lambda: train(config),
        "a server": lambda: train(override(config, {"tracking.uri": server.uri})),
        "a server that answers after 5 s": slow,
        "a server that is frozen": frozen,
        "a server that is not there": lambda: train(override(config, {"tracking.uri": NOWHERE})),
    }
    spent: dict[str, list[tuple[Spent, Spent]]] = {name: [] for name in cases}
    for number in range(rounds):
        for name, measure_case in cases.items():
            alone, own = train(config, is_uploaded=False), measure_case()
            time.sleep(SLOW_SECONDS)  # requests of the process that was killed at its end arrive
            uri = own.run.tracking_uri
            check_upload(own.run, server.uri if uri == NOWHERE else uri)
            spent[name].append((alone, own))
        shown = ", ".join(
            f"{name} {own.wall / alone.wall - 1:.1%}" for name, [*_, (alone, own)] in spent.items()
        )
        print(f"round {number + 1} of {rounds}: {shown}", flush=True)
    rows = []
    for name, pairs in spent.items():
        wall = min(own.wall for _, own in pairs) / min(alone.wall for alone, _ in pairs) - 1
        cpu = median(own.cpu / alone.cpu - 1 for alone, own in pairs)
        for kind, cost in (("wall time", wall), ("CPU time", cpu)):
            rows.append(
                {"case": f"{name}: {kind}", "value": cost, "unit": "ratio", "target": ["<=", MAX_COST]}
            )
    return rows


@dataclass(frozen=True)
class Spent:
    """Seconds of a training: between two steps, and of the CPU in all steps."""

    wall: float
    cpu: float
    run: RunResult


def train(config: RunConfig, *, is_uploaded: bool = True) -> Spent:
    """Train; return the time it took."""
    result = run.start(
        config, local=True, name=f"run-{next(_numbers)}", kind="run" if is_uploaded else "trial", warn=False
    )
    steps = [event for event in read_events(result.folder) if event["kind"] == "step"][WARM_UP:]
    time.sleep(1)  # processes of the run end
    return Spent(steps[-1]["time"] - steps[0]["time"], result.metrics["cpu_seconds"], result)


def check_upload(run: RunResult, uri: str) -> None:
    """Upload what MLflow lacks of a training; check that it then has one run, with every value of the events once.

    Raises:
        RuntimeError: it has less, or more.
    """
    Uploader(run.folder, uri).sync()
    client, run_id, events = MlflowClient(uri), read_run_id(run.folder), read_events(run.folder)
    assert run_id is not None
    logged = client.get_run(run_id)
    key = logged.data.tags[KEY_TAG]
    runs = client.search_runs([logged.info.experiment_id], f"tags.`{KEY_TAG}` = '{key}'")
    found = {name: len(client.get_metric_history(run_id, name)) for name in logged.data.metrics}
    expected = Counter(metric_name(name) for event in events for name in event.get("metrics") or ())
    if len(runs) != 1 or found != expected:
        differences = {
            name: (found.get(name, 0), expected[name])
            for name in {*found, *expected}
            if found.get(name) != expected[name]
        }
        raise RuntimeError(
            f"{run.name}: {len(runs)} runs in MLflow instead of 1, numbers of values that differ: {differences}"
        )


if __name__ == "__main__":
    main()
