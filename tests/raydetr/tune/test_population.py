"""What a population proposes after each generation, worked out by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from raydetr.tune.population import Population, perturb, policy
from raydetr.tune.space import Distribution, Space
from raydetr.tune.trials import Evaluation, Proposal, Trial

SPACE = Space(Path("space.yaml"), "", {
    "optim.lr": Distribution("loguniform", (1e-4, 1e-2)),
    "data.train_transform.horizontal_flip": Distribution("choice", (0.0, 0.25, 0.5)),
})  # fmt: skip
POPULATION = Population(SPACE, seed=3, num_trials=4, interval=2, epochs=6)


def ended(trial: Trial, AP: float | None) -> Trial:
    """The trial after its generation: it waits, or has failed."""
    end = trial.proposals[-1].until_epoch or 6
    if AP is None:
        return replace(trial, status="failed", cause="NaN")
    evaluation = Evaluation(end * 100, end * 100, end, 0.0, {"AP": AP})
    status = "finished" if end == 6 else "waiting"
    return replace(trial, status=status, evaluations=(*trial.evaluations, evaluation))  # type: ignore[arg-type]


def begin(trials: dict[int, Trial], proposal: Proposal) -> None:
    known = trials.get(proposal.number)
    proposals = (proposal,) if known is None else (*known.proposals, proposal)
    evaluations = () if known is None else known.evaluations
    trials[proposal.number] = Trial(f"search-{proposal.number:03d}", proposals, 6, evaluations=evaluations)


def run_generation(trials: dict[int, Trial], APs: Mapping[int, float | None]) -> list[Proposal]:
    """Begin all members, let them end with these APs; return what was proposed, in order."""
    proposed = []
    while (proposal := POPULATION.propose(trials)) is not None:
        proposed.append(proposal)
        begin(trials, proposal)
    for number, AP in APs.items():
        trials[number] = ended(trials[number], AP)
    return proposed


def test_a_lagging_member_takes_over_the_leader_with_changed_values() -> None:
    trials: dict[int, Trial] = {}
    first = run_generation(trials, {1: 0.2, 2: 0.4, 3: 0.1, 4: 0.3})
    assert [(each.number, each.until_epoch, each.takes_over) for each in first] == [
        (n, 2, None) for n in (1, 2, 3, 4)
    ]
    assert len({each.overrides["optim.lr"] for each in first}) == 4
    second = run_generation(trials, {1: 0.5, 2: 0.4, 3: 0.45, 4: 0.35})
    # The one that takes over comes first: the leader must not go on before its checkpoint is copied
    assert [(each.number, each.until_epoch, each.takes_over) for each in second] == [
        (3, 4, 2), (1, 4, None), (2, 4, None), (4, 4, None)
    ]  # fmt: skip
    leader, lagging = first[1].overrides, second[0].overrides
    assert lagging["optim.lr"] != leader["optim.lr"]
    assert {each.number: each.overrides for each in second[1:]} == {
        n: first[n - 1].overrides for n in (1, 2, 4)
    }
    third = run_generation(trials, {1: 0.6, 2: 0.5, 3: 0.55, 4: 0.4})
    assert [(each.number, each.until_epoch, each.takes_over) for each in third] == [
        (4, None, 1), (1, None, None), (2, None, None), (3, None, None)
    ]  # fmt: skip
    assert POPULATION.propose(trials) is None
    assert policy(3, trials) == [(0, leader), (2, lagging)]  # the weights of 2 until epoch 2, then its own
    assert policy(1, trials) == [(0, first[0].overrides)]


def test_all_wait_for_the_slowest() -> None:
    trials: dict[int, Trial] = {}
    run_generation(trials, {1: 0.2, 2: 0.4, 3: 0.1})  # the fourth still runs
    assert POPULATION.propose(trials) is None


def test_a_member_that_failed_is_replaced_and_never_copied() -> None:
    trials: dict[int, Trial] = {}
    run_generation(trials, {1: None, 2: None, 3: 0.1, 4: None})
    second = run_generation(trials, {})
    assert {each.number: each.takes_over for each in second} == {1: 3, 2: 3, 4: 3, 3: None}


def test_without_any_leader_nobody_takes_over() -> None:
    trials: dict[int, Trial] = {}
    run_generation(trials, dict.fromkeys((1, 2, 3, 4)))
    assert {each.takes_over for each in run_generation(trials, {})} == {None}


def test_a_driver_that_died_between_two_proposals_makes_the_same_ones() -> None:
    trials: dict[int, Trial] = {}
    run_generation(trials, {1: 0.2, 2: 0.4, 3: 0.1, 4: 0.3})
    undisturbed = dict(trials)
    expected = run_generation(undisturbed, {})
    for number_done in range(4):
        again = dict(trials)
        for proposal in expected[:number_done]:
            begin(again, proposal)
        proposals = []
        while (proposal_again := POPULATION.propose(again)) is not None:
            proposals.append(proposal_again)
            begin(again, proposal_again)
        assert proposals == expected[number_done:]


@pytest.mark.parametrize(
    ("distribution", "value", "expected"),
    [
        (Distribution("uniform", (0.0, 1.0)), 0.5, {0.4, 0.6}),
        (Distribution("loguniform", (0.1, 1.0)), 0.9, {0.9 * 0.8, 1.0}),  # within the range
        (Distribution("randint", (5, 30)), 10, {8, 12}),
        (Distribution("choice", ("a", "b", "c")), "b", {"a", "c"}),
        (Distribution("choice", ("a", "b", "c")), "a", {"a", "b"}),
    ],
)
def test_a_changed_value_is_near_and_within_its_range(
    distribution: Distribution, value: object, expected: set[object]
) -> None:
    generator = random.Random(0)
    assert {perturb(distribution, value, generator) for _ in range(50)} == expected
