"""Search hyperparameters with ASHA, in the driver. Trials are Ray Train runs, children of one MLflow run.

ASHA (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning"): after `grace_epochs`, and at each
multiple of it by a power of `reduction_factor`, a trial continues only if it is among the best 1 / reduction_factor of
the trials that have reached that epoch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RaySystemError
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.util.state.exception import RayStateApiException

from raydetr.config import ConfigError, RunConfig, flatten, override, to_dict, to_yaml
from raydetr.console import print_status
from raydetr.locations import is_remote
from raydetr.runs import run
from raydetr.runs.lease import Lease
from raydetr.runs.ray_cluster import connected
from raydetr.runs.resolve import resolve
from raydetr.runs.run_tracking import log_launch, uploading, without_password
from raydetr.shards.reader import Shards
from raydetr.tracking.events import EventLog
from raydetr.tracking.uris import mask_password, tracking_uri
from raydetr.tune import cluster
from raydetr.tune.callback import SearchCallback
from raydetr.tune.cluster import LeakedResource
from raydetr.tune.result import SearchResult, Trial, best_trial, rank_trials, train_command, trials_as_json
from raydetr.tune.space import Distribution, Space
from raydetr.tune.trial import SearchContext, run_trial

# The process of a trial only waits for its workers. It takes a fraction of a resource of the head that nothing else
# uses: with one CPU per trial, two trials on two CPUs would wait for their workers forever.
TRIAL_RESOURCES = {"node:__internal_head__": 0.001}

# Ray reads these in this process. A value that the user has set is kept.
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has the results
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # AP is undefined if the data has no boxes
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: only the output of SearchCallback
}


class SearchError(RuntimeError):
    """No trial of a search was evaluated; the message has the table of trials and the causes of failures."""


def search(
    config: RunConfig,
    space: Space,
    *,
    num_trials: int,
    max_concurrent: int = 1,
    grace_epochs: int = 1,
    reduction_factor: int = 3,
) -> SearchResult:
    """Train `num_trials` configurations drawn from `space`, the same ones for the same `config.seed`.

    `max_concurrent` is lowered to the number of trials that fit on the cluster at once.

    Raises:
        ConfigError, OSError, ValueError: the configuration or the shards cannot be used.
        ConnectionError: no Ray cluster answers at `cluster.address`.
        LaunchError: not even one trial fits on the cluster, or it has no dashboard.
        SearchError: no trial was evaluated.
        KeyboardInterrupt: Ctrl-C; the trials are stopped, and their results so far are in the folder.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    resolved, splits = resolve(config)
    config = without_password(config)  # a part of it is printed and stored
    if is_remote(resolved.storage.path):
        raise ConfigError(
            f"storage.path {resolved.storage.path}: a search needs a folder that all nodes mount"
        )
    run.print_warnings(resolved, *splits)
    with connected(resolved.cluster):
        cluster.check_dashboard()
        num_concurrent = cluster.limit_concurrency(resolved.cluster, max_concurrent)
        if num_concurrent < max_concurrent:
            print_status(f"{num_concurrent} trials fit on the cluster at once, not {max_concurrent}")
        before = cluster.list_leaked_resources(_job_id())
        context = _create_context(config, resolved)
        folder = context.folder
        log = EventLog(folder)

        def log_failed_launch(trial: Trial, log: EventLog) -> None:
            log_launch(log, context.trial_folder(trial.number), context.config, splits, "trial",
                       params=trial.overrides, files=[])  # fmt: skip

        callback = SearchCallback(context, log_failed_launch)
        with Lease(folder), uploading(folder, context.config, tracking_uri(resolved), "search") as uploads:
            _log_search(log, context, splits, space)
            failure: str | None = None
            try:
                asha = _asha(resolved, grace_epochs, reduction_factor)
                _run_trials(context, space, callback, asha, num_trials, num_concurrent)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
                raise
            finally:
                result = _finish(config, context, callback, before)
                _log_result(log, result, is_complete=callback.num_ended == num_trials, failure=failure)
    result = replace(result, pending_upload=uploads.pending)
    if callback.num_ended < num_trials:  # Tune returns normally after Ctrl-C
        print_status(result.to_text())
        raise KeyboardInterrupt
    if result.best is None:
        raise SearchError(f"no trial was evaluated\n{result.to_text()}")
    return result


