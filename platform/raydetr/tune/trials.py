"""Describe the trials of a search: what they were drawn with, how far they are, and how they rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

# waiting: between two generations of a population
Status = Literal["running", "waiting", "finished", "stopped by ASHA", "failed", "interrupted"]
RANKS: dict[Status, int] = {
    "finished": 0, "waiting": 1, "interrupted": 1, "running": 1, "stopped by ASHA": 2, "failed": 3,
}  # fmt: skip
# What can be minimized beside AP
Objective = Literal["latency_ms", "worker_hours"]


# Metrics of an evaluation that a search keeps: AP and AR in all variants, and what can be minimized
_KEPT = ("AP", "AR", *get_args(Objective))


def kept_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of an evaluation that a search keeps; those that are undefined are missing."""
    return {name: value for name, value in metrics.items() if name.startswith(_KEPT) and value is not None}


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of a trial.

    With other batch sizes an epoch ends at other positions, because the last batch reaches into the next epoch: trials
    are compared by `samples`.
    """

    position: int  # of the run
    samples: int  # of completed epochs
    epoch: int
    time: float  # in seconds since 1970
    metrics: Mapping[str, float]

    def get(self, name: str) -> float | None:
        """Return a metric; None if it is undefined."""
        return self.metrics.get(name)


@dataclass(frozen=True)
class Proposal:
    """What to train next: a new trial, or another generation of one."""

    number: int
    overrides: Mapping[str, Any]
    until_epoch: int | None = None  # then it waits for the others; None: it trains to its end
    takes_over: int | None = None  # the trial whose newest checkpoint it continues, in place of its own


@dataclass(frozen=True)
class Trial:
    """One configuration of a search, and the run that trains it. AP and AP50 are those of its last evaluation.

    A member of a population has a proposal for each generation so far, other trials have one.
    """

    name: str  # of its run, and of its folder
    proposals: tuple[Proposal, ...]
    epochs: int  # of its configuration
    status: Status = "running"
    evaluations: tuple[Evaluation, ...] = ()  # by position
    cause: str | None = None  # of a failure

    @property
    def number(self) -> int:
        """Number of the trial, counted from 1."""
        return self.proposals[-1].number

    @property
    def overrides(self) -> Mapping[str, Any]:
        """The drawn values by dotted path; in a population those of the last generation."""
        return self.proposals[-1].overrides

    @property
    def epoch(self) -> int:
        """Epoch of the last evaluation; 0 before the first."""
        return self.evaluations[-1].epoch if self.evaluations else 0

    @property
    def AP(self) -> float | None:
        """AP of the last evaluation."""
        return self.last("AP")

    @property
    def AP50(self) -> float | None:
        """AP at IoU 0.50 of the last evaluation."""
        return self.last("AP50")

    def AP_at(self, *, samples: int) -> float | None:
        """Return the AP of the first evaluation after so many samples."""
        return next((each.get("AP") for each in self.evaluations if each.samples >= samples), None)

    def last(self, name: str) -> float | None:
        """Return a metric of the last evaluation; None without one, or if it is undefined."""
        return self.evaluations[-1].get(name) if self.evaluations else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        names = ("number", "name", "overrides", "status", "epoch", "epochs", "AP", "AP50", "cause")
        points = [
            {"samples": each.samples, "epoch": each.epoch, "time": each.time, **each.metrics}
            for each in self.evaluations
        ]
        return {name: getattr(self, name) for name in names} | {"evaluations": points}


def rank_trials(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Sort trials, best first: finished ones, those that go on, those stopped early; each by AP."""

    def rank(trial: Trial) -> tuple[int, float, int]:
        return RANKS[trial.status], math.inf if trial.AP is None else -trial.AP, trial.number

    return tuple(sorted(trials, key=rank))


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """Return the first of the ranked trials; None if it was not evaluated."""
    return trials[0] if trials and trials[0].AP is not None else None


def pareto_front(trials: Iterable[Trial], objective: str) -> list[Trial]:
    """Return the finished trials that no other surpasses in AP and in an objective that is minimized, by AP."""
    rated = [
        (trial.AP, cost, trial)
        for trial in trials
        if trial.status == "finished" and trial.AP is not None and (cost := trial.last(objective)) is not None
    ]
    front = [
        (AP, cost, trial)
        for AP, cost, trial in rated
        if not any(
            other_AP >= AP and other_cost <= cost and (other_AP, other_cost) != (AP, cost)
            for other_AP, other_cost, _ in rated
        )
    ]
    return [trial for _, _, trial in sorted(front, key=lambda row: (-row[0], row[1], row[2].number))]
