"""Evaluate a checkpoint on a split of shards, in one process or on Ray Train workers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raydetr.config import (
    ClusterConfig,
    ConfigError,
    DataConfig,
    RunConfig,
    absolute_paths,
    flatten,
    override,
    to_dict,
)
from raydetr.console import print_status
from raydetr.data.corrupt import CorruptSample
from raydetr.data.stream import evaluation_batches
from raydetr.data.transforms.transform import Transform
from raydetr.evaluation.coco_metrics import ApTable, coco_ap
from raydetr.evaluation.detections import PackedDetections
from raydetr.evaluation.evaluator import drop_blank_batches
from raydetr.evaluation.evaluator import evaluate as evaluate_batches
from raydetr.evaluation.ground_truth import GroundTruth, evaluation_warnings, ground_truth
from raydetr.evaluation.score import speed
from raydetr.runs.local import local_world
from raydetr.shards.reader import Shards, open_shards
from raydetr.store.folders import Folder
from raydetr.training.checkpoint import find, load_for_inference, read_description, read_meta, run_config
from raydetr.training.loop import autocast
from raydetr.training.world import World

# Settings of the configuration that an evaluation uses; a dot at the end: all settings of the section
SETTINGS = (
    "data.val",
    "data.val_transform.",
    "data.eval_batch_size",
    "data.num_loader_workers",
    "data.on_corrupt",
    "data.remote.",
    "evaluation.engine",
    "optim.precision",
    "cluster.address",
    "cluster.num_workers",
    "cluster.use_gpu",
    "cluster.cpus_per_worker",
)

Share = tuple[PackedDetections, list[CorruptSample]]


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint found in a split, and what is there."""

    config: RunConfig
    checkpoint: Folder
    shards: Shards
    ground_truth: GroundTruth
    detections: PackedDetections
    corrupt: list[CorruptSample]  # images without predictions
    speed: dict[str, float]  # see `evaluation.score.speed`

    def table(self) -> ApTable:
        """Compute AP.

        Raises:
            ValueError: a prediction is not finite.
        """
        results = self.detections.results()
        return coco_ap(self.ground_truth.coco, results, self.config.evaluation.engine)


def evaluate_checkpoint(
    location: str | Path, overrides: Mapping[str, Any] | None = None, *, local: bool = False
) -> ApTable:
    """Return the AP of a checkpoint on the validation shards of its run, on this machine or the cluster that it is in.

    Corrupt images are treated as in the run (`data.on_corrupt`), and printed on standard error.

    Args:
        location: folder or URL of a run (its best checkpoint), RUN/last, or the folder of a checkpoint.
        overrides: of the run's configuration, such as other shards (`data.val`) or fewer workers.
        local: evaluate in this process, without Ray.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ConfigError: an override has no effect on an evaluation, or the shards have other categories.
        ShardError: an image is corrupt, and `data.on_corrupt` is "raise".
        OSError, ValueError: the shards cannot be used, or a prediction is not finite.
        LaunchError: the evaluation failed on Ray.
        LoaderError: a loader process died; with `local` only.
    """
    return evaluate(location, overrides, local=local).table()


def evaluate(
    location: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    local: bool = False,
    with_losses: bool = False,
) -> Evaluation:
    """Run a checkpoint over the validation shards of its run; see `evaluate_checkpoint`.

    With `with_losses`, the detections have the losses of the images.
    """
    checkpoint = find(location)
    config = _configure(checkpoint, overrides or {})
    shards = _open(config.data)
    _check_categories(checkpoint, shards)
    if local:
        config = _fit_to_machine(config, overrides or {}, local=True)
        shares = [evaluate_share(config, checkpoint, with_losses, local_world(config.cluster))]
    else:
        from raydetr.runs.ray_cluster import has_cluster  # Ray takes seconds to import
        from raydetr.runs.ray_train import run_on_workers

        if not has_cluster(config.cluster):
            config = _fit_to_machine(config, overrides or {}, local=False)
        shares = run_on_workers(partial(evaluate_share, config, checkpoint, with_losses), config.cluster)
    corrupt = [row for _, rows in shares for row in rows]
    truth = ground_truth(shards, config.data.on_corrupt)
    for line in (*map(str, corrupt), *evaluation_warnings(len(corrupt), truth.num_unreadable_records)):
        print_status(f"warning: {line}")
    parts = [share for share, _ in shares]
    detections = PackedDetections.concatenate(parts)
    return Evaluation(config, checkpoint, shards, truth, detections, corrupt, speed(parts))


