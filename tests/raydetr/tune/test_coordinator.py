"""What a search trains next, and what its record says after its driver has died."""

from __future__ import annotations

import json
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from logged_run import log_run
from raydetr.config import ConfigError, RunConfig, override
from raydetr.tracking.events import EventLog
from raydetr.training import checkpoint
from raydetr.tune.asha import Asha
from raydetr.tune.coordinator import Coordinator, Sampling
from raydetr.tune.population import Population
from raydetr.tune.record import SearchOptions, make_options, read_options, read_trials, write_options
from raydetr.tune.samplers import RandomSampler
from raydetr.tune.space import Distribution, Space
from raydetr.tune.trial import SearchContext
from raydetr.tune.trials import Proposal

SPACE = Space(Path("space.yaml"), "", {"optim.lr": Distribution("uniform", (0.1, 0.2))})


@pytest.fixture
def context(tiny_run: RunConfig, tmp_path: Path) -> SearchContext:
    (tmp_path / "search").mkdir()
    return SearchContext(override(tiny_run, {"storage.path": str(tmp_path / "search")}), "search")


def coordinator(
    context: SearchContext, *, max_concurrent: int = 2, asha: Asha | None = None, num_trials: int = 4
) -> Coordinator:
    """As a new driver makes it from the record."""
    trials = read_trials(context.folder, context.config, context.trial_folder)
    algorithm = Sampling(num_trials, RandomSampler(SPACE, 0))
    return Coordinator(context, algorithm, asha, EventLog(context.folder), trials, max_concurrent)


def evaluate(made: Coordinator, number: int, epoch: int, AP: float) -> bool:
    """Report an evaluation, as the run of the trial does: to its own events, and to the search."""
    metrics: dict[str, Any] = {"AP": AP, "AP50": 2 * AP}
    log = EventLog(made._context.trial_folder(number))
    log.append("started", step=0, position=0, samples_per_epoch=48, epochs=4, workers=1)
    log.append("evaluation", step=3 * epoch, position=48 * epoch, metrics={"epoch": epoch, **metrics})
    assert log.flush()
    return made.add_evaluation(
        number, {"epoch": epoch, "position": 48 * epoch, "samples_per_epoch": 48, "time": "text", **metrics}
    )


def flush(made: Coordinator) -> None:
    assert made._log.flush()


def test_a_driver_that_died_repeats_nothing_and_continues_what_ran(context: SearchContext) -> None:
    epochs = context.config.optim.epochs
    first = coordinator(context)
    begun = [first.next(), first.next()]
    assert [each.number for each in begun if each] == [1, 2]
    assert first.next() is None  # two at a time
    evaluate(first, 1, epochs, 0.5)
    first.end(1)
    evaluate(first, 2, 1, 0.25)
    assert (third := first.next()) is not None
    first.end(3, "out of range")
    flush(first)  # and is killed

    second = coordinator(context)
    assert {number: (trial.status, trial.AP) for number, trial in second.trials.items()} == {
        1: ("finished", 0.5), 2: ("running", 0.25), 3: ("failed", None)
    }  # fmt: skip
    assert second.trials[3].cause == "out of range"
    again = second.next()
    assert again == begun[1]  # with the same values, before anything new
    fourth = second.next()
    assert fourth is not None
    assert fourth.number == 4
    assert fourth.overrides not in (third.overrides, begun[0].overrides if begun[0] else None)
    assert not second.is_done
    for number in (2, 4):
        evaluate(second, number, epochs, 0.1)
        second.end(number)
    assert second.next() is None
    assert second.is_done
    assert not second.may_propose
    flush(second)
    assert len(coordinator(context).trials[2].proposals) == 1


def test_an_interrupted_trial_goes_on(context: SearchContext) -> None:
    first = coordinator(context)
    proposal = first.next()
    first.interrupt()
    flush(first)
    second = coordinator(context)
    assert second.trials[1].status == "interrupted"
    assert second.next() == proposal
    assert second.trials[1].status == "running"


def test_asha_decides_the_same_after_a_restart(context: SearchContext) -> None:
    asha = Asha(48, 2)
    first = coordinator(context, asha=asha)
    for _ in range(2):
        first.next()
    assert not evaluate(first, 1, 1, 0.5)
    flush(first)
    second = coordinator(context, asha=asha)
    second.next()
    second.next()
    assert evaluate(second, 2, 1, 0.4)
    assert second.end(2).status == "stopped by ASHA"


def test_an_evaluation_that_the_driver_did_not_see_is_judged_by_the_next_one(context: SearchContext) -> None:
    """The worker had logged it, and the driver was killed before the report arrived."""
    asha = Asha(48, 2)
    first = coordinator(context, asha=asha)
    for _ in range(2):
        first.next()
    evaluate(first, 1, 1, 0.5)
    flush(first)
    unseen = EventLog(context.trial_folder(2))
    unseen.append("started", step=0, position=0, samples_per_epoch=48, epochs=4, workers=1)
    unseen.append("evaluation", step=3, position=48, metrics={"epoch": 1, "AP": 0.4})
    assert unseen.flush()
    second = coordinator(context, asha=asha)
    assert second.trials[2].status == "stopped by ASHA"
    assert [each.number for each in (second.next(), second.next()) if each] == [1, 3]


def test_evaluations_of_workers_that_went_on_after_the_stop_do_not_count(context: SearchContext) -> None:
    asha = Asha(48, 2)
    first = coordinator(context, asha=asha)
    for _ in range(2):
        first.next()
    evaluate(first, 1, 1, 0.5)
    evaluate(first, 2, 1, 0.4)
    first.end(2)
    log = EventLog(context.trial_folder(2))
    log.append("evaluation", step=6, position=96, metrics={"epoch": 2, "AP": 0.9})
    assert log.flush()
    flush(first)
    assert coordinator(context, asha=asha).trials[2].AP == 0.4


