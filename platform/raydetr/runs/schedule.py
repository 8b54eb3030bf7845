"""Train a run whose settings change at given epochs, such as the best member of a population did.

The file has overrides by the epoch from which on they count:

    0: {optim.lr: 0.004}
    2: {optim.lr: 0.0032}
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from raydetr.config import ConfigError, RunConfig, override
from raydetr.runs import run, run_folder
from raydetr.runs.resolve import resolve
from raydetr.runs.result import RunResult
from raydetr.store.folders import Folder, open_folder, write_file
from raydetr.training import checkpoint
from raydetr.user_files import parse_yaml, read_text

Schedule = Mapping[int, Mapping[str, Any]]
SCHEDULE = "schedule.yaml"  # in the folder of a run
# What cannot change while a run is trained; the weights of the losses can
FIXED_IN_A_RUN = (
    "recipe",
    "seed",
    "init.",
    "data.train",
    "data.batch_size",
    "data.micro_batch_size",
    "optim.epochs",
    "model.",
)


def can_change(path: str) -> bool:
    """Return whether a setting can change while a run is trained."""
    is_loss = path.startswith("model.loss.") and path != "model.loss.kind"
    return is_loss or not path.startswith((*FIXED_IN_A_RUN, "storage.", "tracking."))


def read_schedule(path: Path, config: RunConfig) -> Schedule:
    """Read a schedule, and check it against a configuration.

    Raises:
        ConfigError: it is missing, is not a mapping of epochs to overrides, or an override does not fit.
    """
    try:
        values = parse_yaml(read_text(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; --schedule takes a YAML file of epochs and overrides"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict) or not all(isinstance(each, dict) for each in values.values()):
        raise ConfigError(
            f"{path}: takes lines such as 2: {{optim.lr: 0.001}}, the overrides from epoch 2 on"
        )
    epochs = config.optim.epochs
    if any(not isinstance(epoch, int) or not 0 <= epoch < epochs for epoch in values) or 0 not in values:
        raise ConfigError(
            f"{path}: has the epochs {list(values)}; the first is 0, and all are below optim.epochs={epochs}"
        )
    for epoch, overrides in values.items():
        try:
            override(config, overrides)
        except ConfigError as error:
            raise ConfigError(f"{path}: epoch {epoch}: {error}") from None
        fixed = [name for name in overrides if not can_change(name)]
        if fixed and epoch > 0:
            raise ConfigError(f"{path}: epoch {epoch}: {fixed[0]} cannot change while a run is trained")
    return dict(sorted(values.items()))


def train_schedule(
    config: RunConfig,
    schedule: Schedule,
    *,
    local: bool = False,
    name: str | None = None,
    or_resume: bool = False,
) -> RunResult:
    """Train a run with a schedule: each part continues from the last checkpoint of the one before.

    A run with the same name that was interrupted goes on in the part where it was.

    Args:
        config: of the run.
        schedule: overrides by epoch.
        local, name, or_resume: see `run.start`, whose errors this function has too.
    """
    name = run.new_name(config.recipe) if name is None else name
    folder = open_folder(config.storage.path) / name
    run.check_name(name)
    if (folder / "config.yaml").exists() or not (
        folder / SCHEDULE
    ).exists():  # a start that failed has only this
        run.check_new(folder, config, or_resume)
    if checkpoint.newest_valid(folder, lambda message: None) is not None:
        _check_same(folder, config, schedule)
    write_file(folder / SCHEDULE, yaml.safe_dump(_plain(schedule)).encode())
    result: RunResult | None = None
    for epoch, until in pairwise([*schedule, None]):
        assert epoch is not None
        part = override(config, schedule[epoch])
        last = (
            checkpoint.newest_valid(folder, lambda message: None) if result is not None or or_resume else None
        )
        if last is None:
            result = run.start(part, local=local, name=name, or_resume=True, until_epoch=until)
        elif until is None or not checkpoint.has_reached(last, until):
            if until is None and checkpoint.is_complete(last, part):
                return run.start(
                    run_folder.read_config(folder), local=local, name=name, or_resume=True
                )  # its result
            result = run.resume(str(folder), overrides=schedule[epoch], local=local, until_epoch=until)
    assert result is not None
    return result


def resume_schedule(folder: Folder, *, local: bool = False) -> RunResult:
    """Continue a run that has a schedule, in the part where it was; see `run.resume` for the errors."""
    config = run_folder.read_config(folder)
    schedule = parse_yaml((folder / SCHEDULE).read_text())
    return train_schedule(config, schedule, local=local, name=folder.name, or_resume=True)


def _plain(schedule: Schedule) -> dict[int, dict[str, Any]]:
    return {epoch: dict(overrides) for epoch, overrides in schedule.items()}


def _check_same(folder: Folder, config: RunConfig, schedule: Schedule) -> None:
    """Check that the run that is to go on is the one that is asked for.

    Raises:
        ConfigError: it has another schedule, or other settings beside it.
    """
    file = folder / SCHEDULE
    if not file.exists() or parse_yaml(file.read_text()) != _plain(schedule):
        raise ConfigError(f"{folder} is a run with another schedule, or without one: give another --name")
    given, _ = resolve(override(config, schedule[0]))
    scheduled = {path for overrides in schedule.values() for path in overrides}
    differing = [
        path for path in run.differences(run_folder.read_config(folder), given) if path not in scheduled
    ]
    if differing:
        raise ConfigError(
            f"{folder} is a run with other settings ({', '.join(differing)}): give another --name"
        )
