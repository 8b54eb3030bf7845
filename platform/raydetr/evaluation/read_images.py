"""Read the images of a report from shards, or from a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raydetr.shards.images import ImageError, ReadImage, decode_image
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


def store_images(shards: Shards, image_ids: Sequence[int], folder: Path) -> None:
    """Write images of shards as they are, each into a file with its id as the name; corrupt ones are left out.

    Raises:
        OSError: the shards cannot be reached, or a file cannot be written.
    """
    places = np.flatnonzero(np.isin(shards.samples["image_id"], np.array(image_ids, np.int64))).tolist()
    folder.mkdir(parents=True, exist_ok=True)
    for place, sample in zip(places, shards.read_many(places), strict=True):
        if not isinstance(sample, ShardError):
            (folder / str(shards.samples["image_id"][place])).write_bytes(sample.image)


def from_folder(folder: Path, ground_truth: Mapping[str, Any]) -> ReadImage:
    """Return a function that reads an image by its id, from the file that the ground truth names."""
    names = {image["id"]: image["file_name"] for image in ground_truth["images"]}

    def read(image_id: int) -> Image.Image | None:
        try:
            return decode_image(read_file(folder / names[image_id]), any_format=True)
        except (ImageError, OSError):  # the report must not end for a picture
            return None

    return read
