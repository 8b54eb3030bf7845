"""Check before anything starts that what a search can draw can be trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from detrs import zoo
from raydetr.config import ConfigError, RunConfig, flatten, override, to_dict
from raydetr.data.splits import open_splits
from raydetr.doctor import examine
from raydetr.runs.resolve import fit_to_data
from raydetr.runs.schedule import can_change
from raydetr.shards.reader import ShardError, Shards
from raydetr.training import checkpoint, init_weights
from raydetr.training.optim import parameter_groups
from raydetr.tune.space import Space

# Learning rates, and the group of parameters that has them
GROUPS = {"optim.lr_backbone": "backbone", "optim.lr_sampling": "sampling"}


def check_space(space: Space, config: RunConfig, splits: tuple[Shards, Shards]) -> None:
    """Check that every listed value of a space, and the ends of its ranges, can be trained.

    Args:
        space: with absolute paths.
        config: resolved; the configuration that the values override.
        splits: its training and validation shards.

    Raises:
        ConfigError: a value cannot be trained, or a path has no effect.
        OSError: training shards or a checkpoint cannot be read now.
    """
    _check_effects(space, config)
    for path, value, drawn in space.examples():
        try:
            _check(override(config, drawn), drawn, splits)
        except (ConfigError, checkpoint.CheckpointError, ShardError, FileNotFoundError) as error:
            raise ConfigError(f"{space.path}: {path}={value!r}: {error}") from None


def check_configurations(
    space: Space, config: RunConfig, splits: tuple[Shards, Shards], drawn: Iterable[Mapping[str, Any]]
) -> None:
    """Check the configurations that a search will draw, as far as they are known before it starts.

    Raises:
        ConfigError: one of them cannot be trained.
    """
    seen = set()
    for number, overrides in enumerate(drawn, start=1):
        # Values of ranges of real numbers do not decide whether a model can be built, which takes long for thousands
        listed = {
            path: v
            for path, v in overrides.items()
            if space.distributions[path].kind in ("choice", "randint")
        }
        is_new = repr(listed) not in seen
        seen.add(repr(listed))
        try:
            chosen = override(config, overrides)
            if is_new:
                _check(chosen, listed, splits)
        except (ConfigError, checkpoint.CheckpointError) as error:
            shown = ", ".join(f"{path}={value}" for path, value in overrides.items())
            raise ConfigError(
                f"{space.path}: trial {number} would have {shown}: {error}. Let one depend on the other with `when`"
            ) from None


def check_population(space: Space) -> None:
    """Check that the values of a space can change while a run is trained.

    Raises:
        ConfigError: one cannot.
    """
    for path, distribution in space.distributions.items():
        if distribution.when is not None:
            raise ConfigError(
                f"{space.path}: {path}: a population has no conditions: omit `when`, or use another --algorithm"
            )
        if not can_change(path):
            raise ConfigError(
                f"{space.path}: {path} cannot change while a run is trained, as pbt does: search it with another "
                "--algorithm"
            )


def _check(config: RunConfig, drawn: Mapping[str, Any], splits: tuple[Shards, Shards]) -> None:
    train, _ = splits
    if "data.train" in drawn:
        train, other_val = open_splits(config.data)
        examine.check_may_train(train, other_val)
    if drawn.get("init.checkpoint") is not None:
        found = str(checkpoint.find(config.init.checkpoint))  # type: ignore[arg-type]
        config = override(config, {"init.checkpoint": found})
    config = fit_to_data(config, train)
    is_other_start = any(path.startswith(("init.", "model.", "data.train")) for path in drawn)
    if config.init.checkpoint is not None and is_other_start:
        init_weights.summarize(config, train.label_map)


def _check_effects(space: Space, config: RunConfig) -> None:
    """Check that learning rates of groups of parameters are those of a group that there is."""
    backbone = replace(config.model.backbone, weights=None)
    with torch.device("meta"):
        model = zoo.build(replace(config.model, backbone=backbone))
    groups = {group["name"] for group in parameter_groups(model.detector.named_parameters(), config.optim)}
    settings = flatten(to_dict(config))
    for path, group in GROUPS.items():
        if path in space.distributions and group not in groups:
            frozen = f" (model.backbone.num_frozen_stages={settings.get('model.backbone.num_frozen_stages')})"
            reason = (
                f"no parameter of the backbone is trained{frozen}"
                if group == "backbone"
                else "this model has none"
            )
            raise ConfigError(f"{space.path}: {path} has no effect: {reason}; omit it")
