"""What ``fastcnn pack`` writes: a folder with ``packed.json``, and arrays or parquet files of pictures of one size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..colours import Statistics
from ..dataset import Arrays, Dataset
from .parquet import Rows, Table, read_rows

MANIFEST = "packed.json"
VERSION = 1


class Mapped(Arrays):
    """Pictures in memory-mapped files, of which other processes get the names."""

    def __init__(
        self,
        source: str,
        split: str,
        rule: str,
        classes: Sequence[str],
        labels: Tensor,
        files: Sequence[Path],
        size: int,
    ) -> None:
        self.files = files
        super().__init__(source, split, rule, classes, labels, _map(files))
        for file, array in zip(files, self.arrays, strict=True):
            if array.dtype != torch.uint8 or array.shape[1:] != (size, size, 3):
                raise ValueError(
                    f"{file}: has {array.dtype} of shape {tuple(array.shape)}, not pictures of {size}x{size}"
                )

    def fingerprint(self) -> str:
        sizes = [file.stat().st_size for file in self.files]
        return sha256(f"{Dataset.fingerprint(self)} {sizes}".encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "arrays": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, arrays=_map(state["files"]))


def is_here(folder: Path) -> bool:
    """Whether a folder is a packed set."""
    return (folder / MANIFEST).is_file()


def splits(folder: Path) -> dict[str, Dataset]:
    """The splits of a packed set, whose files must have the sizes that they were written with."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["version"] != VERSION:
            raise ValueError(f"it was packed as version {manifest['version']}, and this is version {VERSION}")
        statistics = manifest["statistics"] and Statistics.from_json(manifest["statistics"])
        parts = {
            split: (part["rule"], {folder / name: size for name, size in part["files"].items()})
            for split, part in manifest["splits"].items()
        }
        classes, format, size = manifest["classes"], manifest["job"]["format"], manifest["job"]["size"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST}: is not that of a packed set: {error}") from error
    found: dict[str, Dataset] = {}
    for split, (rule, files) in parts.items():
        for file, written in files.items():
            if (now := file.stat().st_size if file.is_file() else None) != written:
                is_now = "is missing" if now is None else f"has {now:,} bytes"
                raise ValueError(f"{file}: {is_now}, and had {written:,} when it was packed")
        if format == "npy":
            *pictures, labels = files
            numbers = _map([labels])[0]
            found[split] = Mapped(str(folder), split, rule, classes, numbers, pictures, size)
        else:
            table = Table(str(folder), read_rows(list(files)))
            found[split] = Rows(table, split, rule, classes, torch.arange(len(table.labels)))
            found[split].shape = (size, size)
        found[split].statistics = statistics
    return found


def _map(files: Sequence[Path]) -> list[Tensor]:
    import numpy

    try:  # copy on write, because torch warns of arrays that are read-only
        return [torch.from_numpy(numpy.load(file, mmap_mode="c")) for file in files]
    except ValueError as error:
        raise ValueError(f"{files[0].parent}: has files that numpy cannot read: {error}") from error
