"""Files in the idx format, that of MNIST and Fashion-MNIST, also compressed with gzip."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ..dataset import Arrays, Dataset

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FASHION_CLASSES = "T-shirt/top,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot"
PREFIXES = {"train": "train", "validation": "t10k"}


def is_here(folder: Path) -> bool:
    """Whether a folder has the images of a split."""
    return any(_file(folder, f"{prefix}-images-idx3-ubyte") for prefix in PREFIXES.values())


def splits(folder: Path) -> dict[str, Dataset]:
    """The splits in a folder: ``train-*`` and ``t10k-*``, each of images (``idx3-ubyte``) and labels
    (``idx1-ubyte``)."""
    fashion = folder == FASHION_MNIST
    if fashion and not is_here(folder):
        raise FileNotFoundError(
            f"{folder}: no Fashion-MNIST. Install Debian's dataset-fashion-mnist, or give the folder of its idx files"
        )
    read = {}
    for split, prefix in PREFIXES.items():
        images, labels = (_file(folder, f"{prefix}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        if images is not None:
            if labels is None:
                raise FileNotFoundError(f"{images} is there, but {prefix}-labels-idx1-ubyte is not")
            read[split] = _read(images, 3), _read(labels, 1).long()
    count = 1 + max(int(labels.max()) if len(labels) else 0 for _, labels in read.values())
    classes = FASHION_CLASSES.split(",") if fashion else [str(label) for label in range(count)]
    name = "fashion-mnist" if fashion else str(folder)
    return {
        split: Arrays(name, split, f"the files {PREFIXES[split]}-*", classes, labels, [images[..., None]])
        for split, (images, labels) in read.items()
    }


def _file(folder: Path, name: str) -> Path | None:
    candidates = (
        folder / (variant + suffix) for variant in (name, name.replace("-idx", ".idx")) for suffix in ("", ".gz")
    )
    return next((file for file in candidates if file.is_file()), None)


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
