"""Write the folder of a run that was trained elsewhere: events, configuration, evaluation with detections."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raydetr.evaluation import stored
from raydetr.evaluation.detections import PackedDetections
from raydetr.evaluation.ground_truth import store_ground_truth
from raydetr.evaluation.score import score
from raydetr.evaluation.stored import Evaluated
from raydetr.shards.reader import Shards
from raydetr.store.folders import Folder, write_file
from raydetr.tracking.events import EventLog

Rows = list[dict[str, Any]]
SAMPLES, EPOCHS = 48, 2


def make_detections(
    shards: Shards, *, seed: int = 0, noise: float = 3.0, missed: float = 0.2, false: float = 1.0
) -> Rows:
    """Make COCO results from the ground truth.

    Args:
        shards: with the ground truth.
        seed: of all draws.
        noise: standard deviation of the edges of boxes, in pixels.
        missed: fraction of the objects.
        false: mean number of false detections per image.
    """
    generator = np.random.default_rng(seed)
    truth = shards.coco()
    rows: Rows = []
    for annotation in truth["annotations"]:
        if generator.uniform() > missed:
            box = np.array(annotation["bbox"]) + generator.normal(0, noise, 4)
            box[2:] = np.maximum(box[2:], 2.0)
            rows.append({"image_id": annotation["image_id"], "category_id": annotation["category_id"],
                         "bbox": box.tolist(), "score": float(generator.uniform(0.4, 1.0))})  # fmt: skip
    for image in truth["images"]:
        for _ in range(generator.poisson(false)):
            left, top = generator.uniform(0, 100, 2)
            category = int(generator.choice([each["id"] for each in truth["categories"]]))
            rows.append({"image_id": image["id"], "category_id": category, "bbox": [left, top, 20.0, 20.0],
                         "score": float(generator.uniform(0.1, 0.6))})  # fmt: skip
    return rows


def write_evaluated_run(
    folder: Folder,
    shards: Shards,
    rows: Rows,
    *,
    settings: Mapping[str, Any] | None = None,
    workers: int = 1,
    end: str | None = "finished",
    tags: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
    uri: str = "",
) -> Folder:
    """Write the folder of a run with one evaluation, at its end."""
    position = SAMPLES * EPOCHS
    config = {"recipe": "quickstart", "data": {"val": shards.location}, **(settings or {})}
    write_file(folder / "config.yaml", json.dumps(config).encode())
    place = stored.folder_of(folder, position)
    packed = _pack(rows, [int(image_id) for image_id in shards.samples["image_id"]])
    write_file(stored.detections_file(place, 0), packed.to_npz())
    store_ground_truth(folder, shards, "raise")
    fields = {"position": position, "step": 10, "epoch": EPOCHS, "fingerprint": shards.fingerprint}
    truth = shards.coco()
    files = score(truth, [packed], "hotcoco", fields)
    for name, content in files.items():
        write_file(place / name, content)
    stored.mark_complete(place, Evaluated(**fields, num_ranks=1, metrics={}))
    numbers = json.loads(files["evaluation.json"])["metrics"]
    dataset = {"name": "val", "fingerprint": shards.fingerprint, "source": shards.location, "context": "validation",
               "profile": {"num_images": shards.num_samples}}  # fmt: skip
    log = EventLog(folder)
    log.append(
        "launched", type="run", key=f"key of {folder}", name=folder.name, recipe="quickstart", uri=uri,
        experiment="detectors", command="raydetr train", files=[], datasets=[dataset],
        tags={"raydetr.folder": str(folder), **(tags or {})}, params=dict(params or {}),
    )  # fmt: skip
    log.append(
        "started",
        step=0,
        position=0,
        workers=workers,
        total_steps=10,
        samples_per_epoch=SAMPLES,
        epochs=EPOCHS,
    )
    for step in range(1, 11):
        metrics = {"loss": 10.0 / step, "images_per_second": 5.0}
        log.append("step", step=step, position=step * position // 10, metrics=metrics)
    values = {name: value for name, value in numbers.items() if value >= 0}
    log.append("evaluation", step=10, position=position, metrics={**values, "epoch": EPOCHS})
    if end is not None:
        log.append(end, reason="")
    assert log.flush()
    return folder


def _pack(rows: Sequence[Mapping[str, Any]], image_ids: list[int]) -> PackedDetections:
    boxes = np.array([row["bbox"] for row in rows], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return PackedDetections(
        np.array([row["image_id"] for row in rows], np.int64),
        np.array([row["category_id"] for row in rows], np.int64),
        boxes,
        np.array([row["score"] for row in rows], np.float32),
        np.array(image_ids, np.int64),
        np.full(len(image_ids), 0.01, np.float32),
        0.01 * np.arange(1, len(image_ids) + 1),
        np.full(len(image_ids), np.nan, np.float32),
    )
