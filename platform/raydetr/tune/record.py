"""Record a search in its folder, and read it back after its driver has ended.

`search.json` has the options. The events of the search have the proposals (`trial`) and the ends of the trials
(`trial_ended`); their evaluations are in the events of their own runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from raydetr.config import ConfigError, RunConfig, nearest, override
from raydetr.store.folders import write_file
from raydetr.tracking.events import Event, EventLog, read_events
from raydetr.tune.trials import Evaluation, Objective, Proposal, Trial, kept_metrics
from raydetr.user_files import read_text

Algorithm = Literal["random", "grid", "asha", "tpe", "bohb", "pbt"]
# Which checkpoints of its trials a search leaves: those of all, of those that ASHA has not stopped, of the best one
Keep = Literal["all", "finished", "best"]

OPTIONS = "search.json"
PROPOSED, ENDED = "trial", "trial_ended"  # kinds of events


@dataclass(frozen=True)
class SearchOptions:
    """The options of a search."""

    algorithm: Algorithm = "asha"
    num_trials: int = 8
    max_concurrent: int = 1
    grace_epochs: int = 1  # ASHA, BOHB: epochs before the first trial is stopped
    reduction_factor: int = 3  # ASHA, BOHB: one in so many continues
    interval: int | None = None  # PBT: epochs of a generation
    objective: Objective | None = None  # minimized beside AP, for a Pareto front
    keep: Keep = "finished"
    base: str = ""  # folder from which relative paths in its space start


_OPTIONS = TypeAdapter(SearchOptions)


# Options that only some algorithms have, and how the command line names them
_ONLY_FOR: dict[str, tuple[str, tuple[Algorithm, ...]]] = {
    "grace_epochs": ("--grace-epochs", ("asha", "bohb")),
    "reduction_factor": ("--reduction-factor", ("asha", "bohb")),
    "interval": ("--interval", ("pbt",)),
    "objective": ("--objective", ("random", "grid", "tpe")),
    "num_trials": ("--trials", ("random", "asha", "tpe", "bohb", "pbt")),
}
_CHOICES = {"algorithm": get_args(Algorithm), "objective": get_args(Objective), "keep": get_args(Keep)}


def make_options(given: Mapping[str, Any]) -> SearchOptions:
    """Return options from those that a user gives, by field; the others have their defaults.

    Raises:
        ConfigError: a value is unknown, or an option has no effect with the algorithm, or is missing.
    """
    for name, choices in _CHOICES.items():
        if name in given and given[name] not in choices:
            raise ConfigError(
                f"--{name} {given[name]}: there are {', '.join(choices)}{nearest(str(given[name]), choices)}"
            )
    algorithm = given.get("algorithm", SearchOptions.algorithm)
    for name, (option, algorithms) in _ONLY_FOR.items():
        if name in given and algorithm not in algorithms:
            raise ConfigError(
                f"{option} has no effect with --algorithm {algorithm}: omit it, or use {' or '.join(algorithms)}"
            )
    if algorithm == "pbt" and "interval" not in given:
        raise ConfigError("--algorithm pbt needs --interval EPOCHS, after which trials are compared")
    if algorithm == "pbt" and given.get("num_trials", SearchOptions.num_trials) < 2:
        raise ConfigError(f"--trials {given['num_trials']}: a population needs two or more")
    return SearchOptions(**given)


def write_options(folder: Path, options: SearchOptions) -> None:
    """Write the options of a search to its folder.

    Raises:
        OSError: they cannot be written.
    """
    write_file(folder / OPTIONS, json.dumps(asdict(options), indent=1).encode())


def read_options(folder: Path) -> SearchOptions:
    """Return the options of the search in a folder.

    Raises:
        ConfigError: there is no search.
    """
    file = folder / OPTIONS
    try:
        return _OPTIONS.validate_json(read_text(file), strict=True)
    except FileNotFoundError:
        raise ConfigError(f"{folder}: not the folder of a search ({OPTIONS} is missing)") from None
    except (OSError, ValidationError, ValueError) as error:
        raise ConfigError(f"{file}: not the options of a search ({str(error).splitlines()[0]})") from None


def log_proposal(log: EventLog, proposal: Proposal) -> None:
    """Log that a trial, or a generation of it, begins."""
    log.append(PROPOSED, **asdict(proposal))


def log_end(log: EventLog, trial: Trial) -> None:
    """Log how a trial, or a generation of it, has ended."""
    position = trial.evaluations[-1].position if trial.evaluations else 0
    log.append(ENDED, number=trial.number, status=trial.status, cause=trial.cause, position=position)


def read_trials(folder: Path, config: RunConfig, trial_folder: Callable[[int], Path]) -> dict[int, Trial]:
    """Return the trials of a search by number, as far as they are recorded.

    Args:
        folder: of the search.
        config: of the search.
        trial_folder: returns the folder of the trial with a number.

    Raises:
        OSError: they cannot be read.
    """
    trials: dict[int, Trial] = {}
    ends: dict[int, int] = {}
    for event in read_events(folder):  # one driver after the other, each with a segment of its own
        if event["kind"] == PROPOSED:
            number = event["number"]
            proposal = Proposal(number, event["overrides"], event["until_epoch"], event["takes_over"])
            known = trials.get(number)
            if known is not None and known.proposals[-1] == proposal:  # it went on, after its driver had died
                trials[number] = replace(known, status="running", cause=None)
                continue
            earlier = () if known is None else known.proposals
            epochs = override(config, proposal.overrides).optim.epochs
            trials[number] = Trial(trial_folder(number).name, (*earlier, proposal), epochs)
        elif event["kind"] == ENDED:
            number, status = event["number"], event["status"]
            trials[number] = replace(trials[number], status=status, cause=event["cause"])
            ends[number] = event["position"]
    for number, trial in trials.items():
        evaluations = read_evaluations(read_events(trial_folder(number)))
        if trial.status == "stopped by ASHA":  # its workers went on for some seconds
            evaluations = tuple(each for each in evaluations if each.position <= ends[number])
        trials[number] = replace(trial, evaluations=evaluations)
    return dict(sorted(trials.items()))


def read_evaluations(events: Iterable[Event]) -> tuple[Evaluation, ...]:
    """Return the evaluations in the events of a trial, by position."""
    found: dict[int, Evaluation] = {}
    samples_per_epoch = 0
    for event in events:
        if event["kind"] in ("started", "resumed"):
            samples_per_epoch = event["samples_per_epoch"]
        if event["kind"] == "evaluation":
            metrics, position = event["metrics"], event["position"]
            samples = metrics["epoch"] * samples_per_epoch
            found[position] = Evaluation(
                position, samples, metrics["epoch"], event["time"], kept_metrics(metrics)
            )
    return tuple(evaluation for _, evaluation in sorted(found.items()))
