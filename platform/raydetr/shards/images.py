"""Validate encoded images before they are packed, and decode them to the same RGB pixels everywhere.

An image that only a lenient decoder accepts is corrupt: libjpeg fills what is missing with gray and reports a warning,
which Pillow ignores. Here every warning is an error.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG")
EXIF_ORIENTATION = 0x0112
TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
MAX_DARK = round(4095 / 257)  # of 255: the brightest pixel of an image with 12 bits in 16
MAX_PIXELS = 2 * (2**30 // 4 // 3)  # 178,956,970, above which Pillow refuses an image, too

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_START = b"\x89PNG\r\n\x1a\n"
PLAIN_COLORSPACES = ("YCbCr", "RGB", "Gray")  # of a JPEG, as simplejpeg names them
# Zeros in the scan of a JPEG that are no longer than this may be a flat area
MAX_ZEROS = 64

# The exceptions that Pillow raises for images that cannot be decoded
PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error, Image.DecompressionBombError
)  # fmt: skip

Pixels = npt.NDArray[np.uint8]  # [h, w, 3], RGB
ReadImage = Callable[[int], Image.Image | None]  # by image id; None: it cannot be read


class ImageError(ValueError):
    """An image that cannot be used; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class ImageHeader:
    """What an image file says about itself."""

    size: tuple[int, int]  # width and height in pixels, as stored
    extension: str  # that fits its content: jpg or png
    orientation: int  # of its EXIF data; 1 without any
    is_dark: bool = False  # 16 bits per pixel, of which at most 12 are used; known when it was decoded

    @property
    def is_rotated(self) -> bool:
        """Whether viewers rotate or flip it; 0 is not an orientation, but some cameras write it."""
        return self.orientation not in (0, 1)


