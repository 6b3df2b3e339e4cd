"""Damage to image files that Pillow does not report."""

from __future__ import annotations

import operator
import re
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.TiffImagePlugin import TiffImageFile

BLOCK = 1 << 20
NOISE = bytes(range(255)) * 8  # begins with 0, which makes of a last 255 data again, not a marker
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # of JPEG, with a length
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the colour type of a PNG
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def check_file(source: Path | BinaryIO, image: Image) -> None:
    """Raise ValueError for a damaged file.

    Args:
        source: the file.
        image: what Pillow has loaded from it.
    """
    if image.format == "PNG":
        _check_png(_content(source))
    elif image.format in ("JPEG", "MPO"):
        _check_jpeg(source, image)
    elif image.format == "JPEG2000" and b"\xff\x93" not in _content(source):
        raise ValueError("the image is truncated in front of its data")


def _content(source: Path | BinaryIO) -> bytes:
    if isinstance(source, Path):
        return source.read_bytes()
    source.seek(0)
    return source.read()


def _check_jpeg(source: Path | BinaryIO, image: Image) -> None:
    """If the data of a scan end before the image does, libjpeg fills it with grey, and Pillow drops its warning.

    So where the last pixels have one colour, noise is inserted after the data: if they were complete, it is not read.
    That finds a truncated baseline scan, unless it ends at a restart marker, and not the missing scans of a progressive
    file.
    """
    from PIL import Image, ImageChops

    width, height = image.size
    last = image.getpixel((width - 1, height - 1))
    if width > 3 and image.getpixel((width - 4, height - 1)) != last:
        return
    if image.crop((max(width - 4, 0), max(height - 4, 0), width, height)).getcolors(1) is None:
        return
    data = _content(source)
    end = _end_of_jpeg(data)
    with Image.open(BytesIO(data[:end] + NOISE + data[end:]), formats=["JPEG"]) as noisy:
        if ImageChops.difference(noisy, image).getbbox() is not None:
            raise ValueError("the image is truncated: its data end before it does")


def _end_of_jpeg(data: bytes) -> int:
    """Where the marker EOI of the first image is; thumbnails are in segments, which are skipped."""
    position = 2
    while (found := MARKER.search(data, position)) is not None:
        position = found.start()
        if data[position + 1] == 0xD9:
            return position
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return len(data)


def _check_png(data: bytes) -> None:
    """Pillow stops decoding at the last row, before the last checksums, or where the compressed data end."""
    chunks = list(_chunks(data))
    header, kinds = chunks[0][1], {kind for kind, _ in chunks}
    if header[9] == 3 and b"PLTE" not in kinds:
        raise ValueError("the image has no palette")
    inflate, missing = zlib.decompressobj(), _bytes_of_rows(header)
    for kind, content in chunks:
        while kind == b"IDAT" and content and missing > 0:
            missing -= len(inflate.decompress(content, BLOCK))
            content = inflate.unconsumed_tail
    if missing > 0:
        raise ValueError("the image has fewer rows than its header says")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of the chunks of a PNG, whose checksums are right."""
    position, kind = 8, b""
    while kind != b"IEND":
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        kind, content, checksum = data[position + 4 : position + 8], data[position + 8 : end], data[end : end + 4]
        if len(checksum) < 4:
            raise ValueError("the image is truncated")
        if zlib.crc32(kind + content) != int.from_bytes(checksum, "big"):
            raise ValueError(f"the chunk {kind!r} has a wrong checksum")
        yield kind, content
        position = end + 4


def _bytes_of_rows(header: bytes) -> int:
    """How many bytes the rows of a PNG are, each with its filter."""
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    bits, colour, interlaced = header[8], header[9], header[12]
    needed = 0
    for left, top, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            needed += rows * (1 + -(-columns * bits * CHANNELS[colour] // 8))
    return needed


def check_tiff(image: TiffImageFile | Any, most_pixels: int) -> None:
    """Raise ValueError for a TIFF, not yet loaded, of a kind that Pillow reads as another, or with too little data."""
    tags: Any = image.tag_v2
    tiles = image.tile
    samples, bits = tags.get(277, 1), tags.get(258, (1,))
    bits = (bits * samples if len(bits) == 1 else bits)[:samples]
    planes = len(bits) if tags.get(284) == 2 else 1
    if tags.get(322, 0) * tags.get(323, 0) > most_pixels:
        raise ValueError("its tiles are too large")
    if 2 in tags.get(339, ()) and image.mode != "I":
        raise ValueError("signed values cannot be mapped to 8 bits unambiguously")
    if not tiles or tiles[0][0] != "raw":  # libtiff knows
        return
    if planes > 1 and max(bits) > 8:
        raise ValueError("16-bit planes without compression are not supported")
    if tags.get(262) == 6 and tuple(tags.get(530, (2, 2))) != (1, 1):
        raise ValueError("subsampled YCbCr without compression is not supported")
    stored = tags.get(279) or tags.get(325) or ()
    boxes: list[Any] = [tile[1] for tile in tiles]
    needed = [(bottom - top) * -(-(right - left) * sum(bits) // planes // 8) for left, top, right, bottom in boxes]
    area = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
    short = 0 not in stored and any(map(operator.lt, stored[-len(needed) :], needed))  # 0 if it is not known
    if short or area < image.size[0] * image.size[1] * planes:
        raise ValueError("the image has less data than its header says")
