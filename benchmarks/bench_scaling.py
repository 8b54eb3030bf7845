"""Measure what the platform costs: workers, the loop around a step, checkpoints, events, evaluation.

    make bench-scaling

Trains DETR with ResNet-50, whose batch norms are frozen, and the quickstart's model, whose batch norms are trained and
therefore synchronized in every layer. One thread per worker; in turns a bare loop over `Training.train_step`, two such
loops at once with half of the batch each and without communication, a run in this process, a run with one Ray Train
worker and one with two. Rates are medians over the runs of a kind, without the first steps of each. The targets are for
the first model. Prints a table and writes build/bench/scaling.json, a list of
{case, value, unit, target}; exits with 1 if a target is missed. Needs two free cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from detrs import zoo
from drawn_shards import write_drawn_shards
from raydetr import recipes
from raydetr.config import RunConfig, override
from raydetr.data.layout import Layout
from raydetr.data.splits import open_splits
from raydetr.data.stream import train_batches
from raydetr.data.transforms.transform import Transform
from raydetr.runs import run
from raydetr.runs.ray_cluster import SETTINGS
from raydetr.tracking.events import EventLog, read_events
from raydetr.training import checkpoint
from raydetr.training.loop import Training
from raydetr.training.world import World

OUT = Path("build/bench/scaling.json")
WARM_UP = 2  # intervals between logged steps
IMAGES, EVALUATED = 64, 16
MIN_SCALING, MAX_OVERHEAD, MAX_WAIT = 0.85, 0.03, 0.01


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=480, help="of the images of DETR, in pixels")
    arguments = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        models = configure(Path(name), arguments.side)
        ray.init(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False)
        try:
            rows = measure_rates(
                f"DETR, ResNet-50, {arguments.side} px", models[0], arguments.rounds, has_targets=True
            )
            rows += measure_rates("quickstart", models[1], arguments.rounds, has_targets=False)
            rows += measure_costs(models[1], Path(name))
        finally:
            ray.shutdown()
    print(f"\n{'case':<66} {'value':>10} {'unit':<10} {'target':>8}")
    for row in rows:
        target = "" if row["target"] is None else f"{row['target'][0]} {row['target'][1]:g}"
        print(
            f"{row['case']:<66} {row['value']:10.4g} {row['unit']:<10} {target:>8}{'' if is_reached(row) else ' !'}"
        )
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if all(map(is_reached, rows)) else 1)


def case(name: str, value: float, unit: str, target: tuple[str, float] | None = None) -> dict[str, Any]:
    """Return a row of the table."""
    return {"case": name, "value": value, "unit": unit, "target": target}


def is_reached(row: dict[str, Any]) -> bool:
    """Return whether a case reaches its target, if it has one."""
    if row["target"] is None:
        return True
    relation, limit = row["target"]
    return bool(row["value"] >= limit if relation == ">=" else row["value"] <= limit)


def configure(work: Path, side: int) -> list[RunConfig]:
    """Write small data; return the configurations of the two models, which are evaluated at the end only.

    `side` is that of the images of the first one, in pixels.
    """
    write_drawn_shards(work, IMAGES, EVALUATED)
    common = {
        "data.train": str(work / "train"),
        "data.val": str(work / "val"),
        "cluster.num_workers": 1,
        "cluster.use_gpu": False,
        "cluster.cpus_per_worker": 1,
        "storage.path": str(work / "runs"),
        "tracking.register_model": False,
    }
    resnet = {
        "data.batch_size": 8, "data.num_loader_workers": 0, "data.train_transform.scale_per": "image",
        "data.train_transform.short_sides": [side], "data.train_transform.max_side": side, "optim.precision": "fp32",
        "optim.epochs": 1, "optim.lr_drop_epochs": [], "evaluation.every_epochs": 1, "tracking.log_every_steps": 1,
        "init.checkpoint": None,
    }  # fmt: skip
    small = {
        "data.synthetic": None, "optim.epochs": 15, "evaluation.every_epochs": 15, "data.batch_size": 16,
        "tracking.log_every_steps": 5,
    }  # fmt: skip
    return [
        override(recipes.find("finetune_detr_r50"), common | resnet),
        override(recipes.quickstart(), common | small),
    ]


def measure_rates(name: str, config: RunConfig, rounds: int, *, has_targets: bool) -> list[dict[str, Any]]:
    """Return the rates of the bare loop and the runs, and their ratios."""
    kinds = {
        "bare": lambda: bare_rate(config),
        "pair": lambda: pair_rate(config),
        "local": lambda: run_rate(config, local=True),
        "one": lambda: run_rate(config, local=False),
        "two": lambda: run_rate(override(config, {"cluster.num_workers": 2}), local=False),
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind, measure in kinds.items():
            found[kind].append(measure())
        rates = ", ".join(f"{kind} {values[-1]:.2f}" for kind, values in found.items())
        print(f"{name}, round {number + 1} of {rounds}: images/s: {rates}", flush=True)
    # Ratios of neighbors: the machine may become slower or faster meanwhile
    scaling = median(two / (2 * one) for one, two in zip(found["one"], found["two"], strict=True))
    bound = median(pair / (2 * bare) for bare, pair in zip(found["bare"], found["pair"], strict=True))
    overhead = {
        kind: median(bare / own - 1 for bare, own in zip(found["bare"], found[kind], strict=True))
        for kind in ("local", "one")
    }
    at_least, at_most = ((">=", MIN_SCALING), ("<=", MAX_OVERHEAD)) if has_targets else (None, None)
    return [
        case(f"{name}: bare loop, one thread", median(found["bare"]), "images/s"),
        case(f"{name}: run in one process", median(found["local"]), "images/s"),
        case(f"{name}: run with one Ray Train worker", median(found["one"]), "images/s"),
        case(f"{name}: run with two Ray Train workers", median(found["two"]), "images/s"),
        case(f"{name}: two workers over twice one worker", scaling, "ratio", at_least),
        case(f"{name}: two bare loops at once over twice one", bound, "ratio"),
        case(f"{name}: overhead of a run in one process", overhead["local"], "share", at_most),
        case(f"{name}: overhead of a run with one worker", overhead["one"], "share", at_most),
    ]


def bare_rate(config: RunConfig) -> float:
    """Return the images per second of a loop with nothing but steps, with the same batches."""
    train, _ = open_splits(config.data)
    torch.manual_seed(config.seed)
    model = zoo.build(override(config, {"model.num_classes": train.label_map.num_classes}).model)
    training = Training(config, model, train.num_samples, World.single_process())
    batches = train_batches(
        train, seed=config.seed, position=0, layout=Layout(config.data.batch_size, 1, None), rank=0,
        transform=Transform(config.data.train_transform), num_workers=config.data.num_loader_workers,
        on_corrupt=config.data.on_corrupt,
    )  # fmt: skip
    training.detector.train()
    times = []
    for number, batch in enumerate(itertools.islice(batches, training.total_steps), 1):
        training.train_step(batch)
        if number % config.tracking.log_every_steps == 0:
            times.append(time.time())
    return rate(config, times)


def pair_rate(config: RunConfig) -> float:
    """Return the images per second of two bare loops at once, each with half of the batch."""
    half = override(config, {"data.batch_size": config.data.batch_size // 2})
    with multiprocessing.get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        return sum(pool.map(bare_rate, [half, half], chunksize=1))


def run_rate(config: RunConfig, *, local: bool) -> float:
    """Return the images per second between the logged steps of a run."""
    result = run.start(config, local=local, warn=False)
    steps = [event for event in read_events(result.folder) if event["kind"] == "step"]
    return rate(config, [event["time"] for event in steps if "loss" in event["metrics"]])


def rate(config: RunConfig, times: list[float]) -> float:
    """Return images per second: the median of the intervals between logged steps, after the first ones."""
    seconds = median(after - before for before, after in itertools.pairwise(times[WARM_UP:]))
    return config.data.batch_size * config.tracking.log_every_steps / seconds


def measure_costs(config: RunConfig, work: Path) -> list[dict[str, Any]]:
    """Return the costs of a checkpoint (for a model with ResNet-50), an event and an evaluation."""
    train, val = open_splits(config.data)
    large = recipes.find("dino_r50_4scale_12ep")
    large = override(large, {"model.backbone.weights": None, "cluster.num_workers": 1})
    model = zoo.build(override(large, {"model.num_classes": 91}).model)
    training = Training(large, model, train.num_samples, World.single_process())
    for parameter in training.detector.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()  # creates the moments
    captures, writes, num_bytes = [], [], 0
    for _ in range(5):
        began = time.perf_counter()
        state, meta = checkpoint.capture(training, train)
        captures.append(time.perf_counter() - began)
        num_bytes = checkpoint.write(work / "checkpoint", state, meta)
        writes.append(time.perf_counter() - began - captures[-1])
    minutes = large.storage.checkpoint_minutes
    assert minutes is not None
    log = EventLog(work / "events-only")
    began = time.perf_counter()
    for number in range(2000):
        log.append("step", step=number, position=number, metrics={"loss": 1.0, "lr": 0.1})
    event = (time.perf_counter() - began) / 2000
    log.flush()
    small = Training(
        config,
        zoo.build(override(config, {"model.num_classes": 3}).model),
        train.num_samples,
        World.single_process(),
    )
    small.evaluate(val)
    began = time.perf_counter()
    small.evaluate(val)
    evaluation = (time.perf_counter() - began) / val.num_samples
    return [
        case("checkpoint of DINO with ResNet-50: size", num_bytes / 2**20, "MiB"),
        case("checkpoint: training waits, for the copy in memory", median(captures), "s"),
        case("checkpoint: written and verified in the background", median(writes), "s"),
        case(
            f"checkpoint: share of {minutes:g} minutes",
            median(captures) / (60 * minutes),
            "share",
            ("<=", MAX_WAIT),
        ),
        case("event", 1e6 * event, "us"),
        case("evaluation of the quickstart's model, an image", 1e3 * evaluation, "ms"),
    ]


if __name__ == "__main__":
    main()
