"""Pictures from files: the right pixels, by construction, or a clear error."""

from __future__ import annotations

import errno
import io
import os
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fastcnn.data import ImageError, images, photographs, read_image, to_rgb
from fastcnn.models import PREPROCESSINGS, Preprocessing

Image = pytest.importorskip("PIL.Image")
from PIL import ImageFile  # noqa: E402

Array = numpy.ndarray[Any, Any]
PHOTOGRAPH = sorted((Path(images.__file__).parent / "photographs").glob("*.jpg"))[1]
WHITE = 255


def pixels(source: bytes | Path) -> Array:
    image = read_image(io.BytesIO(source) if isinstance(source, bytes) else source)
    assert image.mode == "RGB"
    return numpy.asarray(image)


def grey(*values: int) -> list[list[list[int]]]:
    """One row of grey pixels."""
    return [[[value] * 3 for value in values]]


def encoded(image: Any, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG file, written as the standard says; ``rows`` begin with their filter, 0."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    others = b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + header + others + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(
    width: int,
    height: int,
    bits: int | tuple[int, ...],
    *strips: bytes,
    order: str = "<",
    **tags: int | tuple[int, ...],
) -> bytes:
    """A TIFF file, by default of one strip of grey without compression; ``tags`` are named t262 and so on."""
    start = {"<": b"II", ">": b"MM"}[order]
    bits = (bits,) if isinstance(bits, int) else bits
    lengths = tuple(map(len, strips))
    offsets = tuple(8 + sum(lengths[:i]) for i in range(len(strips)))
    values = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: offsets, 277: len(bits), 278: height}
    values |= {279: lengths, **{int(name[1:]): value for name, value in tags.items()}}
    data, entries, after = b"".join(strips), b"", b""
    place = 8 + len(data) + 2 + 12 * len(values) + 4
    for tag, value in sorted(values.items()):
        numbers = (value,) if isinstance(value, int) else value
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        inline = packed if len(numbers) == 1 else struct.pack(f"{order}I", place + len(after))
        after += packed if len(numbers) > 1 else b""
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + inline
    directory = struct.pack(f"{order}H", len(values)) + entries + bytes(4)
    return start + struct.pack(f"{order}HI", 42, 8 + len(data)) + data + directory + after


@pytest.fixture(scope="module")
def picture() -> Any:
    return read_image(PHOTOGRAPH).resize((48, 32))


