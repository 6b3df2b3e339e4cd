"""Data sets by name or place, each kind in a file of its name."""

from __future__ import annotations

import re
from pathlib import Path

from ..dataset import SPLITS, Dataset
from . import digits, folder, idx, packed, parquet, stl10

KINDS = (
    "digits, fashion-mnist, a folder (of idx or STL-10's files, of a directory of pictures per class, of parquet "
    "files, or made by fastcnn pack), a parquet file, or a data set of a hub (owner/name)"
)
_FOLDERS = (packed, idx, stl10, parquet, folder)  # in this order: the last one takes any folder of folders


def open_splits(data: str) -> dict[str, Dataset]:
    """The splits of a data set, "train" or "validation" or both.

    Args:
        data: "digits" (scikit-learn's), "fashion-mnist" (where Debian installs it), a path, or the name of a data set
            on a hub, which the package ``datasets`` finds. A path is to a parquet file or to a folder: made by
            ``fastcnn pack``; of idx files (MNIST's kind); of STL-10's binary files; of parquet files; of a directory of
            pictures per class, or of ``train`` and ``validation`` (``val``, ``test``) with such directories.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, of no kind that is known, or what :class:`Dataset` refuses.
        ImportError: a package that reads it is not installed (all of them come with ``fastcnn[data]``).
    """
    if data == "digits":
        return digits.splits()
    if data == "fashion-mnist":
        return idx.splits(idx.FASHION_MNIST)
    if not data:
        raise ValueError(f"open_splits(): data is empty. Known are {KINDS}")
    path = Path(data).absolute()  # also when the folder one is in has become another
    if path.is_dir():
        kind = next((kind for kind in _FOLDERS if kind.is_here(path)), None)
        if kind is None:
            raise ValueError(f"{path}: holds no data set. Known are {KINDS}")
        return kind.splits(path)
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path}: not a data set. Known are {KINDS}")
        return parquet.splits(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not path.parent.exists():
        return parquet.splits_of_hub(data)
    raise FileNotFoundError(f"{data}: there is no such file or folder. Known are {KINDS}")


def open_dataset(data: str, split: str = "train") -> Dataset:
    """One split of a data set, of which :func:`open_splits` says what ``data`` may be.

    Raises:
        ValueError: ``split`` is not one of "train" and "validation", or the data set does not have it; and as
            :func:`open_splits`, whose other exceptions it raises too.
    """
    if split not in SPLITS:
        raise ValueError(f"open_dataset(): split must be one of {', '.join(SPLITS)}, not {split!r}")
    found = open_splits(data)
    if split not in found:
        raise ValueError(f"{data}: has no split {split!r}, only {', '.join(found)}")
    return found[split]
