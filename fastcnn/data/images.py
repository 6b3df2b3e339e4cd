"""Image files as 8-bit RGB: the one decoder of predictions and training."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # for EPS Pillow runs Ghostscript
MAX_PIXELS = 2 * 89_478_485  # Pillow's limit, which scripts like to switch off
ORIENTATION = 0x0112  # of EXIF
TRANSPOSITIONS = {  # by the orientation in EXIF
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class ImageError(ValueError):
    """A file that is no image, a damaged one, or one whose pixels have no definite 8-bit colours."""


def read_image(source: str | os.PathLike[str] | BinaryIO) -> Image:
    """The image in a file, upright, in 8-bit RGB; of an animation or several pages the first.

    See :func:`to_rgb` for how pixels of other kinds are converted. Truncated files are refused even where
    ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` is set.

    Args:
        source: a path, or a binary file that can seek, of one of FORMATS.

    Raises:
        ImageError: there is no such file; it is not of these formats, damaged, or truncated; it would have more than
            MAX_PIXELS pixels (nothing is decoded then); or what :func:`to_rgb` refuses.
        ImportError: Pillow is not installed (it comes with ``fastcnn[models]``).
    """
    from PIL import Image, UnidentifiedImageError

    Image.init()
    path = None if hasattr(source, "read") else Path(source)
    name = getattr(source, "name", "image") if path is None else path
    if path is not None and not path.is_file():
        raise ImageError(f"{name}: there is no such file")
    formats = [format for format in FORMATS if format in Image.OPEN]
    try:
        with _whole_files_only():
            with Image.open(source, formats=formats) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(f"too large an image: {width:,} x {height:,} pixels are more than {MAX_PIXELS:,}")
                if image.format != "PNG":
                    return to_rgb(image)
                image.verify()  # decoding stops at the last pixel, in front of the last checksum
            with Image.open(source, formats=formats) as image:
                return to_rgb(image)
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image of these formats: {', '.join(FORMATS)}") from None
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too large an image: {error}") from None
    except Exception as error:  # what Pillow raises for damaged files depends on the format
        raise ImageError(f"{name}: cannot be read: {error or type(error).__name__}") from error


def to_rgb(image: Image) -> Image:
    """A new image: upright by its EXIF orientation, in 8-bit RGB.

    16-bit values v become round(v / 257) (colours, of which Pillow reads the upper byte: v // 256), greys of 1, 2, 4
    and 12 bits span 0 to 255 likewise. What is transparent shows white behind it. CMYK is converted without a colour
    profile.

    Args:
        image: of Pillow, not necessarily loaded.

    Raises:
        ImageError: the values have no definite range (floating point, 32-bit integers), are in a colour space that
            Pillow does not convert, or Pillow has lost the 16-bit colour that is transparent.
    """
    from PIL import Image

    stored = _stored_as(image)
    image.load()
    key = image.info.get("transparency")
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ImageError(f"values of mode {image.mode!r} have no definite range: scale them to 8 or 16 bits")
    if key is not None and stored == "RGB;16B":
        raise ImageError("one of its 16-bit colours is transparent, which is not supported")
    try:
        if image.mode.startswith("I"):
            rgb = _from_16_bits(image, 4095 if stored == "I;12" else 65535)
        elif key is not None or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
            visible = image.copy()
            if key is not None and stored in ("L;2", "L;4"):
                visible.info["transparency"] = key * {"L;2": 85, "L;4": 17}[stored]
            white = Image.new("RGBA", image.size, "white")
            rgb = Image.alpha_composite(white, visible.convert("RGBA")).convert("RGB")
        else:
            rgb = image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"its colours cannot be converted: {error}") from None
    if (turn := TRANSPOSITIONS.get(_orientation(image))) is not None:
        rgb = rgb.transpose(Image.Transpose[turn])
    rgb.info.clear()  # the orientation above all
    return rgb


def _stored_as(image: Image) -> str:
    """Pillow's name of the pixels in the file ("raw mode"); empty if the image is loaded already."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments if isinstance(arguments, str) else arguments[0] if arguments else "")


def _from_16_bits(image: Image, white: int) -> Image:
    import numpy
    from PIL import Image

    values = numpy.asarray(image).astype(numpy.int64)
    if getattr(image, "tag_v2", {}).get(262) == 0:  # TIFF's "white is zero", which Pillow heeds at 8 bits only
        values = white - values
    grey = ((values * 255 + white // 2) // white).clip(0, 255)
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey.astype(numpy.uint8)).convert("RGB")


def _orientation(image: Image) -> int:
    """By EXIF, of what is loaded; of a broken one, 1: upright."""
    if image.format == "TIFF":  # Pillow turns it while it loads it
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1


_lock, _readers, _lenient = threading.Lock(), 0, False


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Pillow's switch is global: the first reader of any thread turns it off, the last restores it."""
    global _readers, _lenient
    from PIL import ImageFile

    with _lock:
        if _readers == 0:
            _lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if _readers == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _lenient
