"""Evaluation of a checkpoint on a split of shards, in one process or by Ray Train workers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from raydetr.config import ConfigError
from raydetr.data.index import Shards, open_shards
from raydetr.data.locations import absolute, check_location
from raydetr.data.stream import evaluation_batches
from raydetr.evaluate.coco_ap import ApTable, coco_ap
from raydetr.evaluate.evaluator import evaluate
from raydetr.train.checkpoint import Loaded, load_for_inference, read_meta
from raydetr.train.world import World


def evaluate_checkpoint(checkpoint: Path, data: str | None, *, local: bool = False) -> ApTable:
    """AP of a checkpoint on the shards at `data` (None: those its run validated on).

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ConfigError: the shards have other categories than the checkpoint.
    """
    checkpoint = checkpoint.resolve()
    config = load_for_inference(checkpoint).config
    data = absolute(check_location(data or config.data.val), Path.cwd())
    shards = open_shards(data)
    _check_categories(checkpoint, shards, data)
    if local:
        results = share_of_results(checkpoint, data, World.alone())
    else:
        from raydetr.train.launch import launch_evaluation  # Ray takes seconds to import

        scratch = checkpoint.parent / f"{checkpoint.name}-evaluation"
        try:
            results = launch_evaluation(checkpoint, data, config.cluster, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return coco_ap(shards.coco(), results)


def share_of_results(checkpoint: Path, data: str, world: World) -> list[dict[str, Any]]:
    """COCO results of the whole split, this process having done its share."""
    loaded: Loaded = load_for_inference(checkpoint, world.device)
    settings = loaded.config.data
    batches = evaluation_batches(
        open_shards(data, label_map=settings.label_map),
        rank=world.rank,
        world_size=world.size,
        batch_size=settings.eval_batch_size,
        transform=settings.val_transform.build(),
        num_workers=settings.num_loader_workers,
    )
    return evaluate(loaded.model.detector, loaded.model.postprocess, batches, loaded.label_map, world.gather)


def _check_categories(checkpoint: Path, shards: Shards, data: str) -> None:
    ours = {category["id"]: category["name"] for category in read_meta(checkpoint).categories}
    theirs = {category["id"]: category["name"] for category in shards.manifest.categories}
    if ours != theirs:
        different = sorted(set(ours.items()) ^ set(theirs.items()))[:5]
        raise ConfigError(
            f"{data} has other categories than the checkpoint {checkpoint}, for example {different}: "
            "evaluate on shards with the categories it was trained on"
        )
