"""Parquet files and hubs, read through the package ``datasets``."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dataset import HELD_OUT, SPLIT_NAMES, Dataset, Encoded, held_out
from ..images import ImageError

if TYPE_CHECKING:
    from ..images import Pixels

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")
LABELS = ("label", "labels", "cls", "class")


class Rows(Encoded):
    """Pictures in a table of ``datasets``."""

    def __init__(self, table: Table, split: str, rule: str, classes: Sequence[str], rows: Tensor) -> None:
        """
        Args:
            rows: the rows of the table that the split has.
        """
        super().__init__(table.source, split, rule, classes, table.numbers(classes)[rows])
        self.images, self.rows = table.images, rows.tolist()

    def file(self, index: int) -> BytesIO | str:
        row = self.images.data.column(0)[self.rows[index]]  # Arrow's, because a dictionary takes ten times as long
        if (file := row["bytes"]).is_valid:
            return BytesIO(file.as_buffer())
        if (path := row["path"]).is_valid:
            return str(path.as_py())
        raise ImageError("there is no picture")

    def stored(self, index: int) -> int:
        file = self.images.data.column(0)[self.rows[index]]["bytes"]
        return file.as_buffer().size if file.is_valid else 0

    def pixels(self, index: int) -> Pixels:
        try:
            return super().pixels(index)
        except ImageError as error:
            raise ImageError(f"{self.name(index)}: {error}") from None

    def name(self, index: int) -> str:
        return f"row {self.rows[index]} of {self.split}"


class Table:
    """A table of ``datasets``: which columns hold the pictures and their labels."""

    def __init__(self, source: str, table: Any) -> None:
        """
        Raises:
            ValueError: it has no column of pictures, or none of labels.
        """
        datasets = _package()
        self.source, features = source, table.features
        image = _column(features, datasets.Image, IMAGES)
        label = _column(features, datasets.ClassLabel, LABELS)
        if image is None or label is None:
            wanted = "pictures" if image is None else "labels"
            raise ValueError(f"{source}: none of its columns {', '.join(features)} holds {wanted}")
        try:
            self.images = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        except Exception as error:
            raise ValueError(f"{source}: the column {image!r} does not hold pictures: {error}") from error
        self.labels: list[Any] = table[label][:]
        self.names: list[str] = list(getattr(features[label], "names", None) or ())
        if any(type(value) is not (type(self.labels[0])) for value in self.labels) or not isinstance(
            self.labels[0], (int, str)
        ):
            raise ValueError(f"{source}: the column {label!r} does not hold a label in each row")

    def classes(self) -> list[str]:
        """As the file names them; otherwise its labels, sorted if they are words."""
        if self.names:
            return self.names
        if isinstance(self.labels[0], str):
            return sorted(set(self.labels))
        if max(self.labels) >= len(self.labels):
            raise ValueError(f"{self.source}: has the label {max(self.labels)}, but only {len(self.labels)} pictures")
        return [str(label) for label in range(1 + max(self.labels))]

    def numbers(self, classes: Sequence[str]) -> Tensor:
        """The labels.

        Raises:
            ValueError: one is a word that is no class.
        """
        if not isinstance(self.labels[0], str):
            return torch.tensor(self.labels)
        index = {name: number for number, name in enumerate(classes)}
        if unknown := sorted(set(self.labels) - set(index)):
            raise ValueError(f"{self.source}: labels that are no class of training: {', '.join(unknown[:5])}")
        return torch.tensor([index[label] for label in self.labels])


def is_here(folder: Path) -> bool:
    """Whether a folder, or its folder ``data``, has parquet files."""
    return bool(_files(folder))


def splits(path: Path) -> dict[str, Dataset]:
    """The splits of a parquet file, or of a folder of them, by the beginnings of the files' names."""
    if path.is_file():
        return _splits(str(path), {"train": [path]})
    files = _files(path)
    by_split: dict[str, list[Path]] = {}
    for file in files:
        name = re.split(r"[-_.]", file.stem)[0]
        by_split.setdefault(name, []).append(file)
    if not any(name in by_split for names in SPLIT_NAMES.values() for name in names):
        by_split = {"train": files}
    return _splits(str(path), by_split)


def splits_of_hub(name: str) -> dict[str, Dataset]:
    """The splits of a data set of a hub."""
    load = _package().load_dataset
    try:
        found = load(name)
    except Exception as error:
        raise FileNotFoundError(f"{name}: no such folder, and datasets does not load it: {error}") from error
    return _from_datasets(name, found)


def read_rows(files: Sequence[Path]) -> Any:
    """All rows of parquet files."""
    load = _package().load_dataset
    try:
        return load("parquet", data_files=[glob.escape(str(file)) for file in files], split="train")
    except Exception as error:
        raise ValueError(f"{files[0]}: cannot be read: {error.__cause__ or error}") from error


def _package() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError("the package datasets is not installed: pip install fastcnn[data]") from None
    return datasets


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))


def _splits(source: str, files: dict[str, list[Path]]) -> dict[str, Dataset]:
    return _from_datasets(source, {name: read_rows(paths) for name, paths in files.items()})


def _from_datasets(source: str, found: dict[str, Any]) -> dict[str, Dataset]:
    """The splits, with the training split's classes; by a hash of the rows' numbers if there is only one for
    training."""
    chosen = {split: next((name for name in names if name in found), None) for split, names in SPLIT_NAMES.items()}
    here = {split: name for split, name in chosen.items() if name is not None}
    if not here:
        raise ValueError(f"{source}: has the splits {', '.join(found)}, none of which is for training or validation")
    tables = {split: Table(source, found[name]) for split, name in here.items()}
    if len(tables) == 2 and set(tables["validation"].labels) == {-1}:  # they are kept secret
        del tables["validation"]
    classes = next(iter(tables.values())).classes()
    if list(tables) != ["train"]:
        return {
            split: Rows(table, split, f"the split {here[split]}", classes, torch.arange(len(table.labels)))
            for split, table in tables.items()
        }
    table = tables["train"]
    out = held_out([str(row) for row in range(len(table.labels))])
    parts = {"train": (f"all but a {HELD_OUT}", ~out), "validation": (f"a {HELD_OUT}", out)}
    return {
        split: Rows(table, split, rule, classes, part.nonzero()[:, 0])
        for split, (rule, part) in parts.items()
        if part.any()
    }


def _column(features: dict[str, Any], kind: type, names: Sequence[str]) -> str | None:
    """The first column of a kind, or else the one with one of the usual names."""
    typed = (name for name, feature in features.items() if isinstance(feature, kind))
    return next(typed, next((name for name in names if name in features), None))
