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

from raydetr.config import ConfigError, RunConfig, override
from raydetr.runs import run
from raydetr.runs.result import RunResult
from raydetr.runs.run_folder import read_config
from raydetr.store.folders import open_folder
from raydetr.training import checkpoint
from raydetr.user_files import parse_yaml, read_text

Schedule = Mapping[int, Mapping[str, Any]]


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
    result: RunResult | None = None
    for epoch, until in pairwise([*schedule, None]):
        assert epoch is not None
        part = override(config, schedule[epoch])
        last = (
            checkpoint.newest_valid(folder, lambda message: None) if result is not None or or_resume else None
        )
        if last is None:
            result = run.start(part, local=local, name=name, or_resume=or_resume, until_epoch=until)
        elif until is None or not checkpoint.has_reached(last, until):
            if until is None and checkpoint.is_complete(last, part):
                return run.start(read_config(folder), local=local, name=name, or_resume=True)  # its result
            result = run.resume(str(folder), overrides=schedule[epoch], local=local, until_epoch=until)
    assert result is not None
    return result