# -- pixels of every kind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_grey_of_16_bits(kind: str, order: str) -> None:
    """v becomes round(v / 257), for every v."""
    values = numpy.arange(65536).reshape(256, 256)
    if kind == "png":
        file = png(256, 256, 16, 0, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    elif kind == "tiff":
        file = tiff(256, 256, 16, values.astype(f"{order}u2").tobytes(), order=order)
    else:
        file = b"P5 256 256 65535\n" + values.astype(">u2").tobytes()
    expected = numpy.floor(values / 257 + 0.5)
    assert (pixels(file) == expected[..., None]).all()


def test_grey_where_white_is_zero_and_of_12_bits() -> None:
    data = struct.pack("<3H", 0, 257, 65535)
    assert pixels(tiff(3, 1, 16, data, t262=0)).tolist() == grey(255, 254, 0)
    twelve = bytes([0xFF, 0xF8, 0x00])  # 4095 and 2048
    assert pixels(tiff(2, 1, 12, twelve)).tolist() == grey(255, 128)


@pytest.mark.parametrize(
    ("bits", "colour", "row", "expected"),
    [
        (16, 2, "0102 8034 fffe", [[[1, 128, 255]]]),
        (16, 4, "8000 ffff 8000 0000", grey(128, WHITE)),
        (16, 6, "0102 8034 fffe ffff 0102 8034 fffe 0000", [[[1, 128, 255], [WHITE] * 3]]),
        (8, 4, "40 ff 40 00", grey(64, WHITE)),
        (8, 6, "010203 ff 010203 00", [[[1, 2, 3], [WHITE] * 3]]),
        (1, 0, "b0", grey(255, 0, 255, 255)),
        (2, 0, "1b", grey(0, 85, 170, 255)),
        (4, 0, "012f", grey(0, 17, 34, 255)),
    ],
    ids=str,
)
def test_png_of_every_kind(bits: int, colour: int, row: str, expected: Any) -> None:
    assert pixels(png(len(expected[0]), 1, bits, colour, b"\0" + bytes.fromhex(row))).tolist() == expected


@pytest.mark.parametrize(
    ("bits", "row", "key", "expected"),
    [
        (1, "b0", "0000", grey(255, WHITE, 255, 255)),
        (2, "1b", "0001", grey(0, WHITE, 170, 255)),
        (4, "012f", "0002", grey(0, 17, WHITE, 255)),
        (8, "00804080", "0080", grey(0, WHITE, 64, WHITE)),
        (16, "0102 0103", "0102", grey(WHITE, 1)),
    ],
    ids=str,
)
def test_transparent_grey_is_white(bits: int, row: str, key: str, expected: Any) -> None:
    """Of the pixels as they are in the file: 0x0103 is not 0x0102."""
    file = png(len(expected[0]), 1, bits, 0, b"\0" + bytes.fromhex(row), tRNS=bytes.fromhex(key))
    assert pixels(file).tolist() == expected


def test_transparent_colours_are_white() -> None:
    colours = bytes([10, 20, 30, 40, 50, 60, 70, 80, 90])
    rgb = png(3, 1, 8, 2, b"\0" + colours, tRNS=struct.pack(">3H", 40, 50, 60))
    assert pixels(rgb).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    for alphas, expected in (
        ([255, 0, 255], [[10, 20, 30], [255, 255, 255], [70, 80, 90]]),
        ([255, 102], [[10, 20, 30], [169, 173, 177], [70, 80, 90]]),  # 40% of the colour, 60% of white
    ):
        palette = png(3, 1, 8, 3, b"\0\0\1\2", PLTE=colours, tRNS=bytes(alphas))
        assert pixels(palette).tolist() == [expected]


def test_transparent_gif_is_white(picture: Any) -> None:
    palette = picture.quantize(16, dither=Image.Dither.NONE)
    hidden = numpy.asarray(palette) == 3
    expected = numpy.where(hidden[..., None], WHITE, numpy.asarray(palette.convert("RGB")))
    assert hidden.any()
    assert (pixels(encoded(palette, "GIF", transparency=3)) == expected).all()


def test_transparent_colour_of_16_bits_is_refused() -> None:
    """Pillow keeps the upper bytes, which do not tell 0x0102 from 0x0103."""
    file = png(2, 1, 16, 2, b"\0" + bytes.fromhex("010200000000 010300000000"), tRNS=bytes.fromhex("010200000000"))
    with pytest.raises(ImageError, match="one of its 16-bit colours is transparent"):
        pixels(file)


@pytest.mark.parametrize(
    ("mode", "format"),
    [("1", "TIFF"), ("L", "TIFF"), ("P", "TIFF"), ("CMYK", "TIFF"), ("L", "JPEG"), ("CMYK", "JPEG"), ("YCbCr", "JPEG")],
)
def test_pictures_of_other_modes(picture: Any, mode: str, format: str) -> None:
    stored = picture.quantize(256) if mode == "P" else picture.convert(mode)
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    expected = numpy.asarray(stored.convert("RGB")).astype(int)
    differs = abs(pixels(encoded(stored, format, **options)).astype(int) - expected)
    assert differs.max() <= (0 if format == "TIFF" else 40)
    assert differs.mean() <= 2


def test_cmyk_jpeg_has_the_colours_of_the_original(picture: Any) -> None:
    """Adobe's files hold inverted inks; taken as they are, the picture would be its negative."""
    file = encoded(picture.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in file
    assert abs(pixels(file).astype(int) - numpy.asarray(picture)).mean() <= 3


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_without_a_range_are_refused(mode: str) -> None:
    image = Image.new(mode, (3, 2), 1)
    with pytest.raises(ImageError, match=f"values of mode '{mode}' cannot be mapped to 8 bits"):
        pixels(encoded(image, "TIFF"))
    with pytest.raises(ImageError, match="range is not known"):
        PREPROCESSINGS["raw"](image, 224)


def test_colours_that_cannot_be_converted_are_refused() -> None:
    with pytest.raises(ImageError, match="colours cannot be converted: conversion from La"):
        to_rgb(Image.new("La", (3, 2)))


@pytest.mark.parametrize("mode", ["PA", "RGBa", "LA", "RGBA"])
def test_transparency_of_images_in_memory(mode: str) -> None:
    image = Image.new("PA" if mode == "PA" else "RGBA", (2, 1))
    if mode == "PA":
        image.putpalette([10, 20, 30])
    opaque = (0,) if mode == "PA" else (10, 20, 30)
    image.putpixel((0, 0), (*opaque, 255))
    image.putpixel((1, 0), (*opaque, 0))
    expected = [18] * 3 if mode == "LA" else [10, 20, 30]
    assert numpy.asarray(to_rgb(image.convert(mode))).tolist() == [[expected, [WHITE] * 3]]


@pytest.mark.parametrize("file", ["grey of 12 bits", "white is zero", "16 bits", "palette"])
def test_images_that_are_loaded_already(file: str) -> None:
    content = {
        "grey of 12 bits": tiff(2, 1, 12, bytes([0xFF, 0xF8, 0x00])),
        "white is zero": tiff(3, 1, 16, struct.pack("<3H", 0, 257, 65535), t262=0),
        "16 bits": png(2, 1, 16, 0, b"\0" + bytes.fromhex("0102 0103"), tRNS=bytes.fromhex("0102")),
        "palette": png(2, 1, 8, 3, b"\0\0\1", PLTE=bytes(range(6)), tRNS=b"\x80"),
    }[file]
    image = Image.open(io.BytesIO(content))
    image.load()
    assert (numpy.asarray(to_rgb(image)) == pixels(content)).all()


# -- upright, and one of several --------------------------------------------------------------------------------------

STORED = {  # by EXIF's orientation, how a camera stores what it should look like
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: numpy.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: numpy.rot90(a, -1),
}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation(picture: Any, format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    stored = Image.fromarray(numpy.ascontiguousarray(STORED[orientation](numpy.asarray(picture))))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    file = encoded(stored, format, exif=exif, **options)
    assert abs(pixels(file).astype(int) - numpy.asarray(picture)).max() <= (8 if format == "JPEG" else 0)
    once = to_rgb(Image.open(io.BytesIO(file)))
    assert to_rgb(once).tobytes() == once.tobytes()  # it is not turned twice


def test_orientation_of_16_bits() -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    stored = Image.fromarray(numpy.array([[1, 2], [3, 4], [5, 6]], numpy.uint16) * 257)
    assert pixels(encoded(stored, "PNG", exif=exif))[..., 0].tolist() == [[5, 3, 1], [6, 4, 2]]


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0junk" * 9], ids=str)
def test_broken_exif_does_no_harm(picture: Any, exif: bytes) -> None:
    assert (pixels(encoded(picture, "PNG", exif=exif)) == numpy.asarray(picture)).all()


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_of_several_pictures(picture: Any, format: str) -> None:
    options = {"WEBP": {"lossless": True}}.get(format, {})
    others = [picture.rotate(180), picture.rotate(90)]
    file = encoded(picture, format, save_all=True, append_images=others, **options)
    with Image.open(io.BytesIO(file)) as several:
        assert several.n_frames == 3
    expected = picture.quantize(256).convert("RGB") if format == "GIF" else picture
    assert abs(pixels(file).astype(int) - numpy.asarray(expected)).mean() <= (6 if format == "GIF" else 0)


@pytest.mark.parametrize("format", ["AVIF", "JPEG2000", "MPO"])
def test_orientation_in_other_formats(picture: Any, format: str) -> None:
    if format == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow does not write AVIF")
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    found = pixels(encoded(picture, format, exif=exif))
    assert found.shape == ((32, 48, 3) if format == "JPEG2000" else (48, 32, 3))  # Pillow writes none to JPEG 2000


def test_what_the_first_frame_of_a_gif_leaves_free_is_white() -> None:
    """Two pixels of 3 x 2, red, which is the palette's first colour."""
    palette = bytes([255, 0, 0, 0, 0, 255])
    frame = b"," + struct.pack("<4HB", 1, 1, 2, 1, 0) + b"\2\2\x04\x0a\0;"
    file = b"GIF89a" + struct.pack("<2H", 3, 2) + b"\x80\0\0" + palette + frame
    found = pixels(file)
    hidden = file.replace(b",", b"!\xf9\4\1\0\0\xc8\0,", 1)  # colour 200, of two, is transparent
    assert (pixels(hidden) == found).all()
    assert (found[0] == WHITE).all()
    assert (found[1, 0] == WHITE).all()
    assert found[1, 1].tolist() == found[1, 2].tolist() == [255, 0, 0]


@pytest.mark.parametrize("load", [False, True])
def test_later_frames(load: bool) -> None:
    """Of which a part is stored: the rest is that of the frame before."""
    frames = [Image.new("P", (40, 40)) for _ in range(3)]
    for i, frame in enumerate(frames):
        frame.putpalette([255, 0, 0, 0, 255, 0])
        frame.paste(1, (5, 5, 10 + i, 10))
    opened = Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], optimize=False)))
    opened.seek(2)
    if load:
        opened.load()
    assert (numpy.asarray(to_rgb(opened)) == numpy.asarray(frames[2].convert("RGB"))).all()


