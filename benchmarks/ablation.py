"""Train small models of the papers without one of their parts each, and say what is lost.

    make ablation                                             # 30 runs, two at a time on two cores
    make ablation ARGS="--seeds 1 --epochs 1 --images 200"    # a try of the whole command

Every run is `raydetr train RECIPE PATH=VALUE ... --local`, in one process with one thread, with the budget of the
others; as many run at a time as there are cores. They are in runs/, in the MLflow experiment "race"; one that is
finished is not repeated. Writes build/ablation.json.

A loss is the difference of mean APs over the seeds, with a 95% interval (Student's t, with the variance between seeds
pooled over the runs of a model). It shows if the interval excludes 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import mean, variance
from typing import Any

from race import RECIPES, Budget, add_options, markdown, put_into_docs, read_curve, short
from scipy.stats import t

from raydetr import recipes
from raydetr.console import table
from raydetr.data.splits import write_missing_synthetic

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Variant:
    """A model as it is, or without a part."""

    model: str  # of RECIPES
    without: str | None
    slug: str  # in the name of its runs
    changes: dict[str, Any] = field(default_factory=dict, hash=False)


VARIANTS = (
    Variant("DINO", None, "whole"),
    Variant("DINO", "denoising", "denoising", {"model.num_denoising": 0}),
    Variant("DINO", "contrastive negatives", "negatives", {"model.contrastive_denoising": False}),
    Variant("DINO", "mixed selection", "mixed", {"model.mixed_selection": False}),
    Variant("DINO", "look forward twice", "twice", {"model.look_forward_twice": False}),
    Variant("Deformable DETR", None, "whole", {"model.refinement": True}),
    # The level of the models with dense attention
    Variant("Deformable DETR", "several levels", "levels",
            {"model.refinement": True, "model.strides": [32], "model.num_feature_levels": 1,
             "model.backbone.dilation": True}),
    Variant("Deformable DETR", "refinement", "refinement"),  # as in the race
    Variant("DAB-DETR", None, "whole"),
    Variant("DAB-DETR", "modulated attention", "modulation", {"model.modulate_attention": False}),
)  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """The AP that a model loses without a part; `interval` is None with one seed, whose noise is unknown."""

    difference: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """What the interval says."""
        if self.interval is None:
            return "one seed: its noise is not known"
        low, high = self.interval
        return "shows" if low > 0 else "the opposite shows" if high < 0 else "does not show at this size"


def main() -> None:
    """Train, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    arguments = parser.parse_args()
    budget = Budget(arguments.epochs, arguments.images, arguments.storage)
    began = time.monotonic()
    write_missing_synthetic(recipes.quickstart().data)  # once, before the first runs start at the same time
    samples, found = train_all(budget, arguments.seeds, arguments.out / "ablation")
    result, rows = report(found)
    print(table(rows))
    arguments.out.mkdir(parents=True, exist_ok=True)
    content = {"samples": samples, "seeds": arguments.seeds, "models": result}
    (arguments.out / "ablation.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(f"wrote {arguments.out}/ablation.json; {(time.monotonic() - began) / 60:.1f} minutes")
    if arguments.docs:
        put_into_docs("ablation", f"After {samples:,} samples, {arguments.seeds} seeds:\n\n{markdown(rows)}")


def train_all(budget: Budget, num_seeds: int, logs: Path) -> tuple[int, dict[Variant, list[float]]]:
    """Train all variants with all seeds; return the samples of a run, and the AP of each."""
    logs.mkdir(parents=True, exist_ok=True)
    tasks = [(variant, seed) for seed in range(num_seeds) for variant in VARIANTS]
    found: dict[Variant, dict[int, float]] = {variant: {} for variant in VARIANTS}
    samples = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {pool.submit(train, *task, budget, logs): task for task in tasks}
        try:
            for number, future in enumerate(as_completed(running), 1):
                variant, seed = running[future]
                samples, found[variant][seed] = future.result()
                part = "whole" if variant.without is None else f"without {variant.without}"
                ap = found[variant][seed]
                print(
                    f"{number:3} of {len(tasks)}  {variant.model} {part}, seed {seed}: AP {ap:.3f}",
                    flush=True,
                )
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)  # those that run end first
            raise
    return samples, {variant: [aps[seed] for seed in range(num_seeds)] for variant, aps in found.items()}


def train(variant: Variant, seed: int, budget: Budget, logs: Path) -> tuple[int, float]:
    """Train one run, in a process; return its samples and its AP.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    recipe = RECIPES[variant.model]
    name = f"ablation-{short(recipe)}-{variant.slug}{budget.suffix}-seed{seed}"
    changes = {**budget.changes(), **variant.changes, "seed": seed}
    program = str(Path(sys.executable).with_name("raydetr"))
    assignments = [f"{path}={json.dumps(value)}" for path, value in changes.items()]
    command = [program, "train", recipe, *assignments, "--local", "--name", name, "--or-resume"]
    log = logs / f"{name}.log"
    with log.open("w") as file:
        print(shlex.join(command), file=file, flush=True)
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code != 0:
        raise RuntimeError(f"{shlex.join(command)} ended with {code}:\n{log.read_text()[-2000:]}")
    last = read_curve(Path(budget.storage) / name)[-1]
    return last[0], last[1]


def report(found: Mapping[Variant, Sequence[float]]) -> tuple[dict[str, Any], list[list[str]]]:
    """Return what is written, and the rows of the table, both by model."""
    result: dict[str, Any] = {}
    rows = [["model", "without", "AP: mean (of each seed)", f"loss [{CONFIDENCE:.0%} interval]", ""]]
    for model in dict.fromkeys(variant.model for variant in found):
        family = {variant: aps for variant, aps in found.items() if variant.model == model}
        (whole,) = (aps for variant, aps in family.items() if variant.without is None)
        result[model] = {"AP": list(whole), "without": {}}
        for variant, aps in family.items():
            each = f"{mean(aps):.3f} ({', '.join(f'{ap:.3f}' for ap in aps)})"
            if variant.without is None:
                rows.append([model, "-", each, "", ""])
                continue
            loss = loss_of(whole, aps, list(family.values()))
            interval = "" if loss.interval is None else "[{:+.3f}, {:+.3f}]".format(*loss.interval)
            rows.append(
                [model, variant.without, each, f"{loss.difference:+.3f} {interval}".rstrip(), loss.verdict]
            )
            result[model]["without"][variant.without] = {
                "AP": list(aps),
                "loss": loss.difference,
                "interval": loss.interval,
                "verdict": loss.verdict,
            }
    return result, rows


def loss_of(whole: Sequence[float], without: Sequence[float], family: Sequence[Sequence[float]]) -> Loss:
    """Return the difference of means with its interval; the variance between seeds is that of all of `family`."""
    difference, seeds = mean(whole) - mean(without), len(whole)
    if seeds == 1:
        return Loss(difference, None)
    pooled = mean(variance(aps) for aps in family)
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(family) * (seeds - 1)))
    reach = quantile * sqrt(pooled * 2 / seeds)
    return Loss(difference, (difference - reach, difference + reach))


if __name__ == "__main__":
    main()
