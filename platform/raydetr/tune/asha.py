"""Stop the worse part of the trials early: ASHA.

Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", in the variant of its section 3.3 that stops
trials instead of pausing them, as Ray Tune's ASHAScheduler.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from raydetr.tune.trials import Evaluation, Trial


@dataclass(frozen=True)
class Asha:
    """Stops a trial at a rung if it is not among the best 1 / `reduction_factor` of those that were there before it.

    The rungs are at `grace_samples`, and at each multiple of it by a power of `reduction_factor`. They count samples:
    trials with other batch sizes or numbers of epochs are compared after equal training. The decisions depend on the
    recorded evaluations alone, so that a resumed search makes the same ones.
    """

    grace_samples: int
    reduction_factor: int

    def stops(self, trial: Trial, others: Iterable[Trial]) -> bool:
        """Return whether a trial is to stop after its last evaluation.

        It never stops at its last epoch: it has finished, and is still storing its results.
        """
        last = trial.evaluations[-1]
        if last.epoch >= trial.epochs or last.get("AP") is None:
            return False
        rung = self._rung(last.samples)
        if rung is None or any(self._rung(each.samples) == rung for each in trial.evaluations[:-1]):
            return False
        # As an evaluation is what counts, the rungs of other trials are those that they had reached by then
        reached = [self._score_at(other, rung, last.time) for other in others if other.number != trial.number]
        scores = [score for score in reached if score is not None]
        if not scores:
            return False
        cutoff = np.percentile(scores, 100 * (1 - 1 / self.reduction_factor))
        return bool(last.metrics["AP"] < cutoff)

    def _rung(self, samples: int) -> int | None:
        """Return the number of the highest rung that is reached after so many samples; None before the first."""
        number, needed = None, self.grace_samples
        while needed <= samples:
            number = 0 if number is None else number + 1
            needed *= self.reduction_factor
        return number

    def _score_at(self, trial: Trial, rung: int, before: float) -> float | None:
        """Return the AP of a trial at its first evaluation on a rung, if that was `before`."""
        found = next((each for each in trial.evaluations if self._rung(each.samples) == rung), None)
        return found.get("AP") if isinstance(found, Evaluation) and found.time <= before else None
