"""What a run keeps for people: AP tables, learning curves, pictures. In its folder and in MLflow.

One process's part of a run: the loop, with its checkpoints, metrics, pictures and progress.

What differs between Ray Train and a single local process comes in as a `Host`: how a checkpoint is
published, how progress is shown. There is no Ray here.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from detrs import zoo
from raydetr.config import RunConfig, from_dict
from raydetr.console import Progress
from raydetr.data.corrupt import LEDGER, Damage, default_budget
from raydetr.data.splits import open_splits
from raydetr.evaluation.coco_metrics import AP_FILE, ApTable, coco_ap
from raydetr.evaluation.ground_truth import ground_truth
from raydetr.shards.images import UNREADABLE, decode_rgb
from raydetr.shards.reader import ShardError, Shards
from raydetr.tracking.history import History
from raydetr.tracking.mlflow_run import Tracker, TrackingError
from raydetr.training import checkpoint, init_weights
from raydetr.training.loop import EvaluationReport, StepReport, Training, train
from raydetr.training.nonfinite import Skipped
from raydetr.training.world import World
from raydetr.visualization.boxes import Picture, coco_boxes, draw_grid
from raydetr.visualization.curves import learning_curves

NUM_PICTURES = 8
SCORE_THRESHOLD = 0.3  # of the boxes that are drawn


def log_table(tracker: Tracker, table: ApTable) -> None:
    """The AP table of the last evaluation, for people and for programs."""
    tracker.text(json.dumps(table.to_dict(), indent=1), AP_FILE)
    tracker.text(table.to_markdown(), str(Path(AP_FILE).with_suffix(".md")))


def log_pictures(
    tracker: Tracker, folder: Path, history: History, shards: Shards, results: Sequence[dict[str, Any]]
) -> None:
    """Learning curves, and a grid of validation pictures with true and predicted boxes."""
    curves = folder / "curves.png"
    learning_curves(
        losses=history.curves("loss", "step"),
        rates=history.curves("lr/", "step"),
        precision=history.curves("AP", "epoch"),
    ).savefig(curves)
    tracker.artifact(curves)
    grid = folder / "predictions.png"
    draw_grid(_pictures(shards, results), score_threshold=SCORE_THRESHOLD).save(grid)
    tracker.artifact(grid)


def _pictures(shards: Shards, results: Sequence[dict[str, Any]]) -> list[Picture]:
    """Images spread evenly over the split."""
    names = {category["id"]: category["name"] for category in shards.manifest.categories}
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    number = min(NUM_PICTURES, shards.num_samples)
    pictures = []
    for index in (i * shards.num_samples // number for i in range(number)):
        try:
            sample = shards.read(index)
            image: Image.Image = decode_rgb(sample.image)
        except (ShardError, *UNREADABLE):  # the evaluation before has raised, or noted it
            continue
        pictures.append(
            Picture(
                title=str(sample.record["file_name"]),
                image=image,
                true=coco_boxes([a for a in sample.annotations if not a.get("iscrowd")], names),
                predicted=coco_boxes(by_image[sample.record["id"]], names, SCORE_THRESHOLD),
            )
        )
    return pictures


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assignment:
    """What every worker of a run is told."""

    config: dict[str, Any]  # of the resolved RunConfig
    run_name: str
    folder: str  # of the run, seen by all workers
    tracking_uri: str
    mlflow_run_id: str
    resume_from: str | None  # checkpoint folder

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the way to a worker."""
        return asdict(self)


class Host(Protocol):
    """What runs the session."""

    def publish(self, name: str, metrics: Mapping[str, Any], write: checkpoint.Writer | None) -> None:
        """Keep a checkpoint (`write` writes it into a folder; None on all but the first worker)."""

    def show(self, progress: Progress) -> None:
        """Show how far the run is."""


def run_session(assignment: Assignment, world: World, host: Host) -> None:
    """Train and evaluate to the end, as one of `world.size` processes.

    Raises:
        CheckpointError: `resume_from` or `init.checkpoint` cannot be used.
        FloatingPointError: more steps than `optim.max_skipped_steps` were not finite.
        ShardError: a sample is damaged, and `data.on_damage` is "raise".
        DamageError: more samples are damaged than `data.max_damaged` allows.
    """
    config = from_dict(assignment.config)
    train_shards, val_shards = open_splits(config.data, sizes_known=True)
    torch.manual_seed(config.seed)  # the initial weights are the same on every worker
    model = zoo.build(config.model)
    if assignment.resume_from is None:
        init_weights.load(model.detector, config)
    training = Training(config, model, train_shards.num_samples, world)
    if assignment.resume_from is not None:
        checkpoint.restore(Path(assignment.resume_from), training, train_shards)
    session = _Session(assignment, training, train_shards, val_shards, host)
    try:
        session.run()
    finally:
        session.close()


