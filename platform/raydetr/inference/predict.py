"""Detect objects in images with a checkpoint; write annotated images and COCO results.

The output folder contains `results.json` (a list of COCO results with all detections, whatever their score),
`images.json` (a COCO dict with the file of each `image_id`, and the categories), and one annotated image per input,
named by its id and its file. As in training, an EXIF orientation is not applied: boxes refer to the stored pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from raydetr.data.batch import Batch, Sample, collate, to_model
from raydetr.data.transforms.transform import Transform
from raydetr.evaluation.evaluator import to_coco_results
from raydetr.process_pool import Progress
from raydetr.shards.images import ImageError, decode_image, is_rotated
from raydetr.store.output_folder import atomic_folder
from raydetr.training.checkpoint import LoadedModel, find, load_for_inference, read_description
from raydetr.user_files import read_file
from raydetr.visualization.boxes import coco_boxes, draw_boxes

# Of the images that are read from a folder; a file that is named itself is read whatever its suffix
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif",
)  # fmt: skip
MAX_LISTED = 5
MAX_STEM = 60  # characters


@dataclass(frozen=True)
class PredictResult:
    """The detections in a set of images, and the files without."""

    results: list[dict[str, Any]]  # COCO results
    failed: list[str]  # files that cannot be read, with the reasons
    notes: list[str]  # about omitted files, and orientations


def predict(
    location: str | Path,
    images: Sequence[Path],
    out: Path,
    *,
    recursive: bool = False,
    score_threshold: float = 0.3,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> PredictResult:
    """Detect objects, and write annotated images and COCO results into `out`.

    A file that cannot be read does not stop the others.

    Args:
        location: folder or URL of a run (its best checkpoint), RUN/last, or the folder of a checkpoint.
        images: files of any format that Pillow reads, and folders of such files.
        out: the folder to write; new or empty.
        recursive: search subfolders too.
        score_threshold: boxes with a lower score are not drawn.
        device: None: the GPU if there is one.
        progress: called with (images done, total images).

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ValueError: no images, no image that can be read, or an output folder that is not empty; the message names it.
        OSError: the output folder cannot be written.
    """
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold is {score_threshold}: scores lie between 0 and 1")
    files, notes = find_images(images, recursive=recursive)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    results: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    failed: list[str] = []
    rotated: list[Path] = []
    with atomic_folder(out, last="results.json") as folder:
        checkpoint = find(location)
        loaded = load_for_inference(checkpoint, device)
        categories = read_description(checkpoint).categories
        names = {category["id"]: category["name"] for category in categories}
        for image_id, file in enumerate(files, start=1):
            if progress:
                progress(image_id, len(files))
            try:
                image, is_rotated = open_image(file)
            except ImageError as error:
                failed.append(f"{file}: {error}")
                continue
            # With data.label_map=category_id, some labels have no category
            found = [r for r in detect(loaded, image, image_id, device) if r["category_id"] in names]
            try:
                annotated = draw_boxes(image, coco_boxes(found, names, score_threshold))
                annotated.save(folder / _name(image_id, file), quality=92, subsampling=0)
            except Exception as error:  # whatever it is: a picture must not take the results with it
                notes.append(f"no picture of {file}: {type(error).__name__}: {error}")
            results += found
            rotated += [file] if is_rotated else []
            records.append(
                {"id": image_id, "file_name": str(file), "width": image.width, "height": image.height}
            )
        if not records:
            raise ValueError("no image can be read:" + "".join(f"\n  {line}" for line in failed))
        described = {"images": records, "categories": categories}
        (folder / "images.json").write_text(json.dumps(described, indent=1, allow_nan=False))
        (folder / "results.json").write_text(json.dumps(results, allow_nan=False))
    if rotated:
        notes.append(
            f"the EXIF orientation of {_listing(rotated, 'images')} is not applied, as in training: boxes refer to the "
            "stored pixels"
        )
    return PredictResult(results, failed, notes)


def find_images(paths: Sequence[Path], *, recursive: bool = False) -> tuple[list[Path], list[str]]:
    """List the image files among files and folders, in order and each once; those of a folder sorted by name.

    Returns:
        the files, and notes about omitted ones.

    Raises:
        ValueError: a path does not exist, or there is no image.
    """
    found: list[Path] = []
    others: list[Path] = []
    folders: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        if not path.is_dir():
            found.append(path)
            continue
        for file in sorted(path.rglob("*") if recursive else path.iterdir()):
            if file.is_dir():
                folders += [] if recursive else [file]
            elif file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
                found.append(file)
            else:
                others.append(file)
    notes = [f"omitted {_listing(others, 'files')}: hidden, or not named like images"] if others else []
    if folders:
        notes.append(f"omitted {_listing(folders, 'folders')}: --recursive searches them")
    if not found:
        raise ValueError(
            "; ".join([f"no images found in {', '.join(map(str, paths)) or 'no paths'}", *notes])
        )
    return list(dict.fromkeys(found)), notes


def _name(image_id: int, file: Path) -> str:
    # A part of the name: with the number it would be longer than file systems allow
    return f"{image_id:05d}-{file.stem[:MAX_STEM]}.jpg"


def _listing(files: Sequence[Path], kind: str) -> str:
    more = ", ..." if len(files) > MAX_LISTED else ""
    return f"{len(files)} {kind} ({', '.join(file.name for file in files[:MAX_LISTED])}{more})"


def detect(
    loaded: LoadedModel, image: Image.Image, image_id: int, device: torch.device
) -> list[dict[str, Any]]:
    """Detect objects in one RGB image; return all detections as COCO results, best first."""
    batch = to_batch(loaded, image, image_id)
    with torch.inference_mode():
        inputs, _ = to_model(batch, device)
        outputs = loaded.model.detector(inputs)
        detections = loaded.model.postprocess(outputs.predictions, batch.original_sizes.to(device))
    return to_coco_results([image_id], detections, loaded.label_map)


def to_batch(loaded: LoadedModel, image: Image.Image, image_id: int) -> Batch:
    """Return a batch of one RGB image, resized as in the evaluation of the model."""
    transform = Transform(loaded.config.data.val_transform)
    resized, boxes, _ = transform(np.array(image), np.zeros((0, 4)), seed=0, position=0)
    labels = np.zeros(0, np.int64)
    sample = Sample(resized, labels, boxes, image_id, original_size=(image.height, image.width))
    return collate([sample], position=0)


def open_image(file: Path) -> tuple[Image.Image, bool]:
    """Return the image in RGB, and whether its EXIF orientation, which is not applied, rotates or flips it.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        content = read_file(file)
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from None
    return decode_image(content, any_format=True), is_rotated(content)