def test_image_is_left_as_it_was(picture: Any) -> None:
    file = png(4, 1, 2, 0, b"\0\x1b", tRNS=b"\0\1")
    image = Image.open(io.BytesIO(file))
    to_rgb(image)
    assert (image.mode, image.info["transparency"]) == ("L", 1)
    assert to_rgb(picture) is not picture


# -- bad files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What scripts set to get past errors."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
def test_no_truncated_picture_is_half_grey(picture: Any, format: str) -> None:
    whole = encoded(picture.resize((12, 8)), format)
    expected = pixels(whole)
    for length in range(len(whole)):
        try:
            found = pixels(whole[:length])
        except ImageError:
            continue
        assert (found == expected).all()
    with pytest.raises(ImageError, match="image: "):
        pixels(whole[: len(whole) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.usefixtures("lenient")
def test_truncated_images_that_were_opened_elsewhere_are_refused(picture: Any) -> None:
    whole = encoded(picture, "JPEG")
    with pytest.raises(ImageError, match="cannot be read: image file is truncated"):
        PREPROCESSINGS["raw"](Image.open(io.BytesIO(whole[:-200])), 64)
    closed = Image.open(io.BytesIO(whole))
    closed.close()
    with pytest.raises(ImageError, match="cannot be read"):
        to_rgb(closed)


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"quality": 95}, {"optimize": True}], ids=str)
def test_jpeg_whose_data_end_early_is_refused(options: dict[str, int]) -> None:
    """Though its end is marked: libjpeg would fill the rest with grey."""
    image = read_image(PHOTOGRAPH).resize((120, 120))
    whole = encoded(image, "JPEG", **options)
    several = encoded(image, "MPO", save_all=True, append_images=[image], **options)
    assert (pixels(several) == pixels(whole)).all()
    between = several.find(b"\xff\xd9\xff\xd8")
    assert between > 0
    for file, last in ((whole, len(whole)), (several, between)):
        start = file.find(b"\xff\xda") + 20
        for end in range(start, last - 100, 97):
            for after in (b"", whole, b"more\xff\xd9"):
                with pytest.raises(ImageError, match="the image is truncated: its data end before it does"):
                    pixels(file[:end] + b"\xff\xd9" + after)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}], ids=str)