def test_a_report_that_comes_twice_counts_once(context: SearchContext) -> None:
    made = coordinator(context)
    made.next()
    evaluate(made, 1, 1, 0.5)
    evaluate(made, 1, 1, 0.7)
    assert [each.metrics["AP"] for each in made.trials[1].evaluations] == [0.5]


def test_a_process_that_ends_early_is_a_failure(context: SearchContext) -> None:
    made = coordinator(context)
    made.next()
    evaluate(made, 1, 1, 0.5)
    ended = made.end(1)
    assert (ended.status, ended.cause) == ("failed", "it ended without its last evaluation")


def test_a_member_gets_the_checkpoint_before_anybody_goes_on(context: SearchContext) -> None:
    """The leader's checkpoint takes the place of the member's own ones at that position and after it."""
    population = Population(SPACE, seed=0, num_trials=2, interval=1, epochs=context.config.optim.epochs)

    def driver() -> Coordinator:
        trials = read_trials(context.folder, context.config, context.trial_folder)
        return Coordinator(context, population, None, EventLog(context.folder), trials, 2)

    made = driver()
    for number, AP in ((1, 0.5), (2, 0.1)):
        made.next()
        folder = context.trial_folder(number)
        log_run(folder, "sqlite:///mlflow.db", kind="trial", end=None)
        write_fake_checkpoint(folder, 48, f"weights of {number}")
        evaluate(made, number, 1, AP)
    write_fake_checkpoint(context.trial_folder(2), 64, "later weights of 2")
    # Its process was killed in this checkpoint
    (checkpoint.folder_of(context.trial_folder(2), 48) / "meta.json").unlink()  # type: ignore[union-attr]
    assert made.end(1).status == "waiting"
    assert made.next() is None  # 2 still runs
    assert made.end(2).status == "waiting"
    flush(made)

    again = driver()  # the first was killed
    began = []
    deadline = time.monotonic() + 30
    while len(began) < 2 and time.monotonic() < deadline:
        proposal = again.next()
        assert proposal is not None or again.may_propose
        began += [] if proposal is None else [proposal]
    assert [(each.number, each.takes_over) for each in began] == [(2, 1), (1, None)]
    (own,) = checkpoint.complete_checkpoints(context.trial_folder(2))
    assert (checkpoint.position_of(own), (own / "state.pt").read_text()) == (48, "weights of 1")
    flush(again)
    assert [each.takes_over for each in driver().trials[2].proposals] == [None, 1]


def write_fake_checkpoint(run: Path, position: int, state: str) -> None:
    """Write a checkpoint whose state is text."""
    folder = checkpoint.folder_of(run, position)
    folder.mkdir(parents=True)
    (folder / "state.pt").write_text(state)
    (folder / "metrics.json").write_text('{"AP": 0.5}')
    meta = {
        "config": {},
        "categories": [{"id": 1, "name": "a"}],
        "fingerprint": "f",
        "epoch": 1,
        "position": position,
        "order": 2,
        "state_bytes": len(state),
        "state_crc32": zlib.crc32(state.encode()),
        "format": checkpoint.FORMAT,
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def test_a_checkpoint_that_cannot_be_copied_costs_no_member(
    context: SearchContext, capfd: pytest.CaptureFixture[str]
) -> None:
    population = Population(SPACE, seed=0, num_trials=2, interval=1, epochs=4)
    made = Coordinator(context, population, None, EventLog(context.folder), {}, 2)
    for number, AP in ((1, 0.5), (2, 0.1)):
        made.next()
        evaluate(made, number, 1, AP)
        made.end(number)
    own = made.trials[2].overrides
    began: list[Proposal] = []
    deadline = time.monotonic() + 30
    while len(began) < 2 and time.monotonic() < deadline:
        proposal = made.next()
        began += [] if proposal is None else [proposal]
    assert (began[0].number, began[0].takes_over, began[0].overrides) == (2, None, own)
    assert "trial 2 cannot take over the checkpoint of trial 1" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"algorithm": "ashaa"}, ["--algorithm ashaa", "random, grid, asha", "did you mean asha?"]),
        ({"algorithm": "pbt"}, ["--interval"]),
        ({"algorithm": "pbt", "interval": 1, "num_trials": 1}, ["a population needs two"]),
        ({"interval": 2}, ["--interval has no effect with --algorithm asha", "pbt"]),
        ({"algorithm": "random", "grace_epochs": 2}, ["--grace-epochs has no effect", "asha or bohb"]),
        ({"algorithm": "grid", "num_trials": 3}, ["--trials has no effect"]),
        ({"objective": "latency_ms"}, ["--objective has no effect", "tpe"]),
        ({"algorithm": "tpe", "objective": "latency"}, ["--objective latency", "did you mean latency_ms?"]),
        ({"keep": "none"}, ["--keep none", "all, finished, best"]),
    ],
)
def test_options_that_make_no_sense_are_refused(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        make_options(given)
    for part in parts:
        assert part in str(refused.value)


def test_options_are_kept(tmp_path: Path) -> None:
    options = SearchOptions("tpe", 12, 3, objective="worker_hours", keep="best", base="/home/me")
    write_options(tmp_path, options)
    assert read_options(tmp_path) == options
    with pytest.raises(ValueError, match=r"not the folder of a search \(search.json is missing\)"):
        read_options(tmp_path / "nowhere")
    (tmp_path / "search.json").write_text('{"algorithm": "magic"}')
    with pytest.raises(ValueError, match="not the options of a search"):
        read_options(tmp_path)
