"""Decide in the driver what a search trains next, and record how its trials go on.

Nothing here waits: Ray Tune calls it in the loop that serves all trials.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Protocol

from raydetr.config import override
from raydetr.console import print_status
from raydetr.store.background import BackgroundThreads
from raydetr.store.folders import remove_folder
from raydetr.tracking.events import EventLog
from raydetr.training import checkpoint
from raydetr.tune.asha import Asha
from raydetr.tune.record import log_end, log_proposal
from raydetr.tune.samplers import Sampler
from raydetr.tune.trial import SearchContext
from raydetr.tune.trials import Evaluation, Proposal, Trial, kept_metrics

OPEN = ("running", "waiting", "interrupted")  # statuses of trials that go on


class Algorithm(Protocol):
    """Proposes what a search trains. It has no state: all depends on the recorded trials."""

    @property
    def num_trials(self) -> int:
        """Number of trials that it proposes."""

    def propose(self, trials: Mapping[int, Trial]) -> Proposal | None:
        """Return what to train next; None if nothing can begin before a trial that runs has ended, or at all."""


@dataclass(frozen=True)
class Sampling:
    """Proposes independent trials."""

    num_trials: int
    sampler: Sampler

    def propose(self, trials: Mapping[int, Trial]) -> Proposal | None:
        """Return the next trial; None after the last one."""
        number = max(trials, default=0) + 1
        if number > self.num_trials:
            return None
        return Proposal(number, self.sampler.sample(number, trials.values()))


class Coordinator:
    """Holds the trials of a search by number.

    Args:
        context: of the search.
        algorithm: proposes what to train.
        asha: stops trials early; None: all train to their end.
        log: of the search.
        trials: of an earlier driver, whose open ones go on.
        max_concurrent: trials that run at the same time.
    """

    def __init__(
        self,
        context: SearchContext,
        algorithm: Algorithm,
        asha: Asha | None,
        log: EventLog,
        trials: Mapping[int, Trial],
        max_concurrent: int,
    ) -> None:
        self._context, self._algorithm, self._asha, self._log = context, algorithm, asha, log
        self._max_concurrent = max_concurrent
        self.trials = dict(trials)
        self._judge_last_evaluations()
        self._to_go_on = [
            number for number, trial in self.trials.items() if trial.status in ("running", "interrupted")
        ]
        self.running: set[int] = set()
        self._stopped: set[int] = set()  # by ASHA, and not ended yet
        self._threads = BackgroundThreads(1, "checkpoints")
        self._copying: tuple[Proposal, Future[None]] | None = None
        self.is_held = False  # a trial of another search waits for workers: begin nothing new

    @property
    def is_done(self) -> bool:
        """Return whether all trials have ended."""
        return len(self.trials) == self._algorithm.num_trials and not any(
            trial.status in OPEN for trial in self.trials.values()
        )

    def next(self) -> Proposal | None:
        """Return what to begin now; None: nothing."""
        if self._copying is not None:
            return self._copied()
        # At least one trial of this search goes on, or waits in its turn
        if len(self.running) >= self._max_concurrent or (self.is_held and self.running):
            return None
        if self._to_go_on:
            number = self._to_go_on.pop(0)
            return self._begin(self.trials[number].proposals[-1])
        proposal = self._algorithm.propose(self.trials)
        if proposal is None or proposal.takes_over is None:
            return None if proposal is None else self._begin(proposal)
        self._copying = (proposal, self._threads.submit(self._take_over, proposal))
        return None

    @property
    def may_propose(self) -> bool:
        """Return whether something can begin later: a trial runs, goes on, or gets a checkpoint."""
        return bool(self.running or self._to_go_on or self._copying)

    def add_evaluation(self, number: int, metrics: Mapping[str, Any]) -> bool:
        """Record an evaluation; return whether the trial is to stop."""
        trial = self.trials[number]
        if any(each.position == metrics["position"] for each in trial.evaluations):
            return False  # of a trial that goes on, which reports its last one again
        numbers = kept_metrics(metrics)
        samples = metrics["epoch"] * metrics["samples_per_epoch"]
        evaluation = Evaluation(metrics["position"], samples, metrics["epoch"], time.time(), numbers)
        trial = replace(trial, evaluations=(*trial.evaluations, evaluation))
        self.trials[number] = trial
        if self._asha is not None and self._asha.stops(trial, self.trials.values()):
            self._stopped.add(number)
            return True
        return False

    def end(self, number: int, failure: str | None = None) -> Trial:
        """Record that the process of a trial has ended; return the trial."""
        trial = self.trials[number]
        until = trial.proposals[-1].until_epoch
        if failure is not None:
            trial = replace(trial, status="failed", cause=failure)
        elif number in self._stopped:
            trial = replace(trial, status="stopped by ASHA")
        elif trial.epoch >= trial.epochs:
            trial = replace(trial, status="finished")
        elif until is not None and trial.epoch >= until:
            trial = replace(trial, status="waiting")
        else:
            trial = replace(trial, status="failed", cause="it ended without its last evaluation")
        self._record(trial)
        return trial

    def remove_checkpoints(self, trial: Trial) -> None:
        """Remove the checkpoints of a trial that has ended; print a warning if they cannot be."""
        try:
            remove_folder(self._context.trial_folder(trial.number) / checkpoint.CHECKPOINTS)
        except OSError as error:
            print_status(f"warning: the checkpoints of trial {trial.number} cannot be removed: {error}")

    def _judge_last_evaluations(self) -> None:
        """Stop the trials whose last evaluation the driver before this one did not see."""
        for trial in list(self.trials.values()):
            if self._asha is None or trial.status not in OPEN or not trial.evaluations:
                continue
            if self._asha.stops(trial, self.trials.values()):
                self.trials[trial.number] = replace(trial, status="stopped by ASHA")
                log_end(self._log, self.trials[trial.number])

    def interrupt(self) -> None:
        """Record that the trials that run are interrupted."""
        for trial in list(self.trials.values()):
            if trial.status == "running":
                self._record(replace(trial, status="interrupted"))

    def _record(self, trial: Trial) -> None:
        self.running.discard(trial.number)
        self.trials[trial.number] = trial
        log_end(self._log, trial)

    def _begin(self, proposal: Proposal) -> Proposal:
        known = self.trials.get(proposal.number)
        if known is None:
            epochs = override(self._context.config, proposal.overrides).optim.epochs
            known = Trial(self._context.trial_name(proposal.number), (proposal,), epochs)
        elif known.proposals[-1] != proposal:
            known = replace(known, proposals=(*known.proposals, proposal))
        self.trials[proposal.number] = replace(known, status="running", cause=None)
        self.running.add(proposal.number)
        log_proposal(self._log, proposal)
        return proposal

    def _take_over(self, proposal: Proposal) -> None:
        """Copy the checkpoint that a trial takes over; called in a thread."""
        assert proposal.takes_over is not None
        leader = self.trials[proposal.takes_over]
        end = leader.proposals[len(self.trials[proposal.number].proposals) - 1].until_epoch
        position = next(each.position for each in leader.evaluations if each.epoch == end)
        source = checkpoint.folder_of(self._context.trial_folder(leader.number), position)
        folder = self._context.trial_folder(proposal.number)
        checkpoint.take_over(folder, source)
        log = EventLog(folder)
        log.append("taken_over", position=position, source=leader.name, overrides=dict(proposal.overrides))
        log.flush()

    def _copied(self) -> Proposal | None:
        assert self._copying is not None
        proposal, copying = self._copying
        if not copying.done():
            return None
        self._copying = None
        error = copying.exception()
        if error is None:
            return self._begin(proposal)
        # It keeps its own weights: a member is not lost because another's checkpoint cannot be read
        print_status(
            f"warning: trial {proposal.number} cannot take over the checkpoint of trial {proposal.takes_over}: {error}"
        )
        own = self.trials[proposal.number].overrides
        return self._begin(replace(proposal, overrides=own, takes_over=None))
