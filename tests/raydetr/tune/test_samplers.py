"""What is drawn for trials: the same after a restart, and with TPE better than at random."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from raydetr.tune.samplers import GridSampler, RandomSampler, Sampler, TpeSampler, importances
from raydetr.tune.space import Distribution, Space
from raydetr.tune.trials import Evaluation, Proposal, Status, Trial, pareto_front

SPACE = Space(Path("space.yaml"), "", {
    "optim.lr": Distribution("loguniform", (1e-5, 1e-1)),
    "optim.schedule": Distribution("choice", ("step", "cosine")),
    "optim.min_lr_ratio": Distribution("uniform", (0.0, 0.1), ("optim.schedule", ("cosine",)), (0.0,)),
    "data.train_transform.short_sides": Distribution("choice", ([96], [96, 128])),
})  # fmt: skip


def trial(number: int, overrides: dict[str, object], status: Status = "finished", **metrics: float) -> Trial:
    evaluations = (Evaluation(104, 100, 1, 0.0, metrics),) if metrics else ()
    return Trial(f"search-{number:03d}", (Proposal(number, overrides),), 1, status, evaluations)


def quality(overrides: dict[str, object]) -> float:
    """An AP that depends on the learning rate and on the schedule."""
    lr = overrides["optim.lr"]
    assert isinstance(lr, float)
    from math import log10

    return 0.6 - 0.1 * abs(log10(lr) + 3.0) - 0.05 * (overrides["optim.schedule"] == "step")


def run(sampler: Sampler, number: int) -> list[Trial]:
    trials: list[Trial] = []
    for each in range(1, number + 1):
        overrides = sampler.sample(each, trials)
        trials.append(trial(each, overrides, AP=quality(overrides)))
    return trials


@pytest.mark.parametrize("sampler", [RandomSampler(SPACE, 3), TpeSampler(SPACE, 3, 12)])
def test_a_resumed_search_draws_the_same(sampler: Sampler) -> None:
    trials = run(sampler, 12)
    for number in (2, 7, 12):
        assert sampler.sample(number, trials[: number - 1]) == trials[number - 1].overrides
    assert len({each.overrides["optim.lr"] for each in trials}) == 12
    conditional = {each.overrides["optim.schedule"]: each.overrides["optim.min_lr_ratio"] for each in trials}
    assert conditional["step"] == 0.0
    assert conditional["cosine"] > 0.0


@pytest.mark.slow
def test_tpe_finds_better_values_than_random_search() -> None:
    def mean_of_last(make: type[RandomSampler] | type[TpeSampler]) -> float:
        last = []
        for seed in range(5):
            sampler = RandomSampler(SPACE, seed) if make is RandomSampler else TpeSampler(SPACE, seed, 30)
            last += [each.AP or 0.0 for each in run(sampler, 30)[15:]]
        return statistics.mean(last)

    assert mean_of_last(TpeSampler) > mean_of_last(RandomSampler) + 0.03


def test_trials_that_run_at_the_same_time_draw_other_values() -> None:
    sampler = TpeSampler(SPACE, 0, 12)
    trials = run(sampler, 6)
    first = sampler.sample(7, trials)
    second = sampler.sample(8, [*trials, trial(7, first, "running")])
    assert first["optim.lr"] != second["optim.lr"]


def test_stopped_and_failed_trials_count_and_do_not_break_tpe() -> None:
    sampler = TpeSampler(SPACE, 0, 12)
    trials = run(sampler, 6)
    trials.append(trial(7, dict(trials[0].overrides), "stopped by ASHA", AP=0.2))
    trials.append(trial(8, dict(trials[1].overrides), "failed"))
    assert sampler.sample(9, trials).keys() <= SPACE.distributions.keys()


def test_two_objectives_have_a_front() -> None:
    sampler = TpeSampler(SPACE, 0, 12, "latency_ms")
    trials: list[Trial] = []
    for number in range(1, 13):
        overrides = sampler.sample(number, trials)
        lr = overrides["optim.lr"]
        trials.append(trial(number, overrides, AP=quality(overrides), latency_ms=10 + 1000 * lr))
    front = pareto_front(trials, "latency_ms")

    # Brute force: nobody in the front is surpassed, everybody else is
    def surpassed(one: Trial) -> bool:
        return any(
            (o.AP or 0) >= (one.AP or 0)
            and (o.last("latency_ms") or 0) <= (one.last("latency_ms") or 0)
            and (o.AP, o.last("latency_ms")) != (one.AP, one.last("latency_ms"))
            for o in trials
        )

    assert {each.number for each in front} == {each.number for each in trials if not surpassed(each)}
    assert [each.AP for each in front] == sorted((each.AP or 0.0 for each in front), reverse=True)


def test_a_grid_has_each_combination_once_without_those_that_are_not_drawn() -> None:
    space = Space(Path("space.yaml"), "", {
        "optim.schedule": Distribution("choice", ("step", "cosine")),
        "optim.min_lr_ratio": Distribution("choice", (0.0, 0.1), ("optim.schedule", ("cosine",))),
        "model.num_queries": Distribution("randint", (3, 4)),
    })  # fmt: skip
    sampler = GridSampler(space.grid())
    assert [tuple(sampler.sample(number, ()).values()) for number in range(1, 7)] == [
        ("step", 3), ("step", 4), ("cosine", 0.0, 3), ("cosine", 0.0, 4), ("cosine", 0.1, 3), ("cosine", 0.1, 4),
    ]  # fmt: skip
    assert len(space.grid()) == 6


def test_the_importance_of_a_path_is_its_share_in_the_variance() -> None:
    trials = run(RandomSampler(SPACE, 1), 40)
    shares = importances(SPACE, trials, samples=100)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert next(iter(shares)) == "optim.lr"
    assert shares["optim.lr"] > 0.6  # its part of the variance is 0.01 * 16 / 12 of 0.0133 + 0.0006
    assert shares["data.train_transform.short_sides"] < 0.1
    assert importances(SPACE, trials[:3], samples=100) == {}
    assert importances(SPACE, trials, samples=101) == {}  # nobody was evaluated there
