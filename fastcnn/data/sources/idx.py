"""Files in the idx format, that of MNIST and Fashion-MNIST, also compressed with gzip."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ..dataset import Arrays, Dataset

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FASHION_CLASSES = "T-shirt/top,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot"
PREFIXES = {"train": ("train",), "validation": ("t10k", "test")}


def is_here(folder: Path) -> bool:
    """Whether a folder has the images of a split."""
    return any(_images(folder, split) for split in PREFIXES)


def splits(folder: Path) -> dict[str, Dataset]:
    """The splits in a folder: ``train-*`` and ``t10k-*`` (``test-*``), each of images (``idx3-ubyte``) and labels
    (``idx1-ubyte``). Classes are the labels that occur."""
    fashion = folder == FASHION_MNIST
    if fashion and not is_here(folder):
        raise FileNotFoundError(
            f"{folder}: no Fashion-MNIST. Install Debian's dataset-fashion-mnist, or give the folder of its idx files"
        )
    read: dict[str, tuple[Path, Tensor, Tensor]] = {}
    for split in PREFIXES:
        if images := _images(folder, split):
            if len(images) > 1:
                raise ValueError(f"{folder}: several files are images for {split}: {', '.join(f.name for f in images)}")
            labels = _variant(folder / images[0].name.replace("images", "labels").replace("idx3", "idx1"))
            if labels is None:
                raise FileNotFoundError(f"{images[0]} is there, but its labels, idx1-ubyte, are not")
            read[split] = images[0], _read(images[0], 3), _read(labels, 1)
    occurring = torch.cat([labels for _, _, labels in read.values()]).unique()
    classes = FASHION_CLASSES.split(",") if fashion else [str(label) for label in occurring.tolist()]
    return {
        split: Arrays(
            "fashion-mnist" if fashion else str(folder),
            split,
            f"the file {file.name} and its labels",
            classes,
            labels.long() if fashion else torch.searchsorted(occurring, labels),
            [images[..., None]],
        )
        for split, (file, images, labels) in read.items()
    }


def _images(folder: Path, split: str) -> list[Path]:
    """The files of a split's images; of the same one both plain and compressed, the plain one."""
    names = re.compile(rf"(.*[-_.])?({'|'.join(PREFIXES[split])})[-_]images[-.]idx3-ubyte(\.gz)?")
    found = sorted(file for file in folder.iterdir() if names.fullmatch(file.name) and file.is_file())
    return [file for file in found if file.suffix != ".gz" or file.with_suffix("") not in found]


def _variant(file: Path) -> Path | None:
    """The file, plain or compressed."""
    plain = file.with_suffix("") if file.suffix == ".gz" else file
    return next((f for f in (plain, plain.with_name(f"{plain.name}.gz")) if f.is_file()), None)


def _read(file: Path, dimensions: int) -> Tensor:
    """The bytes in an idx file, whose sizes must be those that its header says."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    head = 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) < head:
        raise ValueError(f"{file}: not an idx file of bytes in {dimensions} dimensions")
    sizes = [int.from_bytes(data[at : at + 4], "big") for at in range(4, head, 4)]
    if len(data) - head != math.prod(sizes):
        raise ValueError(f"{file}: has {len(data) - head:,} bytes of data, and not {math.prod(sizes):,} for {sizes}")
    if 0 in sizes:
        raise ValueError(f"{file}: is empty: {sizes}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=head).reshape(sizes)
