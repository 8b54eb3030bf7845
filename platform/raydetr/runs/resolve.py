"""Resolve the configuration of a run in the driver: absolute paths, classes, contradictions between sections."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from detrs import zoo
from raydetr.config import ConfigError, RunConfig, absolute_paths, override
from raydetr.console import print_status
from raydetr.data.splits import open_splits, write_missing_synthetic
from raydetr.doctor import examine
from raydetr.locations import absolute_tracking_uri, base_folder, is_remote
from raydetr.runs.run_tracking import experiment_of
from raydetr.shards.reader import Shards
from raydetr.tracking.uris import default_uri
from raydetr.training import checkpoint


def resolve(config: RunConfig) -> tuple[RunConfig, tuple[Shards, Shards]]:
    """Make paths absolute, set the number of classes if it is not given, and check for contradictions.

    Returns:
        the resolved configuration, and the training and validation shards, which the driver opens only here.

    Raises:
        ConfigError: the classes differ between the splits or from `model.num_classes`, the batch cannot be divided
            among the workers, the device does not support the precision, or the model cannot be built.
        OSError, ValueError: the shards cannot be used.
    """
    config = absolute_paths(config, base_folder())
    if config.tracking.uri is None and "MLFLOW_TRACKING_URI" in os.environ:
        uri = absolute_tracking_uri(os.environ["MLFLOW_TRACKING_URI"], base_folder())
        config = override(config, {"tracking.uri": uri})
    if config.tracking.uri is None and is_remote(config.storage.path):
        config = override(config, {"tracking.uri": default_uri(base_folder() / "runs")})
    config = override(config, {"tracking.experiment": experiment_of(config)})
    # A run in place of a checkpoint: its best one may change until it is read
    if config.init.checkpoint is not None:
        config = override(config, {"init.checkpoint": str(checkpoint.find(config.init.checkpoint))})
    write_missing_synthetic(config.data)
    train, val = open_splits(config.data)
    examine.check_may_train(train, val)
    config = fit_to_data(config, train)
    _warn_of_idle_workers(config)
    return config, (train, val)


def fit_to_data(config: RunConfig, train: Shards) -> RunConfig:
    """Set the number of classes if it is not given, and check that the configuration can be trained.

    Args:
        config: with absolute paths.
        train: its training shards.

    Raises:
        ConfigError: `model.num_classes` does not fit the classes, the batch cannot be divided among the workers, the
            device does not support the precision, a setting has no effect, or the model cannot be built.
    """
    num_classes = train.label_map.num_classes
    given = config.model.num_classes
    if given is None:
        config = override(config, {"model.num_classes": num_classes})
    elif given < num_classes or (given > num_classes and config.data.label_map == "contiguous"):
        raise ConfigError(
            f"model.num_classes is {given}, but {config.data.train} has {num_classes} classes with "
            f"data.label_map={config.data.label_map}: leave model.num_classes unset, or set it to {num_classes}"
        )
    if config.optim.precision == "fp16" and not config.cluster.use_gpu:
        raise ConfigError(
            "optim.precision=fp16 is for GPUs: set cluster.use_gpu=true, or optim.precision=bf16 for a CPU"
        )
    _check_layout(config)
    _check_model(config)
    return config


def _check_layout(config: RunConfig) -> None:
    """Check that the global batch can be divided among the workers.

    Raises:
        ConfigError: a worker without images cannot take part.
    """
    idle, batch = _idle_workers(config), config.data.batch_size
    if idle is not None and config.model.backbone.norm == "batch":
        raise ConfigError(
            f"{idle}, and batch norm (model.backbone.norm=batch) needs one on every worker: use 1 to {batch} workers, "
            "or a larger batch"
        )


def _warn_of_idle_workers(config: RunConfig) -> None:
    idle, batch = _idle_workers(config), config.data.batch_size
    if idle is not None:
        print_status(f"warning: {idle}: they only wait for the others; use at most {batch} workers")


def _idle_workers(config: RunConfig) -> str | None:
    """Describe the workers that get no image of a batch; None: there are none."""
    workers, batch = config.cluster.num_workers, config.data.batch_size
    if workers <= batch:
        return None
    return (
        f"data.batch_size={batch} leaves {workers - batch} of cluster.num_workers={workers} without an image"
    )


def _check_model(config: RunConfig) -> None:
    """Check that the model can be built, on torch's device without memory: the workers would all fail.

    Raises:
        ConfigError: it cannot be.
    """
    backbone = replace(config.model.backbone, weights=None)
    try:
        with torch.device("meta"):
            zoo.build(replace(config.model, backbone=backbone))
    except ValueError as error:
        raise ConfigError(str(error)) from None