class _Asha(ASHAScheduler):
    """ASHA that never stops a trial at its last epoch: it has finished, and is still storing its results."""

    def __init__(self, epochs: int, **settings: Any) -> None:
        super().__init__(max_t=epochs, **settings)
        self._epochs = epochs

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("epoch", 0) >= self._epochs:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))


def _asha(config: RunConfig, grace_epochs: int, reduction_factor: int) -> _Asha:
    return _Asha(
        config.optim.epochs,
        time_attr="epoch",
        grace_period=min(grace_epochs, config.optim.epochs),
        reduction_factor=reduction_factor,
    )


def _create_context(config: RunConfig, resolved: RunConfig) -> SearchContext:
    """Create the folder of the search."""
    name = run.new_name(f"tune-{config.recipe}")
    folder = Path(resolved.storage.path) / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    uri = mask_password(tracking_uri(resolved))
    print_status(f"search {folder}")
    return SearchContext(override(resolved, {"storage.path": str(folder), "tracking.uri": uri}), name)


def _log_search(log: EventLog, context: SearchContext, splits: Sequence[Shards], space: Space) -> None:
    """Log the start of the search, with its configuration and space."""
    (context.folder / "space.yaml").write_text(space.text)
    searched = {f"search.{path}": f"{d.kind} {list(d.values)}" for path, d in space.distributions.items()}
    settings = flatten(to_dict(context.config))
    fixed = {path: value for path, value in settings.items() if path not in space.distributions}
    log_launch(log, context.folder, context.config, splits, "search",
               params=fixed | searched, files=["config.yaml", "space.yaml"])  # fmt: skip


def _run_trials(
    context: SearchContext,
    space: Space,
    callback: SearchCallback,
    asha: _Asha,
    num_trials: int,
    max_concurrent: int,
) -> None:
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, context=context), TRIAL_RESOURCES),
        param_space={path: _domain(distribution) for path, distribution in space.distributions.items()},
        tune_config=tune.TuneConfig(
            metric="AP",
            mode="max",
            scheduler=asha,
            search_alg=BasicVariantGenerator(max_concurrent=max_concurrent, random_state=context.config.seed),
            num_samples=num_trials,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=context.config.storage.path, callbacks=[callback], verbose=0
        ),
    )
    # SearchCallback and the table of trials already report Tune's messages and the errors of trials
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    tuner.fit()


def _domain(distribution: Distribution) -> Any:
    """Return Ray Tune's equivalent of a distribution. Tune's `randint` excludes the upper end."""
    values = distribution.values
    match distribution.kind:
        case "uniform":
            return tune.uniform(*values)
        case "loguniform":
            return tune.loguniform(*values)
        case "randint":
            return tune.randint(values[0], values[1] + 1)
        case "choice":
            return tune.choice(list(values))


def _finish(
    config: RunConfig, context: SearchContext, callback: SearchCallback, before: list[LeakedResource]
) -> SearchResult:
    """Release the cluster, log how the trials ended, and write the result."""
    leaked = _release(before)
    callback.finalize()
    trials = rank_trials(list(callback.trials.values()))
    folder, best = context.folder, best_trial(trials)
    result = SearchResult(
        name=context.name,
        folder=folder,
        tracking_uri=tracking_uri(context.config),
        epochs=config.optim.epochs,
        trials=trials,
        command=train_command(config, best.overrides, folder / "config.yaml") if best else None,
        leaked=tuple(leaked),
    )
    (folder / "trials.txt").write_text(result.to_text() + "\n")
    (folder / "trials.json").write_text(trials_as_json(trials) + "\n")
    return result


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
    fields: dict[str, Any] = {"files": ["trials.txt", "trials.json"]}
    if failure is not None:
        fields["reason"] = failure
    best = result.best
    if best is not None:
        fields |= {
            "params": {f"best.{path}": value for path, value in best.overrides.items()},
            "tags": {"raydetr.best_trial": best.name, "raydetr.best_command": result.command},
            "metrics": {"AP": best.AP, "AP50": best.AP50},
            "step": 0,
        }
    kind = "stopped" if not is_complete else "failed" if best is None else "finished"
    log.append("failed" if failure is not None else kind, **fields)
    if not log.flush():
        print_status(f"warning: {log.problem}")


def _job_id() -> str:
    return str(ray.get_runtime_context().get_job_id())