def read_header(file: BinaryIO) -> ImageHeader:
    """Read the header of a JPEG or PNG.

    Raises:
        ImageError: the file is neither, or its header is corrupt.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError("is not a JPEG or PNG image: convert or replace it") from None
    except Image.DecompressionBombError:
        raise ImageError(f"has more than {MAX_PIXELS:,} pixels: scale it down or cut it into tiles") from None
    except PILLOW_ERRORS as error:
        raise ImageError(f"cannot be decoded ({error}): replace the file") from None
    return ImageHeader(image.size, "png" if image.format == "PNG" else "jpg", _orientation(image))


def check_image(content: bytes, expected: tuple[int, int]) -> ImageHeader:
    """Verify that an image decodes to the expected size, width and height in pixels.

    Raises:
        ImageError: it is empty, not an image or corrupt.
        ValueError: it has another size.
    """
    if not content:
        raise ImageError("the file is empty: replace it or remove the record")
    header = read_header(io.BytesIO(content))
    _check_size(header, expected)
    try:
        pixels = decode_pixels(content)  # the decoder of training
    except ImageError as error:
        raise ImageError(f"cannot be decoded ({error}): replace the file") from None
    # In a PNG, the bit depth is the byte after the size
    is_16_bit = header.extension == "png" and content[24] == 16
    return replace(header, is_dark=is_16_bit and bool(pixels.max() <= MAX_DARK))


def decode_pixels(content: bytes) -> Pixels:
    """Decode a JPEG or PNG to 8-bit RGB, a writable array [h, w, 3], in its stored orientation.

    Gray, palette and CMYK images are converted, 16-bit ones are scaled to 8 bits, an alpha channel is dropped. An
    EXIF orientation is not applied, because COCO's boxes refer to the stored pixels.

    Raises:
        ImageError: the content is not a JPEG or PNG, or is corrupt.
    """
    if content.startswith(JPEG_START):
        return _decode_jpeg(content)
    _check_png(content)
    return _decode_with_pillow(content)


def decode_image(content: bytes, *, any_format: bool = False) -> Image.Image:
    """Decode like `decode_pixels`, to an image that can be drawn on; with `any_format`, whatever Pillow reads.

    Raises:
        ImageError: as `decode_pixels`.
    """
    is_other = any_format and not content.startswith((JPEG_START, PNG_START))
    return Image.fromarray(_decode_with_pillow(content, None) if is_other else decode_pixels(content))


def is_rotated(content: bytes) -> bool:
    """Return whether a readable image has an EXIF orientation by which viewers rotate or flip it."""
    return _orientation(Image.open(io.BytesIO(content))) not in (0, 1)


def _decode_jpeg(content: bytes) -> Pixels:
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        if height * width > MAX_PIXELS:
            raise ImageError(f"it has more than {MAX_PIXELS:,} pixels")
        is_plain = colors in PLAIN_COLORSPACES
        pixels: Pixels = simplejpeg.decode_jpeg(content, "RGB" if is_plain else "CMYK")
    except ValueError as error:
        # Only the end marker is missing, if the image is complete with it
        if "Premature end of JPEG file" in str(error) and not content.endswith(JPEG_END):
            return _decode_jpeg(content + JPEG_END)
        raise ImageError(str(error)) from None
    if _has_hole(content):
        raise ImageError("a part of it was overwritten by zeros")
    return pixels if is_plain else _decode_with_pillow(content)


def _has_hole(content: bytes) -> bool:
    """Return whether the only scan of a JPEG has a long run of zero bytes that cannot be image data.

    A lost block of a disk reads as zeros, and a decoder may take them for coefficients without a warning. Zeros are
    the shortest Huffman code again and again. If it means "end of block", as in the tables of flat images, they are
    data; if it means an AC coefficient of a component, whole blocks would consist of the same one (ITU-T T.81, B.2).
    """
    # First, because most images have none, and the start of the scan is slow to find
    last = content.rfind(bytes(MAX_ZEROS))
    if last < 0 or last < content.rfind(b"\xff\xda"):
        return False
    at, num_components = len(JPEG_START), 0
    symbols: list[int] = []
    while at + 10 < len(content):
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4])
        if marker == 0xDA:  # start of scan: what follows is not read
            return content[at + 4] == num_components and any(symbol & 0x0F for symbol in symbols)
        if marker in (0xC0, 0xC1):  # sequential frame
            num_components = content[at + 9]
        table, at = at + 4, at + 2 + length
        while marker == 0xC4 and table < at:  # Huffman tables: class, 16 counts of codes, symbols
            if content[table] >> 4:
                symbols.append(content[table + 17])
            table += 17 + sum(content[table + 1 : table + 17])
    return False


def _check_png(content: bytes) -> None:
    """Verify the checksum of every chunk, up to the last one; Pillow skips some, and does without the last.

    Raises:
        ImageError: a chunk is corrupt or missing.
    """
    at = len(PNG_START)
    kind = b""
    while kind != b"IEND" and content.startswith(PNG_START):
        header = content[at : at + 8]
        end = at + 12 + int.from_bytes(header[:4])
        if len(header) < 8 or end > len(content):
            raise ImageError(f"the file is cut short: the PNG chunk at byte {at} is incomplete")
        kind = header[4:]
        if zlib.crc32(content[at + 4 : end - 4]) != int.from_bytes(content[end - 4 : end]):
            raise ImageError(f"the checksum of the PNG chunk at byte {at} is wrong")
        at = end


def _decode_with_pillow(content: bytes, formats: tuple[str, ...] | None = FORMATS) -> Pixels:
    try:
        return np.array(_to_rgb(Image.open(io.BytesIO(content), formats=formats)))
    except UnidentifiedImageError:  # whose message holds an address in memory
        raise ImageError(f"it is not {'a JPEG or PNG' if formats else 'an'} image") from None
    except PILLOW_ERRORS as error:
        raise ImageError(str(error)) from None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except PILLOW_ERRORS:
        return 1  # corrupt metadata; the pixels may be fine


def _check_size(header: ImageHeader, expected: tuple[int, int]) -> None:
    stored = header.size
    if stored == expected:
        return
    sizes = (
        f"the file holds {stored[0]}x{stored[1]} pixels, the annotations specify {expected[0]}x{expected[1]}"
    )
    if stored == expected[::-1] and header.orientation in TRANSPOSED_ORIENTATIONS:
        raise ValueError(
            f"{sizes}, the size after applying its EXIF orientation {header.orientation}: "
            "store the rotated pixels (ImageOps.exif_transpose) if the boxes were drawn on the rotated image, "
            "else swap width and height in the annotations"
        )
    raise ValueError(f"{sizes}: correct width and height, or replace the file")


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
