"""Run the training loop in one process of a run, with its checkpoints, metrics, images and progress.

There is no Ray here. Evaluations and progress go to a `Reporter`, of which there is one for Ray Train and one for a
single local process.
"""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from detrs import zoo
from raydetr.console import RunProgress
from raydetr.data.corrupt import CORRUPT_LOG, CorruptSample, CorruptSampleLog, default_max_corrupt
from raydetr.data.splits import open_splits
from raydetr.environment import describe_environment
from raydetr.evaluation import stored
from raydetr.evaluation.scoring import Scored, Scoring, Unscored
from raydetr.evaluation.stored import Evaluated
from raydetr.runs.run_folder import Run
from raydetr.shards.reader import Shards
from raydetr.store.background import BackgroundThreads
from raydetr.store.folders import with_retry_seconds, write_file
from raydetr.tracking.description import PICTURES
from raydetr.tracking.events import EventLog, Metrics, read_events
from raydetr.tracking.system_metrics import SystemMetrics
from raydetr.training import checkpoint, init_weights
from raydetr.training.checkpoint_writer import CheckpointWriter, Written
from raydetr.training.loop import EvaluationReport, StepReport, Training, train
from raydetr.training.nonfinite import SkippedStep
from raydetr.training.world import World

SHOW_SECONDS = 0.5  # between two updates of the progress
EVALUATION_WAITS = 60.0  # seconds, for the checkpoint before it
EVENTS_WAIT = 10.0  # seconds, for the events before a checkpoint; it is written then in any case
QUICK_SECONDS = 5.0  # of an outage, for what is not worth more
WRITE_WAITS = 60.0  # seconds, for a file of an evaluation, which may be large


