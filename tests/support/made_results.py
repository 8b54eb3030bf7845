"""Score generated detection results with pycocotools itself."""

from __future__ import annotations

import contextlib
import io
import random
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def average_precision(ground_truth: dict[str, Any]) -> list[float]:
    """Return pycocotools' twelve metrics for generated results: shifted true boxes, some with another class."""
    rng = random.Random(0)
    categories = [category["id"] for category in ground_truth["categories"]]
    results = []
    for annotation in sorted(ground_truth["annotations"], key=lambda annotation: annotation["id"]):
        x, y, w, h = annotation["bbox"]
        category = annotation["category_id"] if rng.random() < 0.8 else rng.choice(categories)
        box = [x + rng.gauss(0, 0.1) * w, y + rng.gauss(0, 0.1) * h, w, h]
        result = {"image_id": annotation["image_id"], "category_id": category, "bbox": box}
        results.append({**result, "score": rng.random()})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()
