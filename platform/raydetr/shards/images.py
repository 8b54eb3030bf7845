"""Encoded images: checked before they are packed, and decoded to the same RGB pixels everywhere."""

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
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)  # what Pillow raises
JPEG_START = b"\xff\xd8"
PLAIN_COLOURS = ("YCbCr", "RGB", "Gray")  # of a JPEG, in simplejpeg's words
MAX_PIXELS = 2**26  # above this Pillow decodes, or refuses
TURNED = (5, 6, 7, 8)  # the EXIF orientations that exchange width and height


def decode_rgb(content: bytes) -> Image.Image:
    """Decode a JPEG or PNG to 8-bit RGB, in the orientation in which it is stored.

    Gray, palette and CMYK images are converted, 16-bit ones scaled to 8 bit, an alpha channel is dropped; an
    EXIF orientation is not applied, because COCO's boxes refer to the stored pixels.

    Raises:
        OSError: the content is no JPEG or PNG, or is damaged.
    """
    return _to_rgb(Image.open(io.BytesIO(content), formats=FORMATS))


def decode_pixels(content: bytes) -> Pixels:
    """The pixels of `decode_rgb`, as an array [h, w, 3] that may be written to, and sooner.

    Raises:
        OSError, and others of `UNREADABLE`: as `decode_rgb`.
    """
    pixels = _decode_plain_jpeg(content) if content.startswith(JPEG_START) else None
    return np.array(decode_rgb(content)) if pixels is None else pixels


def read_checked(path: Path, record: Record) -> tuple[bytes, str, bool]:
    """Read an image file and make sure that it decodes to the size its COCO record says.

    Returns:
        the file's bytes, the extension that fits its content (`jpg` or `png`), and whether it carries an EXIF
        orientation (which is ignored).

    Raises:
        ValueError: the file is missing, empty, no image, damaged, or of another size.
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
    _, extension, turned = check_image(where, content, (record["width"], record["height"]))
    return content, extension, turned


def check_image(
    where: str, content: bytes, expected: tuple[int, int] | None
) -> tuple[tuple[int, int], str, bool]:
    """Make sure that an image decodes, to the size that is expected of it.

    Args:
        where: begins the messages.
        content: of the image file.
        expected: width and height in pixels; None: any.

    Returns:
        its width and height, the extension that fits its content, and whether it carries an EXIF orientation.

    Raises:
        ValueError: it is no image, damaged, or of another size.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"{where}: is no JPEG or PNG image: convert or replace it") from None
    except UNREADABLE as error:
        raise ValueError(f"{where}: cannot be decoded ({error}): replace the file") from None
    orientation = _orientation(image)
    _check_size(where, image.size, expected or image.size, orientation)
    try:
        decode_pixels(content)  # as in training
    except UNREADABLE as error:
        raise ValueError(f"{where}: cannot be decoded ({error}): replace the file") from None
    return image.size, "png" if image.format == "PNG" else "jpg", orientation != 1


def _decode_plain_jpeg(content: bytes) -> Pixels | None:
    """Decode without Pillow, which is slower; None: Pillow has to see it, and says what is wrong if anything."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        if colors not in PLAIN_COLOURS or height * width > MAX_PIXELS:
            return None
        decoded: Pixels = simplejpeg.decode_jpeg(content)
        return decoded
    except ValueError:  # damage, or what is merely unusual, such as bytes too many before the end
        return None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except (*UNREADABLE, TypeError, KeyError):
        return 1  # damaged metadata; the pixels may be fine


def _check_size(where: str, stored: tuple[int, int], expected: tuple[int, int], orientation: int) -> None:
    if stored == expected:
        return
    sizes = f"the file holds {stored[0]}x{stored[1]} pixels, the annotations say {expected[0]}x{expected[1]}"
    if stored == expected[::-1] and orientation in TURNED:
        raise ValueError(
            f"{where}: {sizes}, the size after the turn that its EXIF orientation {orientation} asks for: "
            "store the pixels turned (ImageOps.exif_transpose) if the boxes were drawn on the turned image, "
            "else exchange width and height in the annotations"
        )
    raise ValueError(f"{where}: {sizes}: correct width and height, or replace the file")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):  # 16 bits in Pillow's integer modes, which its own conversion clips
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
