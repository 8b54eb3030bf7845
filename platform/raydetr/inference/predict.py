"""Detect objects in images with a checkpoint; write annotated images and COCO results.

The output folder contains `results.json` (a list of COCO results with all detections, whatever their score),
`images.json` (a COCO dict with the file of each `image_id`, and the categories), and one annotated image per input,
named by its id and its file. As in training, an EXIF orientation is not applied: boxes refer to the stored pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from raydetr.data.batch import Sample, collate, to_model
from raydetr.data.transforms.transform import Transform
from raydetr.evaluation.evaluator import to_coco_results
from raydetr.shards.images import ImageError, decode_image
from raydetr.store.output_folder import atomic_folder
from raydetr.training.checkpoint import LoadedModel, load_for_inference, read_meta
from raydetr.user_files import read_file
from raydetr.visualization.boxes import coco_boxes, draw_boxes

SUFFIXES = (".jpg", ".jpeg", ".png")


def predict(
    checkpoint: Path,
    images: Sequence[Path],
    out: Path,
    *,
    score_threshold: float = 0.3,
    device: torch.device | str | None = None,
) -> list[dict[str, Any]]:
    """Detect objects, write annotated images and results into `out`, and return the COCO results.

    Args:
        checkpoint: a checkpoint folder.
        images: JPEG and PNG files, and folders of such files (not of folders).
        out: the folder to write; new or empty. It is written completely or not at all.
        score_threshold: boxes with a lower score are not drawn.
        device: None: the GPU if there is one.

    Raises:
        ValueError: no images, an unreadable image, an output folder that is not empty, or a checkpoint that
            cannot be used; the message names it.
    """
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold is {score_threshold}: scores lie between 0 and 1")
    files = find_images(images)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with atomic_folder(out, last="results.json") as folder:
        loaded = load_for_inference(checkpoint, device)
        categories = read_meta(checkpoint).categories
        names = {category["id"]: category["name"] for category in categories}
        results, records = [], []
        for image_id, file in enumerate(files, start=1):
            image = _open(file)
            # Under the 91-class convention some labels have no category
            found = [r for r in detect(loaded, image, image_id, device) if r["category_id"] in names]
            annotated = draw_boxes(image, coco_boxes(found, names, score_threshold))
            annotated.save(folder / f"{image_id:05d}-{file.stem}.jpg", quality=92, subsampling=0)
            results += found
            records.append(
                {"id": image_id, "file_name": str(file), "width": image.width, "height": image.height}
            )
        described = {"images": records, "categories": categories}
        (folder / "images.json").write_text(json.dumps(described, indent=1, allow_nan=False))
        (folder / "results.json").write_text(json.dumps(results, allow_nan=False))
    return results


def find_images(paths: Sequence[Path]) -> list[Path]:
    """List the image files among files and folders, in order and each once; those of a folder sorted by name.

    Raises:
        ValueError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not inside:
            raise ValueError(f"{path}: no images found in this folder ({', '.join(SUFFIXES)})")
        found += inside
    if not found:
        raise ValueError("no images given: name files, or folders of images")
    return list(dict.fromkeys(found))


def detect(
    loaded: LoadedModel, image: Image.Image, image_id: int, device: torch.device
) -> list[dict[str, Any]]:
    """Detect objects in one RGB image; return all detections as COCO results, best first."""
    transform = Transform(loaded.config.data.val_transform)
    resized, boxes, _ = transform(np.array(image), np.zeros((0, 4)), seed=0, position=0)
    labels = np.zeros(0, np.int64)
    sample = Sample(resized, labels, boxes, image_id, original_size=(image.height, image.width))
    batch = collate([sample], position=0)
    with torch.inference_mode():
        inputs, _ = to_model(batch, device)
        outputs = loaded.model.detector(inputs)
        detections = loaded.model.postprocess(outputs.predictions, batch.original_sizes.to(device))
    return to_coco_results([image_id], detections, loaded.label_map)


def _open(file: Path) -> Image.Image:
    try:
        return decode_image(read_file(file))
    except (OSError, ImageError) as error:
        raise ValueError(f"{file}: not a readable JPEG or PNG image ({error}): omit it") from None
