"""STL-10's binary files: 96x96 pictures of ten classes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..dataset import Arrays, Dataset

SIDE = 96
FILES = {"train": "train", "validation": "test"}
CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def is_here(folder: Path) -> bool:
    """Whether a folder, or its ``stl10_binary``, has the images of a split."""
    return any((_inner(folder) / f"{name}_X.bin").is_file() for name in FILES.values())


def splits(folder: Path) -> dict[str, Dataset]:
    """The splits in a folder: ``train_*.bin``, and ``test_*.bin`` for validation; pictures without labels are not
    used."""
    inner = _inner(folder)
    names = inner / "class_names.txt"
    classes = names.read_text(errors="backslashreplace").split() if names.is_file() else CLASSES
    found: dict[str, Dataset] = {}
    for split, name in FILES.items():
        images, labels = inner / f"{name}_X.bin", inner / f"{name}_y.bin"
        if not images.is_file():
            continue
        if not labels.is_file():
            raise FileNotFoundError(f"{images} is there, but {labels.name} is not")
        planes = _bytes(images, 3 * SIDE * SIDE).reshape(-1, 3, SIDE, SIDE)  # each column after column
        rule = f"the files {name}_X.bin and {name}_y.bin"
        numbers = _bytes(labels, 1).long() - 1
        found[split] = Arrays(str(folder), split, rule, classes, numbers, [planes.permute(0, 3, 2, 1)])
    return found


def _inner(folder: Path) -> Path:
    inner = folder / "stl10_binary"
    return inner if inner.is_dir() else folder


def _bytes(file: Path, record: int) -> Tensor:
    size = file.stat().st_size
    if not size or size % record:
        raise ValueError(f"{file}: has {size:,} bytes, which is not a multiple of {record:,}")
    return torch.from_file(str(file), size=size, dtype=torch.uint8)
