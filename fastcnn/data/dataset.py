"""The one type of data sets: pictures with labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from .colours import Statistics
from .images import read_pixels

if TYPE_CHECKING:
    from .images import Pixels

SPLITS = ("train", "validation")
SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "test")}  # of others
HELD_OUT = "tenth of the pictures, chosen by a hash of their names"


class Dataset(ABC):
    """One split of a data set.

    Attributes:
        source: where it is, or its name.
        split: one of SPLITS.
        rule: in words, which pictures this split has.
        classes: the names of the classes, by label.
        labels: int64 tensor, one label per picture.
        shape: height and width of every picture, in pixels; None if they differ.
        decodes: whether pictures are decoded from files when they are asked for.
        statistics: of the pixels of the training split, where they are known.
    """

    shape: tuple[int, int] | None = None
    decodes = False
    statistics: Statistics | None = None

    def __init__(self, source: str, split: str, rule: str, classes: Sequence[str], labels: Tensor) -> None:
        """Check the labels.

        Raises:
            ValueError: there are no pictures, or fewer than two classes; a label is out of range; or a class of the
                training split has no picture.
        """
        self.source, self.split, self.rule = source, split, rule
        self.classes, self.labels = tuple(classes), labels.to(torch.int64)
        where = f"{source}, {split}"
        if len(self.classes) < 2:
            raise ValueError(f"{where}: expected at least two classes, but found {list(self.classes)}")
        if not len(labels):
            raise ValueError(f"{where}: there are no pictures")
        wrong = (self.labels < 0) | (self.labels >= len(self.classes))
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise ValueError(
                f"{where}: {int(wrong.sum()):,} labels are out of range: the one of picture {index:,} is "
                f"{int(self.labels[index])}, and there are {len(self.classes)} classes"
            )
        pictures = torch.bincount(self.labels, minlength=len(self.classes))
        empty = [name for name, count in zip(self.classes, pictures.tolist(), strict=True) if not count]
        if empty and split == "train":
            raise ValueError(f"{where}: no pictures of {len(empty)} classes: {_some(empty)}")

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        """A picture: uint8 tensor of shape (height, width, 3), red, green, blue; grey ones have three equal channels.

        Raises:
            ImageError: it cannot be decoded.
        """
        return torch.from_numpy(self.pixels(index).copy())

    @abstractmethod
    def pixels(self, index: int) -> Pixels:
        """The same as an array that is not to be written to."""

    def label(self, index: int) -> int:
        """The class of a picture."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """What to call a picture in messages: its file, or its number."""
        return f"{self.split} picture {index}"

    def stored(self, index: int) -> int:
        """How many bytes a picture takes where it is stored; 0 if that says nothing."""
        return 0

    def fingerprint(self) -> str:
        """Of the names and labels of all pictures, and of the classes; of pixels where they are in memory."""
        digest = sha256(repr((self.split, self.classes)).encode(errors="surrogateescape"))
        for index in range(len(self)):
            digest.update(f"{self.name(index)}\0".encode(errors="surrogateescape"))
        digest.update(repr(self.labels.tolist()).encode())
        return digest.hexdigest()


class Encoded(Dataset):
    """Pictures in files, of any size, that are decoded when they are asked for."""

    decodes = True

    @abstractmethod
    def file(self, index: int) -> str | Path | BinaryIO:
        """The file of a picture.

        Raises:
            ImageError: there is none.
        """

    def pixels(self, index: int) -> Pixels:
        return read_pixels(self.file(index))


class Arrays(Dataset):
    """Pictures of one size in uint8 tensors of shape (n, height, width, 1 or 3), one after the other."""

    def __init__(
        self, source: str, split: str, rule: str, classes: Sequence[str], labels: Tensor, arrays: Sequence[Tensor]
    ) -> None:
        super().__init__(source, split, rule, classes, labels)
        self.arrays = list(arrays)
        self.shape = (arrays[0].shape[1], arrays[0].shape[2])
        self._places = [(array, row) for array, pictures in enumerate(arrays) for row in range(len(pictures))]
        if len(self._places) != len(labels):
            raise ValueError(f"{source}, {split}: {len(self._places):,} pictures, but {len(labels):,} labels")

    def fingerprint(self) -> str:
        digest = sha256(super().fingerprint().encode())
        for array in self.arrays:
            digest.update(repr(array.shape).encode() + array.numpy().tobytes())
        return digest.hexdigest()

    def pixels(self, index: int) -> Pixels:
        array, row = self._places[index]
        pixels: Pixels = self.arrays[array][row].expand(-1, -1, 3).numpy()
        return pixels


def held_out(names: Sequence[str]) -> Tensor:
    """Which pictures of a set without a split are its validation split: a tenth, by a hash of their names.

    So a picture stays where it is when others are added or removed.
    """
    digests = (sha256(name.encode(errors="surrogateescape")).digest() for name in names)
    return torch.tensor([int.from_bytes(digest[:4], "big") % 10 == 0 for digest in digests], dtype=torch.bool)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
