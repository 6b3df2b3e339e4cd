"""Image files as 8-bit RGB: the one decoder of predictions and training."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from .damage import check_file, check_tiff

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray
    from PIL.Image import Image

    Pixels = NDArray[uint8]
_T = TypeVar("_T")

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # for EPS Pillow runs Ghostscript
MAX_PIXELS = 2 * 89_478_485  # Pillow's limit, which scripts like to switch off
MAX_SIDE = 65_535  # that of JPEG
MAX_BYTES = 2**31  # of a file, which may be read as a whole
OUTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)  # no fault of a file
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
    """A file that is no image, a damaged one, or one whose pixels cannot be mapped to 8 bits unambiguously."""


def read_image(source: str | os.PathLike[str] | BinaryIO) -> Image:
    """The image in a file, upright, in 8-bit RGB; the first frame or page if there are several.

    See :func:`to_rgb` for how pixels of other kinds are converted. Truncated files are refused even where
    ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` is set.

    Args:
        source: a path, or a binary file, which is read from its start and must be able to seek; of one of FORMATS.

    Raises:
        ImageError: it is not a file of these formats; it is damaged, or truncated; it would have more than MAX_PIXELS
            pixels, more than MAX_SIDE on a side, or MAX_BYTES in all (nothing is decoded then); or what :func:`to_rgb`
            refuses.
        ImportError: Pillow or numpy is not installed (both come with ``fastcnn[models]``).
    """
    return _read(source, _new_rgb)


def read_pixels(source: str | os.PathLike[str] | BinaryIO) -> Pixels:
    """What :func:`read_image` reads, as a uint8 array of shape (height, width, 3), which is read-only."""
    import numpy

    return _read(source, lambda image: numpy.asarray(_upright_rgb(image)))


def centre_square(pixels: Pixels, size: int) -> Pixels:
    """The short side scaled to ``size``, and the centre cropped.

    Bicubic, with antialiasing, by torch for 8 bits: rounded once in each direction, as Pillow does it. The square is
    cut out first, so that a long picture needs no more memory than a square one.

    Args:
        pixels: uint8 array of shape (height, width, 3).
        size: in pixels.

    Returns:
        uint8 array of shape (size, size, 3).
    """
    import torch
    from torch.nn.functional import interpolate

    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    if side == size:
        return square
    batch = torch.from_numpy(square.copy())[None].permute(0, 3, 1, 2)  # channels_last, and so is the result
    scaled: Pixels = interpolate(batch, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    return scaled


def to_rgb(image: Image) -> Image:
    """A new image: upright by its EXIF orientation, in 8-bit RGB.

    16-bit grey v becomes round(v / 257); of other 16-bit colours Pillow reads the upper byte, v // 256. Greys of fewer
    bits are scaled to 0 to 255. Transparency is composited over white. CMYK is converted without a colour profile.

    Args:
        image: a Pillow image, best as it was opened: of one that is already loaded it is not known whether a PNG had 2
            or 4 bits, which matters for its transparency.

    Raises:
        ImageError: it is damaged or truncated; its values cannot be mapped to 8 bits unambiguously (floating point,
            32-bit or signed integers); Pillow does not convert its colours, or not correctly.
    """
    with _whole_files_only():
        return _new_rgb(image)


def _read(source: str | os.PathLike[str] | BinaryIO, convert: Callable[[Image], _T]) -> _T:
    """What ``convert`` makes of an image that is open; raises as :func:`read_image`."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    given: Any = source if hasattr(source, "read") else Path(source)
    name = getattr(given, "name", "image") if given is source else given
    formats = [format for format in FORMATS if format in Image.OPEN]
    try:
        if (size := _size(given)) > MAX_BYTES:
            raise ImageError(f"the file is too large: {size:,} bytes")
        with _whole_files_only(), Image.open(given, formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS or max(image.size) > MAX_SIDE:
                raise ImageError(f"the image is too large: {width:,} x {height:,} pixels")
            result = convert(image)
            check_file(given, image)
            return result
    except (ImportError, MemoryError):
        raise
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise ImageError(f"{name}: not an image, or not of a kind that Pillow reads: {kinds}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: the image is too large: {error}") from None
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # what is raised for damaged files depends on the format
        if isinstance(error, OSError) and error.errno in OUTAGES:
            raise
        raise ImageError(f"{name}: cannot be read: {error or type(error).__name__}") from error


def _size(source: Path | BinaryIO) -> int:
    """Of a file, in bytes."""
    if not isinstance(source, Path):
        return source.seek(0, os.SEEK_END)
    if not source.is_file():
        raise ImageError("not a file")
    return source.stat().st_size


def _new_rgb(image: Image) -> Image:
    rgb = _upright_rgb(image)
    rgb = rgb.copy() if rgb is image else rgb
    rgb.info.clear()  # the orientation above all
    return rgb


def _upright_rgb(image: Image) -> Image:
    """The image itself, if it is in 8-bit RGB and upright, or else a new one."""
    from PIL import Image

    if 0 in image.size:
        raise ImageError("it has no pixels")
    tile = (getattr(image, "tile", None) or [None])[0]  # decoder, box, offset, arguments: before it is loaded
    stored = _stored_as(tile)
    key: Any = image.info.get("transparency")
    try:
        if image.format == "TIFF":
            check_tiff(image, MAX_PIXELS)
        image.load()
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(f"cannot be read: {error or type(error).__name__}") from error
    key = image.info.get("transparency", key)
    size, format, orientation = image.size, image.format, _orientation(image)
    box = tile[1] if format == "GIF" and tile is not None and image.tell() == 0 else (0, 0, *size)
    if box != (0, 0, *size):  # the first frame is smaller than the picture, and around it is nothing
        image = image.crop(box)
    if image.mode == "F" or (image.mode == "I" and format not in ("PNG", "PPM")):
        raise ImageError(f"values of mode {image.mode!r} cannot be mapped to 8 bits: their range is not known")
    if image.mode == "RGB" and key is not None and (stored == "RGB;16B" or max(key) > 255):
        raise ImageError("one of its 16-bit colours is transparent, which is not supported")
    if image.mode == "P":
        extrema: Any = image.getextrema()
        if extrema[1] >= len(image.getpalette() or ()) // 3 and extrema[1] != key:
            raise ImageError("cannot be read: it has pixels of colours that are not in its palette")
    try:
        if image.mode.startswith("I"):
            rgb = _from_16_bits(image, key)
        elif key is not None or image.mode in ("LA", "PA", "RGBA", "RGBa"):
            visible = image.copy()
            if stored in ("L;2", "L;4"):
                visible.info["transparency"] = key * {"L;2": 85, "L;4": 17}[stored]
            white = Image.new("RGBA", visible.size, "white")
            rgb = Image.alpha_composite(white, visible.convert("RGBA")).convert("RGB")
        else:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
    except (TypeError, ValueError) as error:
        raise ImageError(f"its colours cannot be converted: {error}") from None
    if rgb.size != size:
        frame, rgb = rgb, Image.new("RGB", size, "white")
        rgb.paste(frame, box)
    if (turn := TRANSPOSITIONS.get(orientation)) is not None:
        rgb = rgb.transpose(Image.Transpose[turn])
    return rgb


def _stored_as(tile: Any) -> str:
    """Pillow's name of the pixels in the file ("raw mode"); empty if it is not known."""
    if tile is None or not tile[3]:
        return ""
    return str(tile[3] if isinstance(tile[3], str) else tile[3][0])


def _from_16_bits(image: Image, transparent: Any) -> Image:
    import numpy
    from PIL import Image

    tags = getattr(image, "tag_v2", {})  # of TIFF: bits, and whether 0 is white, which Pillow ignores at 16 bits
    largest = 4095 if tags.get(258) == (12,) else 65535
    table = (numpy.arange(65536) * 255 + largest // 2) // largest
    if tags.get(262) == 0:
        table[: largest + 1] = table[largest::-1]
    if transparent is not None:
        table[transparent] = 255
    values = numpy.asarray(image).clip(0, largest)
    return Image.fromarray(table.astype(numpy.uint8)[values]).convert("RGB")


def _orientation(image: Image) -> int:
    """EXIF orientation of a loaded image; 1, upright, if missing or malformed."""
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
                ImageFile.LOAD_TRUNCATED_IMAGES |= _lenient


def _after_fork() -> None:
    """In the child there are no other readers."""
    global _lock, _readers
    _lock, _readers = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
