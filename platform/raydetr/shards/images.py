"""Validate encoded images before they are packed, and decode them to the same RGB pixels everywhere."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from raydetr.shards.coco import Record

FORMATS = ("JPEG", "PNG")
EXIF_ORIENTATION = 0x0112
Pixels = npt.NDArray[np.uint8]  # [h, w, 3], RGB
# The exceptions that Pillow raises for images that cannot be decoded.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
JPEG_START = b"\xff\xd8"
PLAIN_COLORSPACES = ("YCbCr", "RGB", "Gray")  # of a JPEG, as simplejpeg names them
MAX_PIXELS = 2**26  # larger images are left to Pillow, which may reject them
TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def decode_rgb(content: bytes) -> Image.Image:
    """Decode a JPEG or PNG to 8-bit RGB, in its stored orientation.

    Gray, palette and CMYK images are converted, 16-bit ones are scaled to 8 bits, an alpha channel is dropped. An
    EXIF orientation is not applied, because COCO's boxes refer to the stored pixels.

    Raises:
        OSError: the content is not a JPEG or PNG, or is corrupt.
    """
    return _to_rgb(Image.open(io.BytesIO(content), formats=FORMATS))


def decode_pixels(content: bytes) -> Pixels:
    """Decode like `decode_rgb`, but faster and to a writable array [h, w, 3].

    Raises:
        OSError: as `decode_rgb`; the other exceptions of `UNREADABLE` are possible too.
    """
    pixels = _decode_plain_jpeg(content) if content.startswith(JPEG_START) else None
    return np.array(decode_rgb(content)) if pixels is None else pixels


def read_checked(path: Path, record: Record) -> tuple[bytes, str, bool]:
    """Read an image file and verify that it decodes to the size in its COCO record.

    Returns:
        the file's bytes, the extension that fits its content (`jpg` or `png`), and whether it has an EXIF
        orientation that rotates or flips it (which is ignored).

    Raises:
        ValueError: the file is missing, empty, not an image, corrupt, or of another size.
    """
    where = f"{path} (image id {record['id']})"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{where}: cannot be read ({error.strerror}): add the file or remove the record"
        ) from None
    if not content:
        raise ValueError(f"{where}: the file is empty: replace it or remove the record")
    _, extension, rotated = check_image(where, content, (record["width"], record["height"]))
    return content, extension, rotated


def check_image(
    where: str, content: bytes, expected: tuple[int, int] | None
) -> tuple[tuple[int, int], str, bool]:
    """Verify that an image decodes to the expected size.

    Args:
        where: prefix of the error messages.
        content: bytes of the image file.
        expected: width and height in pixels; None accepts any size.

    Returns:
        width and height, the extension that fits the content, and whether it has an EXIF orientation that rotates or
        flips it.

    Raises:
        ValueError: it is not an image, is corrupt, or has another size.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"{where}: is not a JPEG or PNG image: convert or replace it") from None
    except UNREADABLE as error:
        raise ValueError(f"{where}: cannot be decoded ({error}): replace the file") from None
    orientation = _orientation(image)
    _check_size(where, image.size, expected or image.size, orientation)
    try:
        decode_pixels(content)  # the decoder of training
    except UNREADABLE as error:
        raise ValueError(f"{where}: cannot be decoded ({error}): replace the file") from None
    return image.size, "png" if image.format == "PNG" else "jpg", orientation != 1


def _decode_plain_jpeg(content: bytes) -> Pixels | None:
    """Decode without Pillow, which is slower; None: the caller must use Pillow, whose result and errors count."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        if colors not in PLAIN_COLORSPACES or height * width > MAX_PIXELS:
            return None
        decoded: Pixels = simplejpeg.decode_jpeg(content)
        return decoded
    except ValueError:  # corrupt or merely unusual, for example surplus bytes before the end
        return None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except (*UNREADABLE, TypeError, KeyError):
        return 1  # corrupt metadata; the pixels may be fine


def _check_size(where: str, stored: tuple[int, int], expected: tuple[int, int], orientation: int) -> None:
    if stored == expected:
        return
    sizes = (
        f"the file holds {stored[0]}x{stored[1]} pixels, the annotations specify {expected[0]}x{expected[1]}"
    )
    if stored == expected[::-1] and orientation in TRANSPOSED_ORIENTATIONS:
        raise ValueError(
            f"{where}: {sizes}, the size after applying its EXIF orientation {orientation}: "
            "store the rotated pixels (ImageOps.exif_transpose) if the boxes were drawn on the rotated image, "
            "else swap width and height in the annotations"
        )
    raise ValueError(f"{where}: {sizes}: correct width and height, or replace the file")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):  # 16-bit integer modes, which Pillow's own conversion would clip
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