@pytest.mark.parametrize("size", [(64, 64), (17, 9), (1, 1)])
def test_whole_jpeg_of_one_colour_is_read(options: dict[str, int], size: tuple[int, int]) -> None:
    file = encoded(Image.new("RGB", size, (200, 200, 200)), "JPEG", **options)
    assert (pixels(file) == 200).all()
    assert (pixels(file + b"something else") == 200).all()


@pytest.mark.usefixtures("lenient")
def test_switch_is_off_until_the_last_thread_has_read(picture: Any) -> None:
    started, finish = threading.Event(), threading.Event()

    class Slow(io.BytesIO):
        def read(self, *size: int | None) -> bytes:
            started.set()
            assert finish.wait(30)
            return super().read(*size)

    whole = encoded(picture, "JPEG")
    other = threading.Thread(target=read_image, args=[Slow(whole)])
    other.start()
    assert started.wait(30)
    assert pixels(whole).shape == (32, 48, 3)
    still_off = not ImageFile.LOAD_TRUNCATED_IMAGES
    finish.set()
    other.join()
    assert still_off
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("colours", [0, 2])
def test_damaged_end_of_a_png_is_refused(picture: Any, colours: int) -> None:
    """All pixels are there before the checksums are."""
    whole = bytearray(encoded(picture if colours else picture.convert("L"), "PNG"))
    whole[-14] ^= 1
    with pytest.raises(ImageError, match="cannot be read"):
        pixels(bytes(whole))