def evaluate_share(config: RunConfig, checkpoint: Folder, with_losses: bool, world: World) -> Share:
    """Evaluate this process's share of the split; return its detections and corrupt images.

    The precision is that of the training, except for float16 without a GPU: then it is float32.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ShardError: an image is corrupt, and `data.on_corrupt` is "raise".
        OSError, ValueError: the shards cannot be used.
        LoaderError: a loader process died.
    """
    loaded, data = load_for_inference(checkpoint, world.device), config.data
    batches = evaluation_batches(
        _open(data, sizes_known=True),
        rank=world.rank,
        world_size=world.size,
        batch_size=data.eval_batch_size,
        transform=Transform(data.val_transform),
        num_workers=data.num_loader_workers,
        on_corrupt=data.on_corrupt,
    )
    found: list[CorruptSample] = []
    model = loaded.model
    precision = config.optim.precision
    is_supported = precision != "fp16" or world.device.type == "cuda"
    detections = evaluate_batches(
        model.detector,
        model.postprocess,
        drop_blank_batches(batches, found),
        loaded.label_map,
        world.device,
        partial(autocast, precision, world.device) if is_supported else nullcontext,
        model.criterion if with_losses else None,
    )
    return detections, found


def _configure(checkpoint: Folder, overrides: Mapping[str, Any]) -> RunConfig:
    for path in overrides:
        if not any(path == name or (name.endswith(".") and path.startswith(name)) for name in SETTINGS):
            names = ", ".join(name + "*" if name.endswith(".") else name for name in SETTINGS)
            raise ConfigError(f"{path} has no effect on an evaluation: omit it; these have: {names}")
    config = run_config(checkpoint, read_meta(checkpoint))
    # The cluster of the training may be gone, and is not the one of whoever evaluates
    unused = ("address", "min_workers", "bf16_gradients", "deterministic")
    config = override(
        config, {f"cluster.{name}": ClusterConfig.model_fields[name].default for name in unused}
    )
    return absolute_paths(override(config, overrides), Path.cwd())


def _fit_to_machine(config: RunConfig, overrides: Mapping[str, Any], *, local: bool) -> RunConfig:
    """Return the configuration with as many of the training's workers as this machine has room for.

    What is overridden stays. One process takes a GPU where there is one.
    """
    cluster, num_gpus = config.cluster, torch.cuda.device_count()
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    use_gpu = bool(overrides.get("cluster.use_gpu", num_gpus > 0 and (cluster.use_gpu or local)))
    cpus = min(cluster.cpus_per_worker, num_cores)
    room = num_gpus if use_gpu else num_cores // cpus
    fitting = {
        "cluster.use_gpu": use_gpu,
        "cluster.cpus_per_worker": cpus,
        "cluster.num_workers": 1 if local else max(1, min(cluster.num_workers, room)),
    }
    fitting = {path: value for path, value in fitting.items() if path not in overrides}
    fitted = override(config, fitting)
    changed = [path for path in fitting if _value(config, path) != _value(fitted, path)]
    if changed and not local:
        listed = ", ".join(
            f"{path}={_value(fitted, path)} (the run: {_value(config, path)})" for path in changed
        )
        print_status(f"on this machine: {listed}")
    return fitted


def _value(config: RunConfig, path: str) -> Any:
    return flatten(to_dict(config))[path]


def _open(data: DataConfig, *, sizes_known: bool = False) -> Shards:
    return open_shards(data.val, label_map=data.label_map, remote=data.remote, sizes_known=sizes_known)


def _check_categories(checkpoint: Folder, shards: Shards) -> None:
    trained = {category["id"]: category["name"] for category in read_description(checkpoint).categories}
    found = {category["id"]: category["name"] for category in shards.manifest.categories}
    if trained != found:
        different = sorted(set(trained.items()) ^ set(found.items()))[:5]
        raise ConfigError(
            f"{shards.location} has other categories than the checkpoint {checkpoint}, for example {different}: "
            "evaluate on shards with the categories it was trained on"
        )
