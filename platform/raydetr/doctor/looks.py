"""How an image looks, in a few bytes that a copy of it shares: recompressed, resized, a little brighter.

Two views of the gray picture. The *gradient hash* has 64 bits: for each of 8x8 cells, whether the next one at the
right is brighter; it can be searched. The *thumbnail* has 16x16 gray values; it decides. Both are taken from a
picture that the JPEG decoder itself has reduced, at half the cost of a full decode.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from raydetr.shards.images import EXIF_ORIENTATION, FORMATS, UNREADABLE, decode_rgb

SIDE = 16  # of a thumbnail
HASH_SIZE = (9, 8)  # width, height
REDUCED_SIDE = 64  # pixels; JPEGs are decoded to at least that

Bytes = npt.NDArray[np.uint8]

Look = tuple[tuple[int, int], bool, int, Bytes]


def look_at(content: bytes) -> Look:
    """Size as stored (width, height), whether EXIF turns it, gradient hash, thumbnail [SIDE * SIDE].

    Raises:
        OSError, or another of UNREADABLE: the image cannot be decoded.
    """
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    size, turned = image.size, _is_turned(image)
    if image.format == "JPEG":
        image.draft("L", (REDUCED_SIDE, REDUCED_SIDE))
        gray = image.convert("L")
    else:
        gray = decode_rgb(content).convert("L")
    # a reduced picture has whole pixels only; without the exact border, copies of other sizes would look shifted
    reduction = max(1, round(size[0] / gray.width))
    box = (0, 0, min(size[0] / reduction, gray.width), min(size[1] / reduction, gray.height))
    small = np.asarray(gray.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box))
    cells = np.asarray(gray.resize(HASH_SIZE, Image.Resampling.BILINEAR, box=box))
    bits = np.packbits(cells[:, 1:] > cells[:, :-1])
    return size, turned, int.from_bytes(bits.tobytes(), "little"), small.ravel()


def _is_turned(image: Image.Image) -> bool:
    try:
        return bool(image.getexif().get(EXIF_ORIENTATION, 1) != 1)
    except (*UNREADABLE, TypeError, KeyError):
        return False  # damaged metadata; the pixels may be fine
