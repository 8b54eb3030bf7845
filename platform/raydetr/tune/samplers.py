"""Draw the configurations of trials: at random, from a grid, or by a model of the results so far (TPE).

What is drawn for a trial depends on the seed, the number of the trial and the results so far, not on a generator's
state: a search that was killed goes on with the same configurations.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from raydetr.tune.space import Distribution, Space
from raydetr.tune.trials import Objective, Trial

MAX_STARTUP_TRIALS = 10  # Optuna's default


class Sampler(Protocol):
    """Draws configurations."""

    def sample(self, number: int, trials: Iterable[Trial]) -> dict[str, Any]:
        """Return the overrides of trial `number`, counted from 1, knowing the trials before it."""


@dataclass(frozen=True)
class RandomSampler:
    """Draws each configuration independently of the others."""

    space: Space
    seed: int

    def sample(self, number: int, trials: Iterable[Trial]) -> dict[str, Any]:
        """Return the overrides of a trial; see `Sampler`."""
        return self.space.draw_random(random.Random(seed_of(self.seed, number)))


@dataclass(frozen=True)
class GridSampler:
    """Goes through all configurations of a space."""

    configurations: list[dict[str, Any]]

    def sample(self, number: int, trials: Iterable[Trial]) -> dict[str, Any]:
        """Return the overrides of a trial; see `Sampler`."""
        return self.configurations[number - 1]


@dataclass(frozen=True)
class TpeSampler:
    """Draws where the results so far promise most: the tree-structured Parzen estimator of Optuna.

    Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization"; with two objectives its multi-objective variant
    (Ozaki et al. 2020). The first trials, a third of all and at most 10, are random. Trials that ASHA has stopped count
    with their AP and the samples they have seen, which together with ASHA is the idea of BOHB (Falkner et al. 2018).
    """

    space: Space
    seed: int
    num_trials: int
    objective: Objective | None = None

    def sample(self, number: int, trials: Iterable[Trial]) -> dict[str, Any]:
        """Return the overrides of a trial; see `Sampler`."""
        sampler = optuna.samplers.TPESampler(
            seed=seed_of(self.seed, number),
            n_startup_trials=max(1, min(MAX_STARTUP_TRIALS, self.num_trials // 3)),
            constant_liar=True,  # trials that run at the same time do not draw the same
        )
        study = as_study(
            self.space, [trial for trial in trials if trial.number < number], self.objective, sampler
        )
        asked = study.ask()

        def suggest(path: str, distribution: Distribution) -> Any:
            values = distribution.values
            match distribution.kind:
                case "choice":
                    return values[asked.suggest_categorical(path, range(len(values)))]
                case "randint":
                    return asked.suggest_int(path, *values)
                case _:
                    return asked.suggest_float(path, *values, log=distribution.kind == "loguniform")

        return self.space.draw(suggest)


def as_study(
    space: Space,
    trials: Iterable[Trial],
    objective: Objective | None = None,
    sampler: optuna.samplers.BaseSampler | None = None,
) -> optuna.Study:
    """Return the trials as a study of Optuna. A choice is the number of its value, which can be of any type."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = [StudyDirection.MAXIMIZE] + [StudyDirection.MINIMIZE] * (objective is not None)
    study = optuna.create_study(directions=directions, sampler=sampler)
    for trial in sorted(trials, key=lambda trial: trial.number):
        study.add_trial(_as_optuna(space, trial, objective))
    return study


def _as_optuna(space: Space, trial: Trial, objective: Objective | None) -> optuna.trial.FrozenTrial:
    drawn = {path: one for path, one in space.distributions.items() if space.is_drawn(path, trial.overrides)}
    params = {path: _param(one, trial.overrides[path]) for path, one in drawn.items()}
    distributions = {path: _distribution(one) for path, one in drawn.items()}
    costs = [] if objective is None else [trial.last(objective)]
    values = [value for value in (trial.AP, *costs) if value is not None]
    is_complete = trial.status == "finished" and len(values) == 1 + len(costs)
    scores = {each.samples: each.metrics["AP"] for each in trial.evaluations if each.get("AP") is not None}
    if is_complete:
        state = TrialState.COMPLETE
    elif trial.status in ("running", "waiting", "interrupted"):
        state = TrialState.RUNNING
    else:
        is_pruned = trial.status == "stopped by ASHA" and scores and objective is None
        state = TrialState.PRUNED if is_pruned else TrialState.FAIL
    return create_trial(
        state=state,
        params=params,
        distributions=distributions,
        values=values if is_complete else None,
        intermediate_values=scores if objective is None else None,
    )


def _param(distribution: Distribution, value: Any) -> Any:
    return distribution.values.index(value) if distribution.kind == "choice" else value


def _distribution(distribution: Distribution) -> BaseDistribution:
    values = distribution.values
    match distribution.kind:
        case "choice":
            return CategoricalDistribution(range(len(values)))
        case "randint":
            return IntDistribution(*values)
        case _:
            low, high = values
            return FloatDistribution(low, high, log=distribution.kind == "loguniform")


def importances(space: Space, trials: Iterable[Trial], samples: int) -> Mapping[str, float]:
    """Return the share of each path in the variance of AP after `samples` samples, by fANOVA; they sum to 1.

    Hutter et al. 2014, "An Efficient Approach for Assessing Hyperparameter Importance". A path that only some trials
    have is left out. Empty if fewer than four trials are known, or if their AP does not differ.

    Args:
        space: of the search.
        trials: of the search.
        samples: after which trials are compared; those without an evaluation there do not count.
    """
    rated = [(trial, AP) for trial in trials if (AP := trial.AP_at(samples=samples)) is not None]
    if len(rated) < 4 or len({AP for _, AP in rated}) == 1:
        return {}
    study = as_study(space, [])
    for trial, AP in rated:
        drawn = {
            path: one for path, one in space.distributions.items() if space.is_drawn(path, trial.overrides)
        }
        study.add_trial(
            create_trial(
                params={path: _param(one, trial.overrides[path]) for path, one in drawn.items()},
                distributions={path: _distribution(one) for path, one in drawn.items()},
                value=AP,
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return {
        path: float(share)
        for path, share in optuna.importance.get_param_importances(study, evaluator=evaluator).items()
    }


def seed_of(*parts: object) -> int:
    """Return a seed of 32 bits that differs for other parts, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
