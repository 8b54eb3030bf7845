"""The size of an image file, from its header."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from raydetr.shards.images import EXIF_ORIENTATION, FORMATS, UNREADABLE


def read_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of a JPEG or PNG file, for boxes in parts of them.

    Raises:
        ValueError: it cannot be read, or carries an EXIF orientation: the boxes refer to the turned image then,
            because the tools that write such labels show it turned.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            size = image.size
    except UNREADABLE as error:
        raise ValueError(f"{path}: is no JPEG or PNG image ({error}): convert or replace it") from None
    if orientation not in (0, 1):
        raise ValueError(
            f"{path}: carries the EXIF orientation {orientation}, and its labels refer to the turned image: "
            "store the pixels turned (ImageOps.exif_transpose)"
        )
    return size
