"""What a run keeps for people: AP tables, learning curves, pictures. In its folder and in MLflow."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from raydetr.evaluation.coco_metrics import AP_FILE, ApTable
from raydetr.shards.images import UNREADABLE, decode_rgb
from raydetr.shards.reader import ShardError, Shards
from raydetr.tracking.history import History
from raydetr.tracking.mlflow_run import Tracker
from raydetr.visualization.boxes import Picture, coco_boxes, draw_grid
from raydetr.visualization.curves import learning_curves

NUM_PICTURES = 8
SCORE_THRESHOLD = 0.3  # of the boxes that are drawn


def log_table(tracker: Tracker, table: ApTable) -> None:
    """The AP table of the last evaluation, for people and for programs."""
    tracker.text(json.dumps(table.to_dict(), indent=1), AP_FILE)
    tracker.text(table.to_markdown(), str(Path(AP_FILE).with_suffix(".md")))


def log_pictures(
    tracker: Tracker, folder: Path, history: History, shards: Shards, results: Sequence[dict[str, Any]]
) -> None:
    """Learning curves, and a grid of validation pictures with true and predicted boxes."""
    curves = folder / "curves.png"
    learning_curves(
        losses=history.curves("loss", "step"),
        rates=history.curves("lr/", "step"),
        precision=history.curves("AP", "epoch"),
    ).savefig(curves)
    tracker.artifact(curves)
    grid = folder / "predictions.png"
    draw_grid(_pictures(shards, results), score_threshold=SCORE_THRESHOLD).save(grid)
    tracker.artifact(grid)


def _pictures(shards: Shards, results: Sequence[dict[str, Any]]) -> list[Picture]:
    """Images spread evenly over the split."""
    names = {category["id"]: category["name"] for category in shards.manifest.categories}
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    number = min(NUM_PICTURES, shards.num_samples)
    pictures = []
    for index in (i * shards.num_samples // number for i in range(number)):
        try:
            sample = shards.read(index)
            image: Image.Image = decode_rgb(sample.image)
        except (ShardError, *UNREADABLE):  # the evaluation before has raised, or noted it
            continue
        pictures.append(
            Picture(
                title=str(sample.record["file_name"]),
                image=image,
                true=coco_boxes([a for a in sample.annotations if not a.get("iscrowd")], names),
                predicted=coco_boxes(by_image[sample.record["id"]], names, SCORE_THRESHOLD),
            )
        )
    return pictures
