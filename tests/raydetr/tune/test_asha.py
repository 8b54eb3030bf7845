"""ASHA against Ray Tune's own scheduler, a second implementation."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from raydetr.tune.asha import Asha
from raydetr.tune.trials import Evaluation, Proposal, Trial

SAMPLES = 100  # of an epoch


def trial(number: int, epochs: int) -> Trial:
    return Trial(f"search-{number:03d}", (Proposal(number, {}),), epochs)


@pytest.mark.parametrize(("grace", "factor"), [(1, 2), (1, 3), (2, 3), (3, 4)])
def test_it_stops_the_same_trials_as_ray_tune(grace: int, factor: int) -> None:
    epochs = 20
    for seed in range(20):
        generator = random.Random(seed)
        asha = Asha(grace * SAMPLES, factor)
        reference = ASHAScheduler(
            "epoch", "AP", "max", max_t=1000, grace_period=grace, reduction_factor=factor
        )
        trials = {number: trial(number, epochs + 1) for number in range(12)}
        fakes = {number: SimpleNamespace(trial_id=str(number)) for number in trials}
        for fake in fakes.values():
            reference.on_trial_add(None, fake)  # type: ignore[arg-type]
        time, stopped = 0.0, set()
        while len(stopped) < len(trials) and any(each.epoch < epochs for each in trials.values()):
            number = generator.choice(
                [n for n, each in trials.items() if n not in stopped and each.epoch < epochs] or [0]
            )
            if number in stopped or trials[number].epoch >= epochs:
                break
            time += 1.0
            epoch, AP = trials[number].epoch + 1, round(generator.random(), 2)
            one = Evaluation(
                epoch * SAMPLES + generator.randint(0, 5), epoch * SAMPLES, epoch, time, {"AP": AP}
            )
            trials[number] = replace(trials[number], evaluations=(*trials[number].evaluations, one))
            result: dict[str, Any] = {"epoch": epoch, "AP": AP}
            expected = reference.on_trial_result(None, fakes[number], result)  # type: ignore[arg-type]
            stops = asha.stops(trials[number], trials.values())
            assert stops == (expected == TrialScheduler.STOP), (seed, number, epoch)
            if stops:
                stopped.add(number)
        assert stopped


def test_trials_with_other_epochs_are_compared_after_the_same_samples() -> None:
    """A batch of another size reaches an epoch some samples later, and another data set has other epochs."""
    asha = Asha(grace_samples=100, reduction_factor=2)
    long = replace(
        trial(1, 8),
        evaluations=(Evaluation(104, 100, 1, 1.0, {"AP": 0.5}), Evaluation(208, 200, 2, 2.0, {"AP": 0.9})),
    )
    short = replace(trial(2, 4), evaluations=(Evaluation(112, 100, 1, 3.0, {"AP": 0.6}),))
    assert not asha.stops(short, [long, short])  # 0.6 against 0.5 at 104, not 0.9 at 208
    worse = replace(trial(3, 4), evaluations=(Evaluation(112, 100, 1, 4.0, {"AP": 0.4}),))
    assert asha.stops(worse, [long, short, worse])


def test_the_last_epoch_and_an_undefined_AP_never_stop_a_trial() -> None:
    asha = Asha(grace_samples=100, reduction_factor=2)
    good = replace(trial(1, 4), evaluations=(Evaluation(100, 100, 1, 1.0, {"AP": 0.9}),))
    for evaluation in (Evaluation(100, 100, 4, 2.0, {"AP": 0.1}), Evaluation(100, 100, 1, 2.0, {})):
        assert not asha.stops(replace(trial(2, 4), evaluations=(evaluation,)), [good])
