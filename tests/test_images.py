"""Pictures from files: the right pixels, by construction, or a clear error."""

from __future__ import annotations

import io
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


def tiff(width: int, height: int, bits: int, data: bytes, *, order: str = "<", photometric: int = 1) -> bytes:
    """A grey TIFF file of one strip."""
    values = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in values.items())
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(values)) + entries + bytes(4)


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
    assert pixels(tiff(3, 1, 16, data, photometric=0)).tolist() == grey(255, 254, 0)
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


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_pictures_of_other_modes(picture: Any, mode: str, format: str) -> None:
    if (mode, format) in (("P", "JPEG"), ("1", "JPEG"), ("YCbCr", "TIFF")):
        pytest.skip("not of this format")
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
    with pytest.raises(ImageError, match=f"mode '{mode}' have no definite range"):
        pixels(encoded(image, "TIFF"))
    with pytest.raises(ImageError, match="no definite range"):
        PREPROCESSINGS["raw"](image, 224)


def test_colours_that_cannot_be_converted_are_refused() -> None:
    with pytest.raises(ImageError, match="colours cannot be converted: conversion from La"):
        to_rgb(Image.new("La", (3, 2)))


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
    whole = encoded(picture, format)
    expected = pixels(whole)
    for length in [*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 3]:
        try:
            found = pixels(whole[:length])
        except ImageError:
            continue
        assert (found == expected).all()
    with pytest.raises(ImageError, match="image: "):
        pixels(whole[: len(whole) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


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
    whole[-40] ^= 1
    with pytest.raises(ImageError, match="cannot be read"):
        pixels(bytes(whole))


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
    with pytest.raises(ImageError, match=r"image: too large an image: .*pixels"):
        pixels(file)


def test_compressed_text_of_100_megabytes_is_refused() -> None:
    text = b"Comment\0\0" + zlib.compress(bytes(100 * 2**20))
    with pytest.raises(ImageError, match=r"(?i)cannot be read: decompressed data too large"):
        pixels(png(1, 1, 8, 0, b"\0\0", zTXt=text))


def test_postscript_is_not_run() -> None:
    with pytest.raises(ImageError, match="not an image of these formats: AVIF, BMP"):
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
        with pytest.raises(ImageError, match=f"{path}: there is no such file"):
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
