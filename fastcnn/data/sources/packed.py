"""What ``fastcnn pack`` writes: a folder with ``packed.json``, and arrays or parquet files of pictures of one size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..colours import Statistics
from ..dataset import Arrays, Dataset
from .parquet import Rows, Table, read_column

MANIFEST = "packed.json"
VERSION = 1


class Mapped(Arrays):
    """Pictures in memory-mapped files, of which other processes get the names."""

    def __init__(
        self, source: str, split: str, rule: str, classes: Sequence[str], labels: Tensor, files: Sequence[Path]
    ) -> None:
        self.files = files
        super().__init__(source, split, rule, classes, labels, _map(files))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "arrays": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, arrays=_map(state["files"]))


def is_here(folder: Path) -> bool:
    """Whether a folder is a packed set."""
    return (folder / MANIFEST).is_file()


def splits(folder: Path) -> dict[str, Dataset]:
    """The splits of a packed set, whose files must have the sizes that they were written with."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest.get("version") != VERSION:
        raise ValueError(f"{folder}: was packed as version {manifest.get('version')}, and this is version {VERSION}")
    found: dict[str, Dataset] = {}
    for split, part in manifest["splits"].items():
        files = []
        for name, written in part["files"].items():
            files.append(folder / name)
            size = files[-1].stat().st_size if files[-1].is_file() else None
            if size != written:
                is_now = "is missing" if size is None else f"has {size:,} bytes"
                raise ValueError(f"{files[-1]}: {is_now}, and had {written:,} when it was packed")
        found[split] = _split(folder, split, part, manifest, files)
        if manifest["statistics"]:
            sums = manifest["statistics"]
            found[split].statistics = Statistics(sums["pixels"], tuple(sums["sums"]), tuple(sums["products"]))
    return found


def _split(folder: Path, split: str, part: dict[str, Any], manifest: dict[str, Any], files: list[Path]) -> Dataset:
    source, rule, classes, size = str(folder), part["rule"], manifest["classes"], manifest["job"]["size"]
    if manifest["job"]["format"] == "npy":
        import numpy

        *pictures, labels = files
        return Mapped(source, split, rule, classes, torch.from_numpy(numpy.load(labels)), pictures)
    table = Table(source, read_column(files))
    rows = Rows(table, split, rule, classes, torch.arange(len(table.labels)))
    rows.shape = (size, size)
    return rows


def _map(files: Sequence[Path]) -> list[Tensor]:
    import numpy

    return [
        torch.from_numpy(numpy.load(file, mmap_mode="c")) for file in files
    ]  # "c": torch warns of what is read-only
