"""Read the images of a report from shards, or from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from raydetr.evaluation.report_images import ReadImage
from raydetr.shards.images import ImageError, decode_image
from raydetr.shards.reader import ShardError, Shards
from raydetr.user_files import read_file


def from_shards(shards: Shards) -> ReadImage:
    """Return a function that reads an image of shards by its id."""
    places = {int(image_id): place for place, image_id in enumerate(shards.samples["image_id"])}

    def read(image_id: int) -> Image.Image | None:
        try:
            return decode_image(shards.read(places[image_id]).image)
        except (ShardError, ImageError, OSError):  # the report must not end for a picture
            return None

    return read


def from_folder(folder: Path, ground_truth: Mapping[str, Any]) -> ReadImage:
    """Return a function that reads an image by its id, from the file that the ground truth names."""
    names = {image["id"]: image["file_name"] for image in ground_truth["images"]}

    def read(image_id: int) -> Image.Image | None:
        try:
            return decode_image(read_file(folder / names[image_id]), any_format=True)
        except (ImageError, OSError):  # the report must not end for a picture
            return None

    return read
