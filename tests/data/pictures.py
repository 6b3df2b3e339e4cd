"""Small data sets of each kind, whose pictures can be told apart."""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

Array = numpy.ndarray[Any, Any]


def picture(number: int, width: int = 20, height: int = 16) -> Array:
    """A picture of noise, always the same for a number."""
    return numpy.random.default_rng(number).integers(0, 256, (height, width, 3), numpy.uint8)


def png(pixels: Array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_folder(root: Path, counts: Mapping[str, int], first: int = 0, **size: int) -> list[Path]:
    """A directory per class with so many PNG files, numbered on from ``first``; in the order of their names."""
    files = []
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for _ in range(count):
            files.append(root / name / f"{first:04d}.png")
            files[-1].write_bytes(png(picture(first, **size)))
            first += 1
    return files


def write_idx(file: Path, values: Array) -> None:
    data = (
        struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    )
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def write_mnist(root: Path, train: int = 6, validation: int = 3, classes: int = 3, suffix: str = "") -> None:
    root.mkdir(exist_ok=True)
    for first, (prefix, count) in enumerate({"train": train, "t10k": validation}.items()):
        images = numpy.stack([picture(100 * first + number, 7, 5)[..., 0] for number in range(count)])
        write_idx(root / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(root / f"{prefix}-labels-idx1-ubyte{suffix}", numpy.arange(count, dtype=numpy.uint8) % classes)


def write_stl10(root: Path, train: int = 10, validation: int = 4) -> None:
    root.mkdir(exist_ok=True)
    for first, (name, count) in enumerate({"train": train, "test": validation}.items()):
        images = numpy.stack([picture(100 * first + number, 96, 96) for number in range(count)])
        (root / f"{name}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
        (root / f"{name}_y.bin").write_bytes(bytes(1 + number % 10 for number in range(count)))


def write_parquet(
    file: Path,
    images: Sequence[Any],
    labels: Sequence[Any],
    names: Sequence[str] = (),
    columns: Any = ("image", "label"),
) -> None:
    """With the features of ``datasets`` if there are names of classes, or else without."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    content = {columns[0]: images, columns[1]: labels}
    if names:
        features = datasets.Features({columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(names=list(names))})
        table = pyarrow.Table.from_pydict(content, schema=features.arrow_schema)
    else:
        table = pyarrow.Table.from_pydict(content)
    pyarrow.parquet.write_table(table, file)