def interlaced(file: bytes) -> bytes:
    """A PNG file whose header says so."""
    return file[:28] + b"\1" + struct.pack(">I", zlib.crc32(file[12:28] + b"\1")) + file[33:]


@pytest.mark.parametrize("change", [lambda file: file, interlaced], ids=["", "interlaced"])
def test_png_with_too_few_rows_is_refused(change: Any) -> None:
    """Its compressed data are complete, and its checksums right."""
    with pytest.raises(ImageError, match="fewer rows than its header says"):
        pixels(change(png(6, 4, 8, 0, (b"\0" + bytes(6)) * 2)))


def test_interlaced_png() -> None:
    """Of 2 x 3 pixels, which are in the first and the last three of the seven passes."""
    file = interlaced(png(2, 3, 8, 0, b"\0\1" + b"\0\5" + b"\0\2\0\6" + b"\0\3\4"))
    assert pixels(file)[..., 0].tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("palette", [None, bytes(9)])
def test_colours_that_are_not_in_the_palette_are_refused(palette: bytes | None) -> None:
    file = png(6, 1, 8, 3, b"\0" + bytes(range(6)), **({"PLTE": palette} if palette else {}))
    with pytest.raises(ImageError, match="cannot be read"):
        pixels(file)


GREY = bytes(range(64))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (tiff(8, 8, 8, GREY[:32], t278=4), "less data than its header says"),
        (tiff(8, 8, 8, GREY[:32], GREY[:31], t278=4), "less data than its header says"),
        (tiff(2, 2, (16,) * 3, *[GREY[:8]] * 3, t284=2, t262=2), "16-bit planes without compression"),
        (tiff(4, 4, (8,) * 3, GREY, t262=6), "subsampled YCbCr without compression"),
        (tiff(8, 8, 8, GREY, t339=2), "signed values"),
        (tiff(8, 8, 8, GREY, t322=26_000, t323=25_600, t324=8, t325=64, t273=0, t279=0), "tiles are too large"),
    ],
    ids=range(6),
)
def test_tiff_that_pillow_would_read_as_something_else(file: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        pixels(file)


def test_tiff_in_parts() -> None:
    expected = numpy.arange(64).reshape(8, 8, 1).repeat(3, 2)
    assert (pixels(tiff(8, 8, 8, GREY, t279=0)) == expected).all()  # as some write it, and libtiff reads
    assert (pixels(tiff(8, 8, 8, bytes(64), GREY)) == expected).all()  # the last of two strips of the whole
    colours = tiff(4, 4, (8,) * 4, GREY[:48], t262=2, t277=3)  # bits of a channel that is not there
    assert (pixels(colours) == numpy.arange(48).reshape(4, 4, 3)).all()
    assert (pixels(tiff(8, 8, 8, *(GREY[i : i + 24] for i in range(0, 64, 24)), t278=3)) == expected).all()
    planes = tiff(8, 8, (8,) * 3, *[GREY] * 3, t284=2, t262=2)
    assert (pixels(planes) == expected).all()


@pytest.mark.parametrize("width", [65_536, 15_466_507])
def test_long_pictures_are_not_decoded(width: int) -> None:
    """Of few pixels, but Pillow takes minutes for a long row."""
    with pytest.raises(ImageError, match=f"the image is too large: {width:,} x 9 pixels"):
        pixels(f"P6 {width} 9 255\n".encode())


def test_images_without_pixels_are_refused() -> None:
    with pytest.raises(ImageError, match="it has no pixels"):
        PREPROCESSINGS["raw"](Image.new("RGB", (0, 5)), 224)


def test_names_that_are_too_long_or_no_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="File name too long"):
        read_image("a" * 300 + ".jpg")
    with pytest.raises(MemoryError):  # which says nothing of the file
        read_image(Full())


