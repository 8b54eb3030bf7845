"""Evaluation of a checkpoint on a split of shards, in one process or by Ray Train workers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from raydetr.config import ConfigError
from raydetr.config.paths import absolute, check_location
from raydetr.console import say
from raydetr.data.corrupt import Damage
from raydetr.data.stream import evaluation_batches
from raydetr.evaluation.coco_metrics import ApTable, coco_ap
from raydetr.evaluation.evaluator import evaluate, without_blanks
from raydetr.evaluation.ground_truth import caveats, ground_truth
from raydetr.shards.reader import Shards, open_shards
from raydetr.training.checkpoint import Loaded, load_for_inference, read_meta
from raydetr.training.world import World


def evaluate_checkpoint(checkpoint: Path, data: str | None, *, local: bool = False) -> ApTable:
    """AP of a checkpoint on the shards at `data` (None: those its run validated on).

    Damaged images are treated as in the run (`data.on_damage`), and told on standard error.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ConfigError: the shards have other categories than the checkpoint.
        ShardError: an image is damaged, and `data.on_damage` is "raise".
    """
    checkpoint = checkpoint.resolve()
    config = load_for_inference(checkpoint).config
    data = absolute(check_location(data or config.data.val), Path.cwd())
    shards = open_shards(data, remote=config.data.build_remote(data))
    _check_categories(checkpoint, shards, data)
    if local:
        results, damage = share_of_results(checkpoint, data, World.alone())
    else:
        from raydetr.runs.ray_train import launch_evaluation  # Ray takes seconds to import

        scratch = checkpoint.parent / f"{checkpoint.name}-evaluation"
        try:
            results, damage = launch_evaluation(checkpoint, data, config.cluster, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    truth = ground_truth(shards, config.data.on_damage)
    for row in damage:
        say(f"warning: {row}")
    for line in caveats(len(damage), truth.num_lost):
        say(f"warning: {line}")
    return coco_ap(truth.coco, results)


def share_of_results(checkpoint: Path, data: str, world: World) -> tuple[list[dict[str, Any]], list[Damage]]:
    """COCO results of the whole split, this process having done its share, and the images left out as damaged."""
    loaded: Loaded = load_for_inference(checkpoint, world.device)
    settings = loaded.config.data
    batches = evaluation_batches(
        open_shards(data, label_map=settings.label_map, remote=settings.build_remote(data), sizes_known=True),
        rank=world.rank,
        world_size=world.size,
        batch_size=settings.eval_batch_size,
        transform=settings.val_transform.build(),
        num_workers=settings.num_loader_workers,
        on_damage=settings.on_damage,
    )
    met: list[Damage] = []
    sound = without_blanks(batches, met)
    model = loaded.model
    results = evaluate(model.detector, model.postprocess, sound, loaded.label_map, world.gather)
    return results, [row for share in world.gather(met) for row in share]


def _check_categories(checkpoint: Path, shards: Shards, data: str) -> None:
    ours = {category["id"]: category["name"] for category in read_meta(checkpoint).categories}
    theirs = {category["id"]: category["name"] for category in shards.manifest.categories}
    if ours != theirs:
        different = sorted(set(ours.items()) ^ set(theirs.items()))[:5]
        raise ConfigError(
            f"{data} has other categories than the checkpoint {checkpoint}, for example {different}: "
            "evaluate on shards with the categories it was trained on"
        )
