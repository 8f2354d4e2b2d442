"""From an encoded image to upright 8-bit RGB; limits are checked before any pixel is decoded."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Pillow's parsers that are tried, for any file name. Others are excluded: the EPS parser starts
Ghostscript, and most other formats are not used for training."""

MAX_PIXELS = 89_478_485
"""Pillow's limit, 9459x9459; a decoded image of this size takes 341 MiB."""
MAX_SIDES = 100
"""Largest ratio of the sides: an image that is resized by its short side must not become too long."""

BAND = 2**22
"""Pixels converted at a time: the conversion to RGB takes up to 16 bytes per pixel."""


class BadImage(ValueError):  # noqa: N818
    """An image that cannot be decoded; the message names it."""


def decode(
    image: bytes | Pixels, name: str, shrink: Callable[[tuple[int, int]], int] | None = None
) -> Image.Image:
    """An upright 8-bit RGB image; transparent parts become white, 16-bit greys keep their high byte.

    shrink: from the upright (height, width) of the whole image, by what a JPEG file's sides may be divided
    while it is decoded: 1, 2, 4 or 8 (libjpeg then computes fewer pixels). Other images stay whole.

    Raises BadImage, with `name`, if this is not a complete image, or if it exceeds `MAX_PIXELS` or
    `MAX_SIDES`.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image).convert("RGB")
    try:
        with open_image(image) as opened:
            if shrink is not None:
                width, height = opened.size
                factor = shrink((width, height) if orientation(opened) >= 5 else (height, width))
                opened.draft(None, (width // factor, height // factor))  # JPEG alone heeds it
            opened.load()
            return to_rgb(upright(opened))
    except MemoryError:
        raise
    except Exception as error:  # a broken file can raise any error of its format's parser
        raise BadImage(f"{name}: cannot be decoded as an image ({reason(error)})") from error


def open_image(image: bytes) -> Image.Image:
    """The image with its header read and checked; its pixels are not decoded yet."""
    size = _webp_size(image)
    if size is not None:  # Pillow's WebP parser allocates memory for the pixels immediately
        _check_size(*size)
    opened = Image.open(io.BytesIO(image), formats=FORMATS)
    _check_size(*opened.size)
    return opened


def reason(error: Exception) -> str:
    """The reason in words why an image was refused."""
    if isinstance(error, UnidentifiedImageError):
        return "not a known image format"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {MAX_PIXELS} pixels; resize it"
    return str(error)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, expected at most {MAX_PIXELS}; resize it")
    if max(width, height) > MAX_SIDES * min(width, height):
        raise ValueError(
            f"{width}x{height} pixels, expected sides of at most {MAX_SIDES}:1; cut it into pieces"
        )


def _webp_size(image: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a WebP file (RFC 9649), None for other data."""
    head = bytes(image[:30])
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transpose operation that undoes each EXIF orientation."""


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the pixels can be intact even if the EXIF block is corrupt
        return 1
    return found if found in _UPRIGHT else 1


def upright(image: Image.Image) -> Image.Image:
    """The image, rotated by its EXIF orientation."""
    turn = _UPRIGHT.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode with a known range; ValueError for others."""
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, even if Pillow widens it to 32 bits
        return _by_bands(image, _high_byte)
    if image.has_transparency_data:
        return _by_bands(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _by_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`convert` of the image, a band of rows at a time, so that intermediate arrays are small."""
    rows = max(1, BAND // image.width)
    if rows >= image.height:
        return convert(image)
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        whole.paste(convert(image.crop(box)), box)
    return whole


def _high_byte(image: Image.Image) -> Image.Image:
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 0xFFFF:
        raise ValueError(f"32-bit greys from {grey.min()} to {grey.max()}; save it with 8 or 16 bits")
    return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