class Full(io.BytesIO):
    def read(self, *size: int | None) -> bytes:
        raise MemoryError


@pytest.mark.parametrize("limit", [None, 1000, 2**40])
@pytest.mark.parametrize("format", ["png", "gif", "bmp", "ppm", "tiff"])
def test_huge_pictures_are_not_decoded(monkeypatch: pytest.MonkeyPatch, limit: int | None, format: str) -> None:
    """60,000 x 60,000 pixels, whatever limit a script has set: 10.8 GB."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    side = 60_000
    file = {
        "png": png(side, side, 8, 2, b""),
        "gif": b"GIF89a\1\0\1\0\x80\0\0" + bytes(6) + b"," + struct.pack("<4HB", 0, 0, side, side, 0) + b"\2\0;",
        "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0),
        "ppm": b"P6 60000 60000 255\n",
        "tiff": tiff(side, side, 8, b""),
    }[format]
    with pytest.raises(ImageError, match=r"image: the image is too large: .*pixels"):
        pixels(file)


def test_compressed_text_of_100_megabytes_is_refused() -> None:
    text = b"Comment\0\0" + zlib.compress(bytes(100 * 2**20))
    with pytest.raises(ImageError, match=r"(?i)cannot be read: decompressed data too large"):
        pixels(png(1, 1, 8, 0, b"\0\0", zTXt=text))


def test_postscript_is_not_run() -> None:
    with pytest.raises(ImageError, match="not an image, or not of a kind that Pillow reads: AVIF, BMP"):
        pixels(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n%%EndComments\nshowpage\n")


def test_files_are_named(tmp_path: Path) -> None:
    for name, content in (("empty.png", b""), ("text.jpg", b"no picture"), ("cut.jpg", PHOTOGRAPH.read_bytes()[:5000])):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ImageError, match=f"{name}: "):
            read_image(path)
        with path.open("rb") as file, pytest.raises(ImageError, match=f"{name}: "):
            read_image(file)
    for path in (tmp_path, tmp_path / "absent.png"):
        with pytest.raises(ImageError, match=f"{path}: not a file"):
            read_image(str(path))


# -- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREPROCESSINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_dtype_and_device_do_not_matter(picture: Any, name: str, dtype: torch.dtype, device: str) -> None:
    prepare, some = PREPROCESSINGS[name], photographs(5)
    expected = prepare(picture, 67), prepare.normalized(some)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            found = prepare(picture, 67), prepare.normalized(some), prepare.normalized(some.to(torch.float64))
            assert photographs(5).equal(some)
    finally:
        torch.set_default_dtype(before)
    for ours, wanted in zip(found, (*expected, expected[1]), strict=True):
        assert (ours.dtype, ours.device.type) == (torch.float32, "cpu")
        assert ours.equal(wanted)


def test_other_orders_of_colours_are_refused() -> None:
    with pytest.raises(ValueError, match="colours must be 'RGB' or 'BGR', not 'rgb'"):
        Preprocessing("mine", "rgb", 1.0, (0.0, 0.0, 0.0))


def test_preprocessing_takes_images_as_they_were_opened(picture: Any) -> None:
    """Of 16 bits, and on its side."""
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    eight = numpy.asarray(picture.convert("L"))
    sixteen = Image.fromarray(numpy.rot90(eight).astype(numpy.uint16) * 257)
    opened = Image.open(io.BytesIO(encoded(sixteen, "PNG", exif=exif)))
    assert PREPROCESSINGS["caffe"](opened, 67).equal(PREPROCESSINGS["caffe"](Image.fromarray(eight), 67))


def test_files_that_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also sparse ones, of which a folder may have many."""
    file = tmp_path / "large.png"
    file.write_bytes(encoded(Image.new("RGB", (3, 2)), "PNG"))
    os.truncate(file, 2**43)
    with pytest.raises(ImageError, match=r"large\.png: the file is too large: 8,796,093,022,208 bytes"):
        read_image(file)
    monkeypatch.setattr(images, "MAX_BYTES", 20)
    with pytest.raises(ImageError, match="the file is too large"):
        pixels(encoded(Image.new("RGB", (3, 2)), "PNG"))


def test_outages_are_no_fault_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(encoded(Image.new("RGB", (3, 2)), "PNG"))

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        read_image(file)
