"""What a command says when it is done: the numbers, where things are, what to type next."""

from __future__ import annotations

import shutil
import sys

from raydetr.data.corrupt import LEDGER
from raydetr.evaluation.coco_metrics import ApTable
from raydetr.evaluation.ground_truth import caveats
from raydetr.runs.overfit import Overfit
from raydetr.runs.run import RunResult


def summary(result: RunResult) -> str:
    """The AP table of a run, its artifacts, and the next commands."""
    metrics = result.metrics
    table = ApTable.from_dict(metrics["table"])
    notes = caveats(metrics.get("unpredicted_images", 0), metrics.get("lost_annotations", 0))
    if metrics.get("damaged_samples"):
        notes.append(
            f"{metrics['damaged_samples']} samples were damaged; {result.folder / LEDGER} lists them"
        )
    warnings = "".join(f"warning: {note}\n" for note in notes)
    activate = "" if shutil.which("raydetr") else f"\n  source {sys.prefix}/bin/activate"
    return f"""
{table.to_text()}
{warnings}trained and evaluated in {metrics["train_seconds"]:.0f} s ({result.seconds:.0f} s with start-up), \
peak memory {metrics["peak_rss_mb"]:.0f} MB a worker

run         {result.folder}
checkpoint  {result.checkpoint}
MLflow      {result.tracking_uri}, run {result.mlflow_run_id}
artifacts   {result.folder / "predictions.png"}, {result.folder / "curves.png"}

next:{activate}
  make ui                                        # look at the run in the browser
  raydetr predict {result.checkpoint} IMAGES --out predictions
  raydetr evaluate {result.checkpoint}
  raydetr train RECIPE optim.lr=2e-4             # change a setting; `raydetr config RECIPE` shows all
  raydetr compare {result.name} OTHER_RUN
"""


def overfit_summary(outcome: Overfit) -> str:
    """The verdict on an overfit."""
    verdict = (
        "the model learns these images: data, labels and set-up fit together"
        if outcome.AP50 >= 0.8
        else "the model did not learn them: look at the picture; are the boxes where the objects are?"
    )
    return (
        f"{outcome.images} images, {outcome.steps} steps, {outcome.seconds:.0f} s: "
        f"AP {outcome.AP:.3f}, AP50 {outcome.AP50:.3f}\n{verdict}\npicture  {outcome.picture}\nrun      {outcome.run}"
    )