class Reporter(Protocol):
    """Connects a session with its driver: through Ray Train, or in a local process."""

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Report the metrics of an evaluation, plain values. All ranks call it, with `Run.waits_for_scores` only."""

    def show(self, progress: RunProgress) -> None:
        """Show the progress of the run, without waiting for anything."""

    def should_stop(self) -> bool:
        """Return whether the driver was asked to stop the run, without waiting for anything."""


def run_session(run: Run, world: World, reporter: Reporter) -> None:
    """Train and evaluate to the end, or until the run is to stop, as one of `world.size` processes.

    Raises:
        CheckpointError: `resume_from` or `init.checkpoint` cannot be used.
        FloatingPointError: more steps than `optim.max_skipped_steps` were not finite.
        ShardError: a sample is corrupt, and `data.on_corrupt` is "raise".
        TooManyCorruptError: more samples are corrupt than `data.max_corrupt` allows.
        StorageError: no checkpoint could be written for `storage.max_minutes_without_checkpoint`.
        ScoringError: an evaluation could not be scored.
        RemoteError: a server of shards cannot be reached.
        LoaderError: a loader process died.
        ValueError: the shards or the model cannot be used, or a prediction is not finite.
        RuntimeError: another worker died.
    """
    config = run.config
    train_shards, val_shards = open_splits(config.data, sizes_known=True)
    torch.manual_seed(config.seed)  # the initial weights are the same on every worker
    # A checkpoint has all weights: the file of the backbone's weights, which this machine may lack, is not read
    has_weights = run.resume_from is not None or config.init.checkpoint is not None
    backbone = replace(config.model.backbone, weights=None) if has_weights else config.model.backbone
    model = zoo.build(replace(config.model, backbone=backbone))
    if run.resume_from is None:
        init_weights.load(model.detector, config, train_shards.label_map)
    training = Training(config, model, train_shards.num_samples, world)
    training.until_epoch = run.until_epoch
    unscored: Evaluated | None = None
    if run.resume_from is not None:
        checkpoint.restore(run.resume_from, training, train_shards)
        unscored = _take_over_evaluation(run, training, val_shards)
    training.should_stop = reporter.should_stop
    session = _Session(run, training, train_shards, val_shards, reporter, unscored)
    try:
        session.run()
    finally:
        session.close()


def _take_over_evaluation(run: Run, training: Training, val_shards: Shards) -> Evaluated | None:
    """Return the evaluation at the position of `training` that a process had made, and not scored, when it was killed.

    It is not made again.
    """
    evaluated: Evaluated | None = None
    if training.lacks_evaluation and training.world.is_main:
        # The other ranks wait for the answer, and must not wait for a rank that has failed
        with suppress(OSError):
            evaluated = stored.read_evaluated(stored.folder_of(run.folder, training.position))
        if evaluated is not None and evaluated.fingerprint != val_shards.fingerprint:
            evaluated = None
    evaluated = training.world.all_gather(evaluated)[0]  # rank 0 decides for all
    if evaluated is not None:
        training.lacks_evaluation = False
        training.corrupt_log.add(CorruptSampleLog.from_dicts(evaluated.metrics["corrupt_rows"]).rows)
    return evaluated


class _Session:
    def __init__(
        self,
        run: Run,
        training: Training,
        train_shards: Shards,
        val_shards: Shards,
        reporter: Reporter,
        unscored: Evaluated | None,  # at the position of `training`
    ) -> None:
        self.config, self.folder = run.config, run.folder
        # For what training waits for
        self.quick_folder = with_retry_seconds(run.folder, QUICK_SECONDS)
        self.training, self.reporter = training, reporter
        self.train_shards, self.val_shards = train_shards, val_shards
        self.is_main = training.world.is_main
        self.events = EventLog(run.folder)
        # The events of all steps up to a checkpoint are there before it: a process that is killed loses none of those
        # that are not trained again
        self.writer = (
            CheckpointWriter(
                run.folder, run.config.storage, self._on_written, lambda: self.events.flush(EVENTS_WAIT)
            )
            if self.is_main
            else None
        )
        self.waits_for_scores = run.waits_for_scores
        self.scoring = (
            Scoring(
                run.folder,
                val_shards,
                run.config.data.on_corrupt,
                run.config.evaluation.engine,
                run.config.evaluation.report,
                self._on_failed_scoring,
            )
            if self.is_main
            else None
        )
        self.unscored: list[Unscored] = []
        # Arrays of evaluations, by position, that could not be written into the run's folder
        self.temporary: dict[int, TemporaryDirectory[str]] = {}
        self.writing = BackgroundThreads(1, str(run.folder))
        self.drawing = BackgroundThreads(1, "pictures")
        self.drawn: Future[None] | None = None
        self.metrics = Metrics(read_events(run.folder) if self.is_main else ())
        self.earlier_seconds = self.metrics.seconds
        self.earlier_cpu_seconds = self.metrics.last("cpu_seconds") or 0.0
        self.first_step = training.step
        self.began = time.perf_counter()
        self.shown_at = -1.0
        self.images_per_second = 0.0
        self.loss: float | None = None
        self.warning: str | None = None
        self.checkpoint_problem: str | None = None
        self.corrupt_log_problem: str | None = None
        self.scoring_problem: str | None = None
        self.picture_problem: str | None = None
        # The last problem of each kind, which was shown; each is shown once
        self.shown_problems: dict[str, str] = {}
        self.phase = "training"
        self.system_metrics: SystemMetrics | None = None
        if training.world.local_rank == 0:
            node = socket.gethostname()
            self.events.append("environment", json_files={f"environment/{node}.json": describe_environment()})
            self.system_metrics = SystemMetrics(node, self._log_system)
        if self.is_main:
            self._write_corrupt_log()
            kind = "started" if run.resume_from is None else "resumed"
            self._add_event(kind, step=training.step, position=training.position, workers=training.world.size,
                            total_steps=training.total_steps, samples_per_epoch=training.num_samples,
                            epochs=run.config.optim.epochs)  # fmt: skip
        self.ap: float | None = self.metrics.last("AP")
        if self.is_main:
            training.on_evaluation_batch = lambda: self._show_now_and_then("evaluating")
            if training.lacks_evaluation:
                self._begin_evaluation(training.position)
            self._add_unscored(unscored)
        if unscored is not None and run.waits_for_scores:
            self._report(unscored.position, unscored.metrics)

    def run(self) -> None:
        for report in train(self.training, self.train_shards, self.val_shards):
            match report:
                case StepReport():
                    self._on_step(report)
                case EvaluationReport():
                    self._on_evaluation(report)
        if self.writer is not None:
            if not self.training.is_stopping:
                self._wait_for_scores(or_stop=True)
            self._take_scores()  # the resumed run scores what is not scored yet
            self._show("writing the checkpoint")
            self.writer.finish()
            if self.drawn is not None:
                self.drawn.result()
                self._show(self.phase)  # why a picture is missing

    def close(self) -> None:
        """Write the last events."""
        if self.system_metrics is not None:
            self.system_metrics.close()
        if self.scoring is not None:
            self.scoring.close()
        if self.writer is not None:
            self.writer.close()
        if not self.events.flush():
            self.warning = self.events.problem
            self._show(self.phase)

    def _on_step(self, report: StepReport) -> None:
        self.images_per_second = report.images_per_second
        if report.skipped is not None and report.skipped.causes:
            self._on_skipped(report, report.skipped)
        if report.corrupt:
            self._on_corrupt(report, report.corrupt)
            if self.is_main:
                self._show("training")
        if not self.is_main:
            return
        if report.terms is not None:
            self.loss = report.terms["loss"]
            metrics = {**report.terms, "images_per_second": report.images_per_second}
            self._log(report.step, report.position, metrics)
        self._save_checkpoint(report)
        self._take_scores()
        self._show_now_and_then("training")

    def _show_now_and_then(self, phase: str) -> None:
        now = time.perf_counter()
        if now - self.shown_at > SHOW_SECONDS:
            self.shown_at = now
            self._show(phase)

    def _save_checkpoint(self, report: StepReport) -> None:
        assert self.writer is not None
        self.writer.check()
        is_stopping = self.training.is_stopping
        if report.is_evaluated and not is_stopping:
            self._begin_evaluation(report.position)
        if report.is_evaluated or is_stopping or self.writer.is_due(report.step):
            self.writer.save(self.training, self.train_shards)
        if report.is_evaluated and not is_stopping:
            # On the disk before an evaluation begins, which can take long, or fail. If it cannot be written, the
            # evaluation is not kept waiting.
            self.writer.wait(EVALUATION_WAITS, or_failed=True)

    def _on_written(self, written: Written) -> None:
        """Log what became of a checkpoint; called in the writer's thread."""
        fields = {"position": written.position, "seconds": round(written.seconds, 3)}
        if written.error is None:
            self.events.append("checkpoint", **fields, bytes=written.num_bytes)
        else:
            self.events.append("checkpoint_failed", **fields, error=written.error)
            self.checkpoint_problem = (
                f"the checkpoint at position {written.position} cannot be written ({written.error}); training goes on, "
                "and it is tried again"
            )

    def _on_skipped(self, report: StepReport, skipped: SkippedStep) -> None:
        """Write a skipped step to disk, to find its cause; stop the run, on every worker, after too many of them."""
        training = self.training
        try:
            self._write(lambda: skipped.dump(self.quick_folder, training.world.rank))
            problem = ""
        except Exception as error:  # whatever it is: a copy of the batch must not end a run
            problem = f". Not all of it could be written: {type(error).__name__}: {error}"
        training.world.all_gather(None)  # all dumps are complete before any worker stops
        self.warning = f"skipped {skipped.describe(self.folder)}{problem}"
        if self.is_main:
            self._log(report.step, report.position, {"skipped_steps": training.skipped_steps})
            self._show("training")
        limit = self.config.optim.max_skipped_steps
        if training.skipped_steps > limit:
            raise FloatingPointError(
                f"{skipped.describe(self.folder)}. Steps skipped because they were not finite: "
                f"{training.skipped_steps}, and optim.max_skipped_steps is {limit}. "
                "Lower optim.lr, or check these images and their boxes."
            )

    def _on_corrupt(self, report: StepReport | EvaluationReport, found: tuple[CorruptSample, ...]) -> None:
        """Log corrupt samples, on every worker; stop the run, on every worker, when there are too many."""
        training, corrupt_log = self.training, self.training.corrupt_log
        corrupt_log.add(found)
        self._write_corrupt_log()
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        self.warning = (
            f"corrupt: {found[0]}{more}; {corrupt_log.num_samples} so far, all in {self.folder / CORRUPT_LOG}"
        )
        if self.is_main:
            for row in found:
                self._add_event("corrupt", position=report.position, sample=str(row))
            self._log(training.step, report.position, {"corrupt_samples": corrupt_log.num_samples})
        limit = self.config.data.max_corrupt
        limit = default_max_corrupt(training.num_samples) if limit is None else limit
        if corrupt_log.num_samples > limit:
            training.world.all_gather(None)  # no worker stops before the file is complete
            corrupt_log.check(limit, self.folder)

    def _write_corrupt_log(self) -> None:
        if not self.is_main:
            return
        try:
            self._write(lambda: self.training.corrupt_log.write(self.quick_folder))
        except OSError as error:  # a full disk, perhaps: the events and the checkpoints have the rows, too
            self.corrupt_log_problem = f"{self.folder / CORRUPT_LOG} cannot be written: {error}"

    def _write(self, write: Callable[[], None]) -> None:
        """Write in a thread, and wait for it, but not for ever: a mounted folder may not answer at all.

        Raises:
            OSError: it cannot be written, or not within WRITE_WAITS.
        """
        self.writing.call(write, WRITE_WAITS)

    # --- Evaluations ---

    def _begin_evaluation(self, position: int) -> None:
        """Prepare for the evaluation at a position, which a process that was killed may have begun before."""
        assert self.writer is not None
        self.writer.expect(position)
        folder = stored.folder_of(self.quick_folder, position)
        with suppress(OSError):  # the arrays of this evaluation will replace the others
            self._write(lambda: stored.discard(folder))

    def _add_unscored(self, last: Evaluated | None) -> None:
        """Score what a process that was killed had evaluated, and not scored: `last`, and earlier evaluations."""
        assert self.writer is not None
        assert self.scoring is not None
        recorded = {row["position"] for row in self.metrics.rows if "epoch" in row}
        for evaluated in stored.complete_evaluations(self.folder):
            position = evaluated.position
            is_ours = evaluated.fingerprint == self.val_shards.fingerprint
            is_unscored = position <= self.training.position and not self._is_scored(position, recorded)
            if is_ours and (is_unscored or evaluated == last):
                self.writer.expect(position)
                self.scoring.add(evaluated)

    def _is_scored(self, position: int, recorded: Collection[int]) -> bool:
        """Return whether the AP at a position is in the events, and beside the checkpoint if that is there."""
        folder = checkpoint.folder_of(self.folder, position)
        has_metrics = bool(checkpoint.read_metrics(folder)) or not (folder / "meta.json").exists()
        return position in recorded and has_metrics

    def _on_evaluation(self, report: EvaluationReport) -> None:
        if report.corrupt:
            self._on_corrupt(report, report.corrupt)
        arrays = self._write_detections(report)
        spent = self.training.world.all_gather((_peak_rss_mb(), self.training.cpu_seconds))
        metrics: dict[str, Any] = {
            "epoch": report.epoch,
            "position": report.position,
            "samples_per_epoch": self.training.num_samples,
            "unpredicted_images": len(report.corrupt),
            "corrupt_rows": [asdict(row) for row in report.corrupt],
            "corrupt_samples": self.training.corrupt_log.num_samples,
            "skipped_steps": self.training.skipped_steps,
            "peak_rss_mb": max(memory for memory, _ in spent),
            "evaluation_seconds": report.seconds,
            "cpu_seconds": self.earlier_cpu_seconds + sum(seconds for _, seconds in spent),
        }
        if self.scoring is not None:
            evaluated = Evaluated(
                position=report.position,
                step=report.step,
                epoch=report.epoch,
                num_ranks=self.training.world.size,
                fingerprint=self.val_shards.fingerprint,
                metrics=metrics,
            )
            if arrays is None:
                self._mark_complete(evaluated)
            else:
                self.temporary[report.position] = arrays
            self.scoring.add(evaluated, None if arrays is None else Path(arrays.name))
        if self.waits_for_scores:
            self._report(report.position, metrics)

    def _report(self, position: int, metrics: dict[str, Any]) -> None:
        """Report an evaluation to the search, with its AP from rank 0; all ranks call it equally often."""
        self.reporter.report(self._wait_for_scores()[position] if self.is_main else metrics)

    def _write_detections(self, report: EvaluationReport) -> TemporaryDirectory[str] | None:
        """Write the arrays of this worker, and wait until those of all workers are written.

        Returns:
            In rank 0, if they cannot be written: a folder of this machine with the arrays of all workers.
        """
        world, content = self.training.world, report.detections.to_npz()
        folder = stored.folder_of(self.quick_folder, report.position)
        problem: str | None = None
        try:
            self._write(lambda: write_file(stored.detections_file(folder, world.rank), content))
        except OSError as error:  # a full disk, perhaps: it must not end the run
            problem = str(error)
        problem = next((each for each in world.all_gather(problem) if each is not None), None)
        if problem is None:
            return None
        self.warning = f"the detections of this evaluation are scored, but cannot be kept: {problem}"
        contents = world.gather(content)
        if contents is None:
            return None
        arrays = TemporaryDirectory(prefix="raydetr-detections-", ignore_cleanup_errors=True)
        for rank, each in enumerate(contents):
            write_file(stored.detections_file(Path(arrays.name), rank), each)
        return arrays

    def _mark_complete(self, evaluated: Evaluated) -> None:
        folder = stored.folder_of(self.quick_folder, evaluated.position)
        try:
            self._write(lambda: stored.mark_complete(folder, evaluated))
        except OSError as error:
            # If this process is killed before the scoring is done, it is evaluated again
            self.warning = str(error)

    def _on_failed_scoring(self, position: int, reason: str) -> None:
        """Log a failed try; called in a thread."""
        self.events.append("scoring_failed", position=position, reason=reason)
        self.scoring_problem = f"the evaluation at position {position} is not scored yet: {reason}"

    def _take_scores(self, seconds: float = 0.0) -> dict[int, dict[str, Any]]:
        """Record the evaluations that were scored since the last call; return their metrics by position."""
        assert self.scoring is not None
        metrics = {}
        for outcome in self.scoring.take(seconds):
            if isinstance(outcome, Scored):
                metrics[outcome.evaluated.position] = self._record(outcome)
            else:
                self.unscored.append(outcome)
        return metrics

    def _wait_for_scores(self, *, or_stop: bool = False) -> dict[int, dict[str, Any]]:
        """Record all evaluations, when the run ends, or a search is to choose by them; return their metrics.

        With `or_stop`, until the run is to stop.
        """
        assert self.scoring is not None
        assert self.writer is not None
        metrics: dict[int, dict[str, Any]] = {}
        while self.scoring.num_waiting:
            if or_stop and self.reporter.should_stop():
                return metrics
            self._show_now_and_then("scoring")
            self.writer.check()
            metrics |= self._take_scores(SHOW_SECONDS)
        while self.unscored:
            outcome = self.scoring.score_here(self.unscored[0])
            del self.unscored[0]
            metrics[outcome.evaluated.position] = self._record(outcome)
        return metrics

    def _record(self, scored: Scored) -> dict[str, Any]:
        """Log a scored evaluation, and write its metrics beside its checkpoint; return them."""
        assert self.writer is not None
        evaluated, table = scored.evaluated, scored.table
        self.warning = scored.problem or self.warning
        numbers = {name: value for name, value in table.numbers.items() if value >= 0}  # -1: undefined
        if scored.speed:
            numbers["latency_ms"] = scored.speed["latency_ms"]
            numbers["evaluation_images_per_second"] = scored.speed["images_per_second"]
        train_seconds = self.earlier_seconds + time.perf_counter() - self.began
        # With the present number of workers, also for the time before a restart with another one
        numbers["worker_hours"] = train_seconds * self.training.world.size / 3600
        if not any("epoch" in row and row["position"] == evaluated.position for row in self.metrics.rows):
            spent = {"epoch": evaluated.epoch, "cpu_seconds": evaluated.metrics["cpu_seconds"]}
            self._log(evaluated.step, evaluated.position, {**numbers, **spent}, "evaluation")
        self.ap = self.metrics.last("AP")
        metrics = {
            **evaluated.metrics,
            "unreadable_records": scored.num_unreadable_records,
            "train_seconds": train_seconds,
            **numbers,
            "table": table.to_dict(),
        }
        self.writer.record(evaluated.position, metrics)
        so_far = Metrics()
        so_far.rows = list(self.metrics.rows)
        self.drawn = self.drawing.submit(self._draw, evaluated, so_far)
        self._show("evaluated")
        return metrics

    def _draw(self, evaluated: Evaluated, so_far: Metrics) -> None:
        """Write the pictures of an evaluation; called in a thread."""
        from raydetr.runs.pictures import write_pictures  # matplotlib would delay every start of a worker

        arrays = self.temporary.pop(evaluated.position, None)
        folder = stored.folder_of(self.quick_folder, evaluated.position)
        source = folder if arrays is None else Path(arrays.name)
        self.picture_problem = write_pictures(
            self.quick_folder, so_far, self.val_shards, source, evaluated.num_ranks
        )
        self.events.append("files", files=list(PICTURES))
        if arrays is not None:
            arrays.cleanup()

    def _log(self, step: int, position: int, metrics: Mapping[str, float], kind: str = "step") -> None:
        self._add_event(kind, step=step, position=position, metrics=dict(metrics))

    def _log_system(self, metrics: Mapping[str, float]) -> None:
        """Log metrics of this node; called in a thread, on one worker of each node."""
        self.events.append("system", step=self.training.step, metrics=metrics)

    def _add_event(self, kind: str, **fields: Any) -> None:
        self.metrics.add(self.events.append(kind, **fields))

    def _show(self, phase: str) -> None:
        training, self.phase = self.training, phase
        problems = {
            "events": self.events.problem,
            "checkpoint": self.checkpoint_problem,
            "older checkpoints": None if self.writer is None else self.writer.cleanup_problem,
            "corrupt samples": self.corrupt_log_problem,
            "scoring": self.scoring_problem,
            "pictures": self.picture_problem,
        }
        for name, problem in problems.items():
            if problem is not None and problem != self.shown_problems.get(name):
                self.shown_problems[name] = self.warning = problem
        self.reporter.show(
            RunProgress(
                step=training.step,
                total_steps=training.total_steps,
                first_step=self.first_step,
                epoch=min(training.position / training.num_samples, self.config.optim.epochs),
                epochs=self.config.optim.epochs,
                seconds=time.perf_counter() - self.began,
                images_per_second=self.images_per_second,
                loss=self.loss,
                ap=self.ap,
                corrupt=training.corrupt_log.num_samples,
                phase=phase,
                warning=self.warning,
            )
        )


def _peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
