"""Picture files in a directory per class."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..dataset import HELD_OUT, SPLIT_NAMES, Dataset, Encoded, held_out

SUFFIXES = frozenset(
    [".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"]
)
log = logging.getLogger(__name__)


class Files(Encoded):
    """Pictures in a folder."""

    def __init__(
        self, root: Path, split: str, rule: str, classes: Sequence[str], files: Sequence[tuple[str, int]]
    ) -> None:
        """
        Args:
            root: the folder of the data set.
            files: path below ``root`` and label of each picture.
        """
        super().__init__(str(root), split, rule, classes, torch.tensor([label for _, label in files]))
        self.root, self.files = root, [file for file, _ in files]

    def file(self, index: int) -> Path:
        return self.root / self.files[index]

    def name(self, index: int) -> str:
        return self.files[index]

    def stored(self, index: int) -> int:
        try:
            return (self.root / self.files[index]).stat().st_size
        except OSError:
            return 0


def is_here(folder: Path) -> bool:
    """Whether a folder has folders."""
    return bool(_directories(folder))


def splits(folder: Path) -> dict[str, Dataset]:
    """The splits of a folder with ``train`` and ``validation``, or by a hash of the files' names if it has neither.

    Classes are the directories of the training split, in the order of their names; their pictures may be in directories
    below them.
    """
    inner = {split: next((n for n in names if (folder / n).is_dir()), None) for split, names in SPLIT_NAMES.items()}
    here = {split: name for split, name in inner.items() if name is not None}
    if not here:
        return _hashed(folder)
    classes = _directories(folder / next(iter(here.values())))
    found: dict[str, Dataset] = {}
    for split, name in here.items():
        if unknown := [c for c in _directories(folder / name) if c not in classes]:
            raise ValueError(f"{folder / name}: classes that {here['train']} does not have: {', '.join(unknown[:5])}")
        files = _pictures(folder, name, classes)
        found[split] = Files(folder, split, f"the folder {name}", classes, files)
    return found


def _hashed(folder: Path) -> dict[str, Dataset]:
    classes = _directories(folder)
    files = _pictures(folder, "", classes)
    out = held_out([file for file, _ in files]).tolist()
    trained = {label for (_, label), is_out in zip(files, out, strict=True) if not is_out}
    out = [is_out and label in trained for (_, label), is_out in zip(files, out, strict=True)]
    parts = [[file for file, is_out in zip(files, out, strict=True) if is_out == part] for part in (False, True)]
    train: Dataset = Files(folder, "train", f"all but a {HELD_OUT}", classes, parts[0])
    return {"train": train} | (
        {"validation": Files(folder, "validation", f"a {HELD_OUT}", classes, parts[1])} if parts[1] else {}
    )


def _directories(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and os.path.isdir(e.path))


def _pictures(root: Path, inner: str, classes: Sequence[str]) -> list[tuple[str, int]]:
    """Path below ``root``, and label, of all pictures, in the order of their classes and names."""
    files, ignored = [], 0
    for label, name in enumerate(classes):
        top = root / inner / name
        for file in sorted(_files(top)) if top.is_dir() else ():
            if os.path.splitext(file)[1].lower() in SUFFIXES:
                files.append((os.path.relpath(file, root), label))
            else:
                ignored += 1
    if ignored:
        log.warning("%s: %s files that are no pictures by their names are ignored", root / inner, f"{ignored:,}")
    return files


def _files(folder: Path) -> Iterator[str]:
    """All files below a folder, also through links, but not those that lead back to where they come from.

    Raises:
        OSError: a folder cannot be read.
    """
    top, seen = os.path.realpath(folder), set()
    for path, directories, files in os.walk(folder, followlinks=True, onerror=_raise):
        here = os.path.realpath(path)
        if here in seen or top.startswith(here.rstrip(os.sep) + os.sep):
            directories.clear()
            continue
        seen.add(here)
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        yield from (os.path.join(path, file) for file in files if not file.startswith("."))


def _raise(error: OSError) -> None:
    raise error
