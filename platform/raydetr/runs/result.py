"""Summarize a finished run for the terminal: its AP, its files, and the commands that come next."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from raydetr.data.corrupt import CORRUPT_LOG
from raydetr.evaluation.coco_metrics import ApTable
from raydetr.evaluation.ground_truth import evaluation_warnings
from raydetr.store.folders import Folder
from raydetr.tracking.description import PICTURES
from raydetr.tracking.events import Event
from raydetr.tracking.upload_state import page_of, read_run_id
from raydetr.tracking.uris import default_uri
from raydetr.training import checkpoint


@dataclass(frozen=True)
class Effort:
    """What a run took, over all of its drivers."""

    seconds: float  # with start-up and restarts, without the time between its drivers
    num_restarts: int  # of the workers
    num_resumes: int  # by another driver

    @staticmethod
    def of(events: Iterable[Event]) -> Effort:
        """Return what a run with these events took."""
        ordered = sorted(events, key=lambda event: float(event["time"]))
        kinds = Counter(event["kind"] for event in ordered)
        # That a driver has died is logged by a command that finds it out later
        during = [event for event in ordered if event["kind"] != "lost"]
        seconds = sum(
            after["time"] - before["time"]
            for before, after in pairwise(during)
            if after["kind"] != "launched"
        )
        return Effort(seconds, kinds["restart"], max(0, kinds["launched"] - 1))


@dataclass(frozen=True)
class RunResult:
    """Result of a finished run."""

    folder: Folder
    tracking_uri: str
    checkpoint: Folder
    metrics: Mapping[str, Any]  # AP, AP50, ..., table, peak_rss_mb, train_seconds
    effort: Effort
    pending_upload: str | None = None  # what MLflow lacks

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def mlflow_run_id(self) -> str | None:
        """Id of the MLflow run; None if MLflow could not be reached so far."""
        return read_run_id(self.folder)

    def to_text(self) -> str:
        """Return the AP table, the run's artifacts, and the next commands."""
        metrics, folder = self.metrics, shlex.quote(str(self.folder))
        best = self._best()
        table = ApTable.from_dict(metrics["table"])
        notes = evaluation_warnings(
            metrics.get("unpredicted_images", 0), metrics.get("unreadable_records", 0)
        )
        if metrics.get("corrupt_samples"):
            notes.append(
                f"{metrics['corrupt_samples']} samples were corrupt; {self.folder / CORRUPT_LOG} lists them"
            )
        warnings = "".join(f"warning: {note}\n" for note in notes)
        activate = "" if shutil.which("raydetr") else f"\n  source {sys.prefix}/bin/activate"
        return f"""
{table.to_text()}
{warnings}trained and evaluated in {metrics["train_seconds"]:.0f} s ({self._describe_effort()}), \
peak memory {metrics["peak_rss_mb"]:.0f} MB per worker

run         {self.folder}
checkpoint  {self.checkpoint} (last); best: {best}
MLflow      {self.tracking_uri}, run {self.mlflow_run_id or "not created yet"}
artifacts   {", ".join(str(self.folder / name) for name in PICTURES if (self.folder / name).exists()) or "-"}

next:{activate}
  {self._ui_command()}  # see the run in the browser
  raydetr predict {folder}/best IMAGES --out predictions
  raydetr evaluate {folder}/best
  raydetr compare {folder} OTHER_RUN
  raydetr train RECIPE optim.lr=2e-4  # change a setting; `raydetr config RECIPE` prints all
"""

    def _describe_effort(self) -> str:
        effort, images = self.effort, self.metrics["position"]
        counts = [f"{effort.seconds:.0f} s with start-up", f"{images} images"]
        counts += [
            f"{what} {number} time{'' if number == 1 else 's'}"
            for what, number in (("workers restarted", effort.num_restarts), ("resumed", effort.num_resumes))
            if number
        ]
        return ", ".join(counts)

    def _ui_command(self) -> str:
        """Return the command that shows the run: `make ui` for the default database, or the page on a server."""
        uri = self.tracking_uri
        # Relative to the working directory, which Ray may have removed by the end of a job
        if Path("Makefile").exists() and uri == default_uri("runs"):
            return "make ui"
        page = page_of(self.folder, uri)
        if page is not None:
            return f"open {shlex.quote(page)}"
        return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"

    def _best(self) -> str:
        folder = checkpoint.best(self.folder)
        if folder is None:
            return "-"
        return f"{folder}, AP {checkpoint.read_metrics(folder)['AP']:.3f}"
