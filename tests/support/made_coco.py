"""Small COCO data sets on disk for tests: random images of many sizes, with boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 90, "name": "toothbrush"}]


def write_coco(folder: Path, num_images: int, *, seed: int = 0) -> tuple[Path, Path]:
    """Write `num_images` JPEGs and PNGs with 0 to 4 boxes each; return the image folder and the JSON."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    for image_id in rng.permutation(num_images * 3)[:num_images].tolist():
        width, height = rng.integers(20, 60, 2).tolist()
        name = f"image {image_id}.{'png' if image_id % 4 == 0 else 'jpg'}"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / "images" / name)
        data["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
        for _ in range(rng.integers(0, 5)):
            box = [*rng.uniform(0, 10, 2).tolist(), *rng.uniform(4, 9, 2).tolist()]
            annotation_id = len(data["annotations"]) + 1
            data["annotations"].append(
                {
                    "id": annotation_id,
                    "image_id": image_id,
                    "category_id": CATEGORIES[rng.integers(3)]["id"],
                    "bbox": box,
                    "area": 0.7 * box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
    return folder / "images", write_json(folder / "annotations.json", data)


def write_json(path: Path, data: object) -> Path:
    """Write data as JSON and return the path."""
    path.write_text(json.dumps(data))
    return path


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