class _Session:
    def __init__(
        self,
        assignment: Assignment,
        training: Training,
        train_shards: Shards,
        val_shards: Shards,
        host: Host,
    ) -> None:
        self.assignment, self.training, self.host = assignment, training, host
        self.config: RunConfig = training.config
        self.train_shards, self.val_shards = train_shards, val_shards
        self.is_first = training.world.is_first
        self.folder = Path(assignment.folder)
        if self.is_first:
            training.ledger.write(self.folder)
        self.tracker = Tracker(assignment.tracking_uri, assignment.mlflow_run_id) if self.is_first else None
        self.history = History(Path(assignment.folder) / "history.jsonl", training.position, self.is_first)
        self.first_step = training.step
        self.began = time.perf_counter()
        self.shown_at = -1.0
        self.loss: float | None = None
        self.ap: float | None = self.history.last_ap()
        self.warning: str | None = None

    def run(self) -> None:
        for report in train(self.training, self.train_shards, self.val_shards):
            match report:
                case StepReport():
                    self._on_step(report)
                case EvaluationReport():
                    self._on_evaluation(report)

    def close(self) -> None:
        """Send what is left to MLflow. A server that is down does not undo a training that is done."""
        if self.tracker is not None:
            try:
                self.tracker.close()
            except TrackingError as error:
                log.error("%s; history.jsonl in %s has the metrics", error, self.assignment.folder)

    def _on_step(self, report: StepReport) -> None:
        if report.skipped is not None and report.skipped.faults:
            self._on_skipped(report, report.skipped)
        if report.damage:
            self._on_damage(report, report.damage)
            if self.is_first:
                self._show("training", report.images_per_second)
        if not self.is_first:
            return
        if report.terms is not None:
            self.loss = report.terms["loss"]
            metrics = {**report.terms, "images_per_second": report.images_per_second}
            self._log(report.step, report.position, metrics)
        now = time.perf_counter()
        if now - self.shown_at > 0.5:
            self.shown_at = now
            self._show("training", report.images_per_second)

    def _on_skipped(self, report: StepReport, skipped: Skipped) -> None:
        """Keep what is needed to find the cause; stop the run, on every worker, when it was too often."""
        training, run = self.training, Path(self.assignment.folder)
        skipped.dump(run, training.world.rank)
        training.world.gather(None)  # all dumps are complete before anybody stops
        self.warning = f"skipped {skipped.describe(run)}"
        if self.is_first:
            self._log(report.step, report.position, {"skipped_steps": training.skipped_steps})
            self._show("training", report.images_per_second)
        budget = self.config.optim.max_skipped_steps
        if training.skipped_steps > budget:
            raise FloatingPointError(
                f"{skipped.describe(run)}. Steps skipped because they were not finite: "
                f"{training.skipped_steps}, and optim.max_skipped_steps is {budget}. "
                "Lower optim.lr, or look at these images and their boxes."
            )

    def _on_damage(self, report: StepReport | EvaluationReport, met: tuple[Damage, ...]) -> None:
        """Note damaged samples, on every worker; stop the run, on every worker, when they are too many."""
        training, ledger = self.training, self.training.ledger
        ledger.add(met, self.folder if self.is_first else None)
        more = f" (and {len(met) - 1} more)" if len(met) > 1 else ""
        self.warning = f"damaged: {met[0]}{more}; {ledger.num_samples} so far, all in {self.folder / LEDGER}"
        if self.is_first:
            self._log(training.step, report.position, {"damaged_samples": ledger.num_samples})
        limit = self.config.data.max_damaged
        budget = default_budget(training.num_samples) if limit is None else limit
        if ledger.num_samples > budget:
            training.world.gather(None)  # the file is complete before anybody stops
            ledger.check(budget, self.folder)

    def _on_evaluation(self, report: EvaluationReport) -> None:
        metrics: dict[str, Any] = {"epoch": report.epoch, "position": report.position}
        if report.damage:
            self._on_damage(report, report.damage)
        metrics["unpredicted_images"] = len(report.damage)
        metrics["damaged_samples"] = self.training.ledger.num_samples
        if self.is_first:
            truth = ground_truth(self.val_shards, self.config.data.on_damage)
            metrics["lost_annotations"] = truth.num_lost
            metrics |= self._record(coco_ap(truth.coco, report.results), report)
        metrics["skipped_steps"] = self.training.skipped_steps
        metrics["peak_rss_mb"] = max(self.training.world.gather(_peak_rss_mb()))
        metrics["train_seconds"] = time.perf_counter() - self.began
        self.host.publish(f"epoch-{report.epoch:04d}", metrics, self._writer(report, metrics))

    def _record(self, table: ApTable, report: EvaluationReport) -> dict[str, Any]:
        """Log an evaluation on the first worker; returns its numbers."""
        assert self.tracker is not None
        numbers = {name: value for name, value in table.numbers.items() if value >= 0}  # -1: undefined
        self.ap = numbers.get("AP")
        self._log(self.training.step, report.position, {**numbers, "epoch": report.epoch})
        log_table(self.tracker, table)
        folder = Path(self.assignment.folder)
        log_pictures(self.tracker, folder, self.history, self.val_shards, report.results)
        self._show("evaluated", 0.0)
        return {**numbers, "table": table.to_dict()}

    def _log(self, step: int, position: int, metrics: Mapping[str, float]) -> None:
        assert self.tracker is not None
        self.tracker.metrics(step, metrics)
        self.history.append(step, position, metrics)

    def _writer(self, report: EvaluationReport, metrics: Mapping[str, Any]) -> checkpoint.Writer | None:
        if not self.is_first:
            return None
        return lambda folder: checkpoint.save(folder, self.training, self.train_shards, report.epoch, metrics)

    def _show(self, phase: str, images_per_second: float) -> None:
        training = self.training
        self.host.show(
            Progress(
                step=training.step,
                total_steps=training.total_steps,
                first_step=self.first_step,
                epoch=training.position / training.num_samples,
                epochs=self.config.optim.epochs,
                seconds=time.perf_counter() - self.began,
                images_per_second=images_per_second,
                loss=self.loss,
                ap=self.ap,
                damaged=self.training.ledger.num_samples,
                phase=phase,
                warning=self.warning,
            )
        )


def _peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
