"""Score the evaluations of a run while its training goes on.

A thread prepares the files, starts a process for each evaluation, one at a time, and puts what it computes into the
run's folder. Training asks now and then for what is finished.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raydetr.config import Engine, OnCorrupt
from raydetr.evaluation import stored
from raydetr.evaluation.coco_metrics import ApTable
from raydetr.evaluation.ground_truth import UNREADABLE, ground_truth, ground_truth_file, store_ground_truth
from raydetr.evaluation.read_images import store_images
from raydetr.evaluation.score import INVALID, Request, read_table, score, write_request
from raydetr.evaluation.score import __name__ as score_module
from raydetr.evaluation.stored import Evaluated
from raydetr.shards.reader import Shards
from raydetr.store.background import BackgroundThreads
from raydetr.store.folders import Folder, with_retry_seconds, write_file

TRIES = 2
PAUSE_SECONDS = 1.0  # between them
RETRY_SECONDS = 30.0  # of an outage of a server
# The cores belong to the training
ONE_THREAD = dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class ScoringError(RuntimeError):
    """An evaluation could not be scored; the message has the reason and the remedy."""


class _ProcessError(Exception):
    """The process that scores failed."""


@dataclass(frozen=True)
class Scored:
    """An evaluation with its AP. `problem` is why files of it are not in the run's folder; None: all are."""

    evaluated: Evaluated
    table: ApTable
    speed: Mapping[str, float]  # see `score.speed`
    num_unreadable_records: int
    problem: str | None = None


@dataclass(frozen=True)
class Unscored:
    """An evaluation that a process could not score, and why not."""

    evaluated: Evaluated
    source: Folder | None  # see `Scoring.add`
    reason: str


