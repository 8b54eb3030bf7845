"""Search the quickstart's hyperparameters with ASHA, and count the epochs that it saves.

    make tune-demo                  # the search, in minutes on two cores
    make tune-demo ARGS=--full      # after it, all trials to their end, to see whether the best one was lost

Writes build/tune-demo.json: {trials, epochs_run, epochs_full, best_AP, best_AP_full, seconds, leaked}, where `full` is
all trials to the end (best_AP_full is null without --full).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from raydetr import recipes
from raydetr.config import RunConfig, override
from raydetr.tune.record import SearchOptions
from raydetr.tune.result import SearchResult
from raydetr.tune.search import search

SPACE = """\
optim.lr: {loguniform: [1.0e-4, 2.0e-2]}
optim.weight_decay: {choice: [0.0, 1.0e-4, 1.0e-2]}
model.num_queries: {randint: [15, 40]}
model.loss.kind: {choice: [mal, focal]}
"""
TRIALS, EPOCHS, IMAGES = 10, 9, 500
GRACE_EPOCHS = 3  # earlier, the order of the trials says little about that at the end
OUT = Path("build/tune-demo.json")


def main() -> None:
    """Run one search, or two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="train all trials to their end, too")
    arguments = parser.parse_args()
    config = override(
        recipes.quickstart(),
        {
            "optim.epochs": EPOCHS,
            "data.limit_images": IMAGES,
            "evaluation.every_epochs": 1,
            "evaluation.report": False,
            "cluster.num_workers": 1,
            "tracking.experiment": "tune-demo",
        },
    )
    OUT.parent.mkdir(exist_ok=True)
    space = OUT.with_name("tune-demo-space.yaml")
    space.write_text(SPACE)
    asha, seconds = run(config, space, "asha")
    full = run(config, space, "random")[0] if arguments.full else None
    found = {
        "trials": len(asha.trials),
        "epochs_run": sum(trial.epoch for trial in asha.trials),
        "epochs_full": sum(trial.epochs for trial in asha.trials),
        "best_AP": best_AP(asha),
        "best_AP_full": None if full is None else best_AP(full),
        "seconds": round(seconds, 1),
        "leaked": len(asha.leaked),
    }
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    saved = 1 - found["epochs_run"] / found["epochs_full"]
    print(
        f"{json.dumps(found)}\nASHA saved {saved:.0%} of the epochs; pictures and the table are in {asha.folder}"
    )


def run(config: RunConfig, space: Path, algorithm: str) -> tuple[SearchResult, float]:
    """Search with as many trials at once as there are cores; return the result, and the seconds it took."""
    cores = len(os.sched_getaffinity(0))
    began = time.perf_counter()
    options = SearchOptions(algorithm, TRIALS, cores, GRACE_EPOCHS)  # type: ignore[arg-type]
    result = search(config, space, options)
    print(result.to_text())
    return result, time.perf_counter() - began


def best_AP(result: SearchResult) -> float | None:
    """Return the highest AP among the trials that finished."""
    return max(
        (trial.AP for trial in result.trials if trial.status == "finished" and trial.AP is not None),
        default=None,
    )


if __name__ == "__main__":
    main()
