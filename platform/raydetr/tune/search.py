"""Search hyperparameters in the driver: start or resume a search, and report its result.

Trials are Ray Train runs in the folder of the search, children of one MLflow run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RaySystemError
from ray.util.state.exception import RayStateApiException

from raydetr.config import (
    ConfigError,
    RunConfig,
    absolute_paths,
    flatten,
    from_yaml,
    override,
    to_dict,
    to_yaml,
)
from raydetr.console import print_status
from raydetr.locations import base_folder, is_remote
from raydetr.runs import run
from raydetr.runs.lease import Lease
from raydetr.runs.ray_cluster import connected
from raydetr.runs.resolve import resolve
from raydetr.runs.run_folder import read_config
from raydetr.runs.run_tracking import log_launch, uploading, without_password
from raydetr.runs.signals import RunStopped, StopSignals
from raydetr.shards.reader import Shards
from raydetr.tracking.events import EventLog, read_events
from raydetr.tracking.mlflow_run import param_text
from raydetr.tracking.uris import mask_password, tracking_uri
from raydetr.tune import cluster, engine
from raydetr.tune.asha import Asha
from raydetr.tune.check import check_configurations, check_population, check_space
from raydetr.tune.cluster import LeakedResource
from raydetr.tune.coordinator import Algorithm, Coordinator, Sampling
from raydetr.tune.display import SearchDisplay
from raydetr.tune.population import Population
from raydetr.tune.record import OPTIONS, SearchOptions, read_options, read_trials, write_options
from raydetr.tune.result import SearchResult, best_command, importance_of, write_result
from raydetr.tune.samplers import GridSampler, RandomSampler, TpeSampler
from raydetr.tune.space import Space, read_space
from raydetr.tune.trial import SearchContext
from raydetr.tune.trials import Trial, best_trial, rank_trials
from raydetr.user_files import read_text

CONFIG, SPACE = "config.yaml", "space.yaml"
ENDED_TAG = "raydetr.ended"
# The event that ends a trial. One that was stopped early is not a finished run in MLflow either
EVENTS = {
    "finished": "finished",
    "stopped by ASHA": "stopped",
    "interrupted": "stopped",
    "waiting": "stopped",
    "failed": "failed",
}


class SearchError(RuntimeError):
    """No trial of a search was evaluated; the message has the table of trials and the causes of failures."""


@dataclass(frozen=True)
class _Plan:
    """What a search is to do."""

    config: RunConfig  # as the user gave it
    resolved: RunConfig
    splits: tuple[Shards, Shards]
    space: Space
    options: SearchOptions
    context: SearchContext


def search(
    config: RunConfig,
    space_file: Path,
    options: SearchOptions,
    *,
    name: str | None = None,
    or_resume: bool = False,
) -> SearchResult:
    """Train configurations that are drawn from a space, the same ones for the same `config.seed` and results.

    `options.max_concurrent` is lowered to the number of trials that fit on the cluster at once.

    Args:
        config: that of all trials but for what is drawn.
        space_file: YAML file of the space.
        options: of the search.
        name: of the search, and of its folder; None: a new one.
        or_resume: a search with this name goes on, or has its result returned.

    Raises:
        ConfigError: the configuration, the space or an option cannot be used.
        OSError, ValueError: the shards cannot be used.
        ConnectionError: no Ray cluster answers at `cluster.address`.
        LaunchError: not even one trial fits on the cluster, or it has no dashboard.
        SearchError: no trial was evaluated.
        RunStopped: a signal stopped the search; its results so far are in the folder.
    """
    if name is not None:
        run.check_name(name)
    options = replace(options, base=str(base_folder()))
    space = read_space(space_file, config, base_folder())
    resolved, splits = resolve(config)
    config = without_password(config)  # a part of it is printed and stored
    if is_remote(resolved.storage.path):
        raise ConfigError(
            f"storage.path {resolved.storage.path}: a search needs a folder that all nodes mount"
        )
    check_space(space, resolved, splits)
    options = _check_options(options, space, resolved, splits)
    run.print_warnings(resolved, *splits)
    name = run.new_name(f"tune-{config.recipe}") if name is None else name
    folder = Path(resolved.storage.path) / name
    is_there = (folder / OPTIONS).exists()  # otherwise its driver was killed before it had begun
    if is_there and or_resume:
        return resume(folder, **_check_same(folder, config, space_file, options))
    is_run = (folder / CONFIG).exists() and not (folder / SPACE).exists()
    if is_there or is_run:
        raise ConfigError(
            f"{folder} exists: continue it with `raydetr tune --resume {folder}`, or give another --name"
        )
    return _search(_Plan(config, resolved, splits, space, options, _context(resolved, folder)), is_new=True)


def resume(
    folder: Path,
    *,
    overrides: dict[str, Any] | None = None,
    num_trials: int | None = None,
    max_concurrent: int | None = None,
) -> SearchResult:
    """Continue a search whose driver was stopped or has died; finished trials are not repeated.

    Trials that were running continue from their newest checkpoint.

    Args:
        folder: of the search.
        overrides: of where it runs: `cluster` and `tracking.uri`.
        num_trials: more trials than before; None: as many.
        max_concurrent: None: as before.

    Raises:
        ConfigError: there is no search, or an override or option cannot change; and the errors of `search`.
    """
    options = read_options(folder)
    for path in overrides or {}:
        if not path.startswith(("cluster.", "tracking.uri")):
            raise ConfigError(
                f"{path} cannot change in a search that is resumed: omit it, or start a new search"
            )
    config = override(from_yaml(folder / CONFIG), overrides or {})
    absolute = absolute_paths(config, Path(options.base))
    stored_uri = read_config(folder).tracking.uri if not (overrides or {}).get("tracking.uri") else None
    resolved, splits = resolve(override(absolute, {"storage.path": str(folder.resolve().parent)}))
    if stored_uri is not None:
        resolved = override(resolved, {"tracking.uri": stored_uri})
    space = read_space(folder / SPACE, absolute, Path(options.base))
    if num_trials is not None:
        if num_trials < options.num_trials:
            raise ConfigError(
                f"--trials {num_trials}: the search has {options.num_trials} already; give more, or omit it"
            )
        if options.algorithm in ("grid", "pbt") and num_trials != options.num_trials:
            raise ConfigError(
                f"--trials has no effect on a {options.algorithm} search that is resumed: omit it"
            )
        options = replace(options, num_trials=num_trials)
    options = replace(options, max_concurrent=max_concurrent or options.max_concurrent)
    context = _context(resolved, folder.resolve())
    return _search(_Plan(without_password(config), resolved, splits, space, options, context), is_new=False)


def _check_same(folder: Path, config: RunConfig, space_file: Path, options: SearchOptions) -> dict[str, Any]:
    """Check that a search that is to go on is the one that is asked for; return the arguments of `resume`.

    Raises:
        ConfigError: it has another configuration, other options, or another space.
    """
    before = read_options(folder)
    changed = replace(
        options, max_concurrent=before.max_concurrent, num_trials=before.num_trials, base=before.base
    )
    stored, given = flatten(to_dict(from_yaml(folder / CONFIG))), flatten(to_dict(config))
    differing = [
        path for path, value in given.items() if stored.get(path) != value and not path.startswith("cluster.")
    ]
    differing += [name for name, value in vars(before).items() if vars(changed)[name] != value]
    if read_text(folder / SPACE) != read_text(space_file):
        differing.append(f"the space {space_file}")
    if options.num_trials < before.num_trials or (
        options.num_trials > before.num_trials and options.algorithm in ("grid", "pbt")
    ):
        differing.append("the number of trials")
    if differing:
        raise ConfigError(
            f"{folder} is a search with other settings: {', '.join(differing)}. Continue it with "
            f"`raydetr tune --resume {folder}`, or give another --name"
        )
    places = {path: value for path, value in given.items() if path.startswith("cluster.")}
    more = options.num_trials if options.num_trials > before.num_trials else None
    return {"overrides": places, "num_trials": more, "max_concurrent": options.max_concurrent}


def _context(resolved: RunConfig, folder: Path) -> SearchContext:
    uri = mask_password(tracking_uri(resolved))
    return SearchContext(override(resolved, {"storage.path": str(folder), "tracking.uri": uri}), folder.name)


def _check_options(
    options: SearchOptions, space: Space, config: RunConfig, splits: tuple[Shards, Shards]
) -> SearchOptions:
    """Check the options against each other and the space; return them, with the number of trials of a grid.

    Raises:
        ConfigError: one cannot be used.
    """
    algorithm, epochs = options.algorithm, config.optim.epochs
    if algorithm == "pbt":
        check_population(space)
        assert options.interval is not None
        if options.interval >= epochs:
            raise ConfigError(f"--interval {options.interval}: give less than optim.epochs={epochs}")
    if algorithm in ("asha", "bohb") and options.grace_epochs >= epochs:
        raise ConfigError(
            f"--grace-epochs {options.grace_epochs} leaves no epoch of optim.epochs={epochs} in which a trial could be "
            "stopped: give less, or use --algorithm random or tpe"
        )
    if algorithm == "grid":
        configurations = space.grid()
        check_configurations(space, config, splits, configurations)
        return replace(options, num_trials=len(configurations))
    if algorithm in ("random", "asha"):
        sampler = RandomSampler(space, config.seed)
        drawn = [sampler.sample(number, ()) for number in range(1, options.num_trials + 1)]
        check_configurations(space, config, splits, drawn)
    return options


def _algorithm(plan: _Plan) -> tuple[Algorithm, Asha | None]:
    options, space, config = plan.options, plan.space, plan.resolved
    asha = None
    if options.algorithm in ("asha", "bohb"):
        grace = options.grace_epochs * plan.splits[0].num_samples
        asha = Asha(grace, options.reduction_factor)
    match options.algorithm:
        case "pbt":
            assert options.interval is not None
            return Population(
                space, config.seed, options.num_trials, options.interval, config.optim.epochs
            ), None
        case "grid":
            return Sampling(options.num_trials, GridSampler(space.grid())), None
        case "tpe" | "bohb":
            return Sampling(
                options.num_trials, TpeSampler(space, config.seed, options.num_trials, options.objective)
            ), asha
        case _:
            return Sampling(options.num_trials, RandomSampler(space, config.seed)), asha


def _search(plan: _Plan, *, is_new: bool) -> SearchResult:
    options, context, folder = plan.options, plan.context, plan.context.folder
    for name, value in engine.SETTINGS.items():
        os.environ.setdefault(name, value)
    with ExitStack() as stack:
        stack.enter_context(connected(plan.resolved.cluster))
        stop = stack.enter_context(StopSignals())
        stop.install()  # Ray has replaced the handlers
        cluster.check_dashboard()
        num_concurrent = cluster.limit_concurrency(plan.resolved.cluster, options.max_concurrent)
        if num_concurrent < options.max_concurrent:
            print_status(f"{num_concurrent} trials fit on the cluster at once, not {options.max_concurrent}")
        before = cluster.list_leaked_resources(_job_id())
        print_status(f"search {folder}")
        log = EventLog(folder)
        stack.enter_context(Lease(folder))  # before anything of the search is written
        if is_new:
            (folder / SPACE).write_text(plan.space.text)
            (folder / CONFIG).write_text(to_yaml(plan.config))
        write_options(folder, options)  # last: with them, it can be resumed
        trials = {} if is_new else read_trials(folder, context.config, context.trial_folder)
        algorithm, asha = _algorithm(plan)
        coordinator = Coordinator(context, algorithm, asha, log, trials, num_concurrent)
        uploads = stack.enter_context(
            uploading(folder, context.config, tracking_uri(plan.resolved), "search")
        )
        _log_search(log, plan)
        failure: str | None = None
        try:
            turns = cluster.Turns(f"{context.name}-{_job_id()}")

            def on_waiting(is_waiting: bool) -> None:
                turns.update(is_waiting)
                coordinator.is_held = turns.must_wait

            with SearchDisplay(
                context, lambda: coordinator.trials, options.num_trials, on_waiting
            ) as display:
                engine.run_trials(
                    context,
                    coordinator,
                    stop.is_set,
                    display.on_change,
                    lambda trial: _after_end(plan, coordinator, trial),
                    display.note,
                )
            turns.close()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            result = _finish(plan, coordinator, before)
            _log_result(log, result, is_complete=coordinator.is_done, failure=failure)
    result = replace(result, pending_upload=uploads.pending)
    if not coordinator.is_done:
        print_status(result.to_text())
        number = stop.signal
        if number is None:
            raise SearchError(
                f"Ray Tune has ended before the search: continue with `raydetr tune --resume {folder}`"
            )
        raise RunStopped(
            f"{context.name} was stopped by {number.name}: continue with `raydetr tune --resume {folder}`",
            128 + number,
        )
    if result.best is None:
        raise SearchError(f"no trial was evaluated\n{result.to_text()}")
    return result


def _log_search(log: EventLog, plan: _Plan) -> None:
    """Log the start of the search, with its configuration and space."""
    distributions = plan.space.distributions
    searched = {f"search.{path}": str(distribution) for path, distribution in distributions.items()}
    options = {f"tune.{name}": value for name, value in vars(plan.options).items() if name != "base"}
    settings = flatten(to_dict(plan.context.config))
    fixed = {path: value for path, value in settings.items() if path not in distributions}
    log_launch(log, plan.context.folder, plan.context.config, plan.splits, "search",
               params=fixed | searched | options, files=[CONFIG, SPACE])  # fmt: skip


def _finish(plan: _Plan, coordinator: Coordinator, before: list[LeakedResource]) -> SearchResult:
    """Release the cluster, log how the trials ended, remove what is not to be kept, and write the result."""
    leaked = _release(before)
    coordinator.interrupt()
    trials = rank_trials(coordinator.trials.values())
    best, context = best_trial(trials), plan.context
    for trial in trials:
        _log_end(context, trial, plan.splits)
    _remove_checkpoints(plan, coordinator, trials)
    samples = _compared_at(trials)
    result = SearchResult(
        name=context.name,
        folder=context.folder,
        tracking_uri=tracking_uri(context.config),
        options=plan.options,
        trials=trials,
        command=None if best is None else best_command(plan.config, best, trials, context.folder),
        leaked=tuple(leaked),
        # The values of a population change
        importance={} if plan.options.algorithm == "pbt" else importance_of(plan.space, trials, samples),
    )
    try:
        write_result(result, plan.space, plan.config, samples)
    except OSError as error:  # a full disk, perhaps: the result is printed, and the end is logged
        print_status(f"warning: the result is not complete in {context.folder}: {error}")
    return result


def _compared_at(trials: Sequence[Trial]) -> int:
    """Return the largest number of samples after which all trials that were evaluated have an evaluation."""
    return min((trial.evaluations[-1].samples for trial in trials if trial.evaluations), default=0)


def _log_end(context: SearchContext, trial: Trial, splits: tuple[Shards, Shards]) -> None:
    """Log how a trial has ended to the events of its run; it may have logged another end, or nothing."""
    folder = context.trial_folder(trial.number)
    log = EventLog(folder)
    cause = f": {trial.cause}" if trial.cause else ""
    description = f"{trial.status}{cause} (epoch {trial.epoch} of {trial.epochs})"
    try:
        events = read_events(folder)
        if not any(event["kind"] == "launched" for event in events):  # it failed before
            log_launch(log, folder, context.config, splits, "trial", params=trial.overrides, files=[])
        elif any(event.get("tags", {}).get(ENDED_TAG) == description for event in events):
            return  # by an earlier driver
    except OSError as error:  # a hiccup of the storage must not end the search
        print_status(f"warning: {error}")
    log.append(EVENTS[trial.status], reason=trial.status, tags={ENDED_TAG: description})
    if not log.flush():
        print_status(f"warning: {log.problem}")


def _after_end(plan: _Plan, coordinator: Coordinator, trial: Trial) -> None:
    """Log how a trial has ended, and remove what is not to be kept of it; called in a thread."""
    if trial.status in ("stopped by ASHA", "failed"):
        _log_end(plan.context, trial, plan.splits)
    if trial.status == "stopped by ASHA" and plan.options.keep != "all":
        coordinator.remove_checkpoints(trial)


def _remove_checkpoints(plan: _Plan, coordinator: Coordinator, trials: Sequence[Trial]) -> None:
    """Remove the checkpoints that `options.keep` does not keep; those of trials that go on are kept."""
    best = best_trial(trials)
    for trial in trials:
        is_kept = {
            "all": True,
            "finished": trial.status != "stopped by ASHA",
            "best": trial == best or trial.status in ("interrupted", "waiting"),
        }[plan.options.keep]
        if not is_kept:
            coordinator.remove_checkpoints(trial)


def _release(before: list[LeakedResource]) -> list[LeakedResource]:
    """Release what the trials hold on the cluster; return what has leaked, as far as that can be found out."""
    try:
        return cluster.release_leaked_resources(_job_id(), before)
    except (RayStateApiException, RaySystemError, OSError) as error:  # the head is gone; the results count
        print_status(f"warning: what the search left on the cluster cannot be found out: {error}")
        return []


def _log_result(log: EventLog, result: SearchResult, *, is_complete: bool, failure: str | None) -> None:
    """Log the end of the search, with its best trial.

    Args:
        log: of the search.
        result: of the search.
        is_complete: all trials have ended.
        failure: the error that ended the search; None: there was none.
    """
    fields: dict[str, Any] = {"files": _files(result.folder)}
    if failure is not None:
        fields["reason"] = failure
    best = result.best
    if best is not None:
        fields |= {
            # Tags, because MLflow does not let params change: a search that goes on may find a better trial
            "tags": {
                "raydetr.best_trial": best.name,
                "raydetr.best_command": result.command,
                **{f"best.{path}": param_text(value) for path, value in best.overrides.items()},
            },
            "metrics": {"AP": best.AP, "AP50": best.AP50},
            "step": 0,
        }
    kind = "stopped" if not is_complete else "failed" if best is None else "finished"
    log.append("failed" if failure is not None else kind, **fields)
    if not log.flush():
        print_status(f"warning: {log.problem}")


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".txt", ".json", ".yaml", ".png"))


def _job_id() -> str:
    return str(ray.get_runtime_context().get_job_id())
