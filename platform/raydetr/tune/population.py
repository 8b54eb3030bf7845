"""Train a population: trials that lag take over the weights of leading ones, with changed hyperparameters.

Jaderberg et al. 2017, "Population Based Training of Neural Networks", with truncation selection (section 4.1.1) and
perturbation or resampling (4.1.2). The population advances in generations of some epochs; after each one all wait for
the slowest. So any number of trials fits on any number of workers, and what happens depends on the seed and on the
results alone, not on which trial was faster.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydetr.tune.samplers import seed_of
from raydetr.tune.space import Distribution, Space
from raydetr.tune.trials import Proposal, Trial

QUANTILE = 0.25  # of the population that is replaced, and that is copied
RESAMPLE_PROBABILITY = 0.25
FACTORS = (0.8, 1.2)


@dataclass(frozen=True)
class Population:
    """Proposes the generations of a population's members.

    Args:
        space: of the search; without `when`.
        seed: of the search.
        num_trials: members of the population.
        interval: epochs of a generation.
        epochs: of a complete training.
    """

    space: Space
    seed: int
    num_trials: int
    interval: int
    epochs: int

    def propose(self, trials: Mapping[int, Trial]) -> Proposal | None:
        """Return what to train next; None if all that is left has to wait for a trial that runs, or nothing is left.

        Members that take over another's checkpoint come first: the other does not go on before they have it.
        """
        for number in range(1, self.num_trials + 1):
            if number not in trials:
                drawn = self.space.draw_random(random.Random(seed_of(self.seed, number)))
                return Proposal(number, drawn, self._end(0))
        generation = min(len(trial.proposals) for trial in trials.values()) - 1
        if self._end(generation) is None or not all(
            _has_ended(trial, generation) for trial in trials.values()
        ):
            return None
        proposals = [
            proposal
            for proposal in self.next_generation(generation, list(trials.values()))
            if len(trials[proposal.number].proposals) == generation + 1
        ]
        return min(
            proposals, key=lambda proposal: (proposal.takes_over is None, proposal.number), default=None
        )

    def next_generation(self, generation: int, trials: Sequence[Trial]) -> list[Proposal]:
        """Return what all members do after a generation, counted from 0, that all have ended."""
        epoch = self._end(generation)
        assert epoch is not None

        def AP_of(trial: Trial) -> float:
            found = next((each.get("AP") for each in trial.evaluations if each.epoch == epoch), None)
            return -math.inf if found is None else found  # a member that has failed, or has found nothing

        ranked = sorted(trials, key=lambda trial: (-AP_of(trial), trial.number))
        num_replaced = max(1, int(QUANTILE * len(ranked)))
        leaders = [trial for trial in ranked[:num_replaced] if AP_of(trial) > -math.inf]
        lagging = {trial.number for trial in ranked[num_replaced:][-num_replaced:]}
        lagging |= {trial.number for trial in ranked if AP_of(trial) == -math.inf}
        proposals = []
        for trial in trials:
            overrides, takes_over = trial.proposals[generation].overrides, None
            if leaders and trial.number in lagging:
                generator = random.Random(seed_of(self.seed, trial.number, generation + 1))
                leader = generator.choice(leaders)
                overrides, takes_over = (
                    self._explore(leader.proposals[generation].overrides, generator),
                    leader.number,
                )
            proposals.append(Proposal(trial.number, overrides, self._end(generation + 1), takes_over))
        return proposals

    def _end(self, generation: int) -> int | None:
        """Return the epoch at which a generation ends; None for the last one, which trains to the end."""
        end = (generation + 1) * self.interval
        return None if end >= self.epochs else end

    def _explore(self, overrides: Mapping[str, Any], generator: random.Random) -> dict[str, Any]:
        def change(path: str, distribution: Distribution) -> Any:
            if generator.random() < RESAMPLE_PROBABILITY:
                return distribution.draw(generator)
            return perturb(distribution, overrides[path], generator)

        return self.space.draw(change)


def perturb(distribution: Distribution, value: Any, generator: random.Random) -> Any:
    """Return a value near another one: a number times 0.8 or 1.2, within its range; the choice before or after it."""
    values = distribution.values
    if distribution.kind == "choice":
        index = values.index(value) + generator.choice((-1, 1))
        return values[min(max(index, 0), len(values) - 1)]
    low, high = values
    changed = value * generator.choice(FACTORS)
    if distribution.kind == "randint":
        changed = round(changed)
    return min(max(changed, low), high)


def _has_ended(trial: Trial, generation: int) -> bool:
    """Return whether a member has ended a generation: it waits, has failed, or is in a later one."""
    return len(trial.proposals) > generation + 1 or trial.status in ("waiting", "failed")


def policy(number: int, trials: Mapping[int, Trial]) -> list[tuple[int, Mapping[str, Any]]]:
    """Return how the weights of a member came about: (epoch, overrides from this epoch on), the first epoch being 0.

    Training one run with it, from the seed of the search, gives the same weights.
    """
    steps: list[tuple[int, Mapping[str, Any]]] = []
    for generation in reversed(range(len(trials[number].proposals))):
        proposal = trials[number].proposals[generation]
        began = 0 if generation == 0 else trials[number].proposals[generation - 1].until_epoch
        assert began is not None
        steps.append((began, proposal.overrides))
        number = number if proposal.takes_over is None else proposal.takes_over
    steps.reverse()
    return [step for index, step in enumerate(steps) if index == 0 or step[1] != steps[index - 1][1]]