class Scoring:
    """Scores evaluations of one run, in the order in which they were added.

    Args:
        run: folder of the run.
        shards: of the validation split.
        policy: for corrupt samples.
        engine: what computes AP.
        has_report: write the report of each evaluation, too.
        on_failure: is called, in a thread, with the position of an evaluation and why a try to score it failed.
    """

    def __init__(
        self,
        run: Folder,
        shards: Shards,
        policy: OnCorrupt,
        engine: Engine,
        has_report: bool,
        on_failure: Callable[[int, str], None],
    ) -> None:
        self._run = with_retry_seconds(run, RETRY_SECONDS)
        self._shards, self._policy, self._engine, self._on_failure = shards, policy, engine, on_failure
        self._has_report = has_report
        self._thread = BackgroundThreads(1, "scoring")
        self._waiting: list[Future[Scored | Unscored]] = []
        self._process: subprocess.Popen[str] | None = None
        self._is_closed = False

    def add(self, evaluated: Evaluated, source: Folder | None = None) -> None:
        """Score an evaluation in the background.

        Args:
            evaluated: its arrays are complete.
            source: a folder with them that takes the place of the one in the run's folder.
        """
        self._waiting.append(self._thread.submit(self._score, evaluated, source))

    @property
    def num_waiting(self) -> int:
        """Number of evaluations that `take` has not returned yet."""
        return len(self._waiting)

    def take(self, seconds: float = 0.0) -> list[Scored | Unscored]:
        """Return the evaluations that were scored since the last call; wait for the first one at most `seconds`.

        Raises:
            ValueError: a detection is not finite.
            ShardError: a sample is corrupt, and the policy is "raise".
        """
        if self._waiting and seconds:
            deadline = time.monotonic() + seconds
            while not self._waiting[0].done() and time.monotonic() < deadline:
                time.sleep(min(0.02, seconds))
        done: list[Scored | Unscored] = []
        while self._waiting and self._waiting[0].done():
            done.append(self._waiting.pop(0).result())
        return done

    def score_here(self, unscored: Unscored) -> Scored:
        """Score an evaluation in this process, as the last resort.

        Raises:
            ScoringError: it cannot be.
            ValueError, ShardError: see `take`.
        """
        evaluated = unscored.evaluated
        folder = stored.folder_of(self._run, evaluated.position)
        try:
            truth = ground_truth(self._shards, self._policy)
            parts = stored.read_parts(unscored.source or folder, evaluated.num_ranks)
            fields = _fields(evaluated, truth.num_unreadable_records)
            files = score(truth.coco, parts, self._engine, fields)
        except OSError as error:
            raise ScoringError(
                f"the evaluation at position {evaluated.position} could not be scored: {unscored.reason}; and in this "
                f"process: {error}. Its detections are in {unscored.source or folder}: `raydetr train --resume "
                f"{self._run}` tries again"
            ) from error
        return _scored(evaluated, files, truth.num_unreadable_records, _write(files, folder))

    def close(self) -> None:
        """End the process, if one runs."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()

    # --- In the thread ---

    def _score(self, evaluated: Evaluated, source: Folder | None) -> Scored | Unscored:
        reason = ""
        for number in range(TRIES):
            if self._is_closed:
                break
            time.sleep(PAUSE_SECONDS if number else 0)
            try:
                return self._try(evaluated, source)
            except (OSError, _ProcessError) as error:
                reason = f"{error}" or type(error).__name__
            if not self._is_closed:
                self._on_failure(evaluated.position, reason)
        return Unscored(evaluated, source, reason)

    def _try(self, evaluated: Evaluated, source: Folder | None) -> Scored:
        folder = stored.folder_of(self._run, evaluated.position)
        with tempfile.TemporaryDirectory(prefix="raydetr-scoring-") as name:
            scratch = Path(name)
            truth, unreadable = self._ground_truth(scratch)
            out = scratch / "out"
            arrays = [stored.detections_file(source or folder, rank) for rank in range(evaluated.num_ranks)]
            request = Request(
                ground_truth=str(truth),
                detections=[str(_local(file, scratch / f"{rank}.npz")) for rank, file in enumerate(arrays)],
                out=str(out),
                engine=self._engine,
                evaluation=_fields(evaluated, unreadable),
            )
            self._run_process(request, scratch)
            problem = self._explain(request, scratch) if self._has_report else None
            files = {
                str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()
            }
            return _scored(evaluated, files, unreadable, _write(files, folder) or problem)

    def _explain(self, request: Request, scratch: Path) -> str | None:
        """Write the report of an evaluation, in a process of its own, because it takes more memory than its AP.

        Returns:
            Why there is none, or why it has no images: the AP does not depend on it. None: it is complete.
        """
        problem: str | None = None
        images = scratch / "images"

        def on_started(process: subprocess.Popen[str]) -> None:
            nonlocal problem
            assert process.stdout is not None
            asked = process.stdout.readline()  # empty if the process has failed
            try:
                store_images(self._shards, json.loads(asked or "[]"), images)
            except Exception as error:  # whatever it is: a run must not end for a picture
                problem = f"the report of an evaluation lacks images: {error}"

        try:
            self._run_process(replace(request, images=str(images)), scratch, on_started)
        except (OSError, ValueError, _ProcessError) as error:
            return f"an evaluation has no report: {error}"
        return problem

    def _ground_truth(self, scratch: Path) -> tuple[Path, int]:
        """Return a file of this machine with the ground truth, and how many of its records cannot be read."""
        try:
            unreadable = store_ground_truth(self._run, self._shards, self._policy)
            file = ground_truth_file(self._run, self._shards.fingerprint)
        except OSError:  # the disk is full, or the server away: a file of this machine does
            unreadable = store_ground_truth(scratch, self._shards, self._policy)
            file = ground_truth_file(scratch, self._shards.fingerprint)
        return _local(file, scratch / "ground-truth.json"), unreadable

    def _run_process(
        self,
        request: Request,
        scratch: Path,
        on_started: Callable[[subprocess.Popen[str]], None] = lambda process: None,
    ) -> None:
        """Score in a process.

        Args:
            request: what it is to do.
            scratch: folder for the request.
            on_started: is called with the process, before its standard input is closed.

        Raises:
            _ProcessError: the process failed.
            ValueError: the detections cannot be scored.
        """
        file = scratch / "request.json"
        write_request(request, file)
        # What this process can import
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", score_module, str(file)],
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the training, which stops after a step
        )
        if self._is_closed:
            self._process.kill()
        on_started(self._process)
        _, errors = self._process.communicate()
        status, self._process = self._process.returncode, None
        last = errors.strip().splitlines()[-1] if errors.strip() else ""
        if status == INVALID:
            raise ValueError(last)
        if status != 0:
            cause = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise _ProcessError(f"its process {cause}" + (f": {last}" if last else ""))


def _local(file: Folder, copy: Path) -> Path:
    """Return a file of this machine with the same content: itself, or a copy."""
    if isinstance(file, Path):
        return file
    copy.write_bytes(file.read_bytes())
    return copy


def _fields(evaluated: Evaluated, num_unreadable: int) -> dict[str, Any]:
    """Return what evaluation.json has besides the scores."""
    names = ("position", "step", "epoch", "fingerprint")
    return {name: getattr(evaluated, name) for name in names} | {UNREADABLE: num_unreadable}


def _scored(
    evaluated: Evaluated, files: Mapping[str, bytes], num_unreadable: int, problem: str | None
) -> Scored:
    content = json.loads(files[stored.EVALUATION])
    return Scored(evaluated, read_table(content), content["speed"], num_unreadable, problem)


def _write(files: Mapping[str, bytes], folder: Folder) -> str | None:
    """Write the files of an evaluation, evaluation.json last; return why they cannot be written."""
    try:
        for name in sorted(files, key=lambda name: (name == stored.EVALUATION, name)):
            write_file(folder / name, files[name])
    except OSError as error:  # the AP is known: the events and the checkpoint will have it
        return f"not all files of an evaluation can be written: {error}"
    return None
