"""Packing: decode the pictures of a data set once, scaled and cropped to squares of one size."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch.utils.data import DataLoader

from .colours import Statistics, total
from .dataset import Dataset
from .files import flush_folder, locked, write_whole
from .images import MAX_SIDE, ImageError, centre_square
from .sources import open_splits
from .sources.packed import MANIFEST, VERSION
from .workers import cpus, end_if_orphaned, integer, same, watch_parent

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMATS = ("npy", "parquet")
SHARD = 512  # pictures in a file, the unit of work
RECORDS = "records"  # of finished shards, until all are


def pack(
    data: str,
    out: str | os.PathLike[str],
    *,
    size: int = 256,
    format: str = "npy",
    quality: int = 95,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Write a data set as pictures of one size, whose short side is scaled to ``size`` and whose centre is cropped.

    Files of 512 pictures are written one by one into ``<out>.partial``, which becomes ``out`` when all are there. After
    an interruption, the same call goes on. The bytes written do not depend on ``workers`` nor on interruptions.
    Pictures that cannot be decoded are left out, and named in the result.

    Args:
        data: what :func:`fastcnn.data.open_splits` opens; all its splits are packed.
        out: a folder, which must not be there yet, or be empty.
        size: height and width, in pixels.
        format: "npy", arrays of pixels that are memory-mapped; or "parquet", JPEG files in the layout of ``datasets``,
            a tenth of the size, which have to be decoded.
        quality: of JPEG files, from 1 to 100.
        workers: processes; one per CPU if None; 0 for this one.
        progress: called with the number of pictures that are done, and of all.

    Returns:
        What ``packed.json`` in ``out`` holds: classes, rules of the splits, files, skipped pictures, and exact sums
        over the pixels of the training split (before they become JPEG), with mean, deviation and principal components.

    Raises:
        FileExistsError: ``out`` or ``<out>.partial`` holds something else.
        BlockingIOError: another process is packing into ``out``.
        TypeError: ``size``, ``quality`` or ``workers`` is no integer.
        ValueError: the arguments, the data set, or what was begun with others: the message says which.
        ImageError: no picture could be decoded of a split, or of a class for training.
        OSError: files cannot be written; what was finished stays.
    """
    size, quality = integer("size", size), integer("quality", quality)
    if not 1 <= size <= MAX_SIDE or not 1 <= quality <= 100 or format not in FORMATS:
        raise ValueError(
            f"pack(): expected a size from 1 to {MAX_SIDE}, a quality from 1 to 100, and a format among "
            f"{', '.join(FORMATS)}, but got size={size}, quality={quality}, format={format!r}"
        )
    out = Path(out).resolve()
    if os.path.lexists(data) and out.is_relative_to(Path(data).resolve()):
        raise ValueError(f"pack(): {out} would be within {data}, which would be another data set then")
    if os.path.ismount(out):
        raise ValueError(f"pack(): {out} is where a disk is mounted, so that it cannot be replaced")
    folder = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f"{out.name}.partial.lock")):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(errno.EEXIST, "is there already", str(out))
        begun = (folder / RECORDS / "job.json").exists() or (folder / MANIFEST).exists()
        if folder.exists() and not begun and any(path.name != RECORDS for path in folder.iterdir()):
            raise FileExistsError(errno.EEXIST, "is there already, and not from packing", str(folder))
        splits = open_splits(data)
        job = {"source": Path(data).name, "size": size, "format": format, "shard": SHARD}
        job |= {"quality": quality} if format == "parquet" else {}
        job |= {"pictures": {split: dataset.fingerprint() for split, dataset in splits.items()}}
        packing = Packing(folder, splits, job)
        if packing.is_complete():
            progress(packing.pictures, packing.pictures)
        else:
            packing.begin()
            packing.run(cpus() if workers is None else integer("workers", workers), progress)
            packing.complete()
        packing.clean()
        os.rename(folder, out)
        flush_folder(out.parent)
    return json.loads((out / MANIFEST).read_text())


class Packing(torch.utils.data.Dataset):
    """Shards by number; to ask for one writes its file, and then its record: JSON that says what is in it."""

    def __init__(self, folder: Path, splits: dict[str, Dataset], job: dict[str, Any]) -> None:
        self.folder, self.splits, self.job, self.process = folder, splits, job, os.getpid()
        self.shards = [(split, number) for split, dataset in splits.items() for number in range(_shards(dataset))]
        self.pictures = sum(map(len, splits.values()))

    def is_complete(self) -> bool:
        """Whether all is done but the renaming."""
        manifest = self.folder / MANIFEST
        if manifest.exists():
            self._check_job(_read_json(manifest)["job"])
        return manifest.exists()

    def begin(self) -> None:
        """Go on with what there is, or begin.

        Raises:
            ValueError: it is of other data or arguments.
            OSError: the disk is too small.
        """
        job = self.folder / RECORDS / "job.json"
        if job.exists():
            self._check_job(_read_json(job))
        job.parent.mkdir(parents=True, exist_ok=True)
        _write_json(job, self.job)
        if self.job["format"] == "parquet":
            (self.folder / "data").mkdir(exist_ok=True)
        else:
            missing = sum(len(self._members(index)) for index in self._missing())
            needed, free = missing * 3 * self.job["size"] ** 2, shutil.disk_usage(self.folder).free
            if needed > free:
                raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, and {free:,} are free", str(self.folder))

    def run(self, workers: int, progress: Callable[[int, int], None]) -> None:
        """Write the shards that are missing."""
        missing = self._missing()
        done = self.pictures - sum(len(self._members(index)) for index in missing)
        progress(done, self.pictures)
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=missing,
            num_workers=min(workers, len(missing)),
            collate_fn=same,
            worker_init_fn=partial(watch_parent, self.process),
        )
        for index, error in zip(missing, loader, strict=True):
            if error is not None:
                raise error
            done += len(self._members(index))
            progress(done, self.pictures)

    def complete(self) -> None:
        """Write the manifest, of the records of all shards.

        Raises:
            ImageError: no picture of a split could be decoded.
        """
        records = [_read_json(self._record(index)) for index in range(len(self.shards))]
        self._check_classes(records)
        parts = {split: self._part(split, records) for split in self.splits}
        sums = total(
            Statistics.from_json(record["sums"])
            for (split, _), record in zip(self.shards, records, strict=True)
            if split == "train"
        )
        classes = next(iter(self.splits.values())).classes
        statistics = _derived(sums) if sums.pixels else None
        manifest = {"version": VERSION, "job": self.job, "classes": classes, "splits": parts, "statistics": statistics}
        _write_json(self.folder / MANIFEST, manifest)

    def clean(self) -> None:
        """Remove what is of no use to readers, also what processes that were killed have left."""
        shutil.rmtree(self.folder / RECORDS, ignore_errors=True)
        for file in self.folder.rglob("*.tmp"):
            file.unlink()

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> OSError | None:
        """Pack a shard; an error is returned, because a process of DataLoader would raise another one."""
        try:
            self._pack(index)
        except OSError as error:
            return error
        return None

    def _pack(self, index: int) -> None:
        import numpy

        dataset, members, size = self.splits[self.shards[index][0]], self._members(index), self.job["size"]
        pictures = numpy.empty((len(members), size, size, 3), numpy.uint8)
        labels: list[int] = []
        skipped, sums = [], Statistics()
        for member in members:
            into = pictures[len(labels)]
            try:
                into[...] = centre_square(dataset.pixels(member), size)
            except ImageError as error:
                skipped.append([dataset.name(member), str(error)])
                continue
            labels.append(dataset.label(member))
            sums += Statistics.of(torch.from_numpy(into))
        file = self._file(index)
        end_if_orphaned()  # or it might write into what others have begun meanwhile
        if labels:
            self._write(file, pictures[: len(labels)], labels, dataset.classes)
        record = {
            "bytes": file.stat().st_size if labels else 0,
            "labels": labels,
            "stored": [dataset.stored(member) for member in members],
            "skipped": skipped,
            "sums": asdict(sums),
        }
        _write_json(self._record(index), record)

    def _members(self, index: int) -> range:
        split, number = self.shards[index]
        return range(number * SHARD, min((number + 1) * SHARD, len(self.splits[split])))

    def _file(self, index: int) -> Path:
        split, number = self.shards[index]
        if self.job["format"] == "npy":
            return self.folder / f"{split}-{number:05d}.npy"
        return self.folder / "data" / f"{split}-{number:05d}-of-{_shards(self.splits[split]):05d}.parquet"

    def _record(self, index: int) -> Path:
        split, number = self.shards[index]
        return self.folder / RECORDS / f"{split}-{number:05d}.json"

    def _missing(self) -> list[int]:
        return [index for index in range(len(self.shards)) if not self._is_there(index)]

    def _is_there(self, index: int) -> bool:
        """Whether a shard is finished; its sources must be the same as then."""
        if not self._record(index).exists():
            return False
        record, dataset = _read_json(self._record(index)), self.splits[self.shards[index][0]]
        for member, before in zip(self._members(index), record["stored"], strict=True):
            if (now := dataset.stored(member)) != before:
                raise ValueError(
                    f"{dataset.name(member)} of {dataset.source} has {now:,} bytes, and had {before:,} when it was "
                    f"packed. {self._remedy()}"
                )
        file = self._file(index)
        return (file.stat().st_size if file.exists() else 0) == record["bytes"]

    def _check_job(self, begun: dict[str, Any]) -> None:
        job = json.loads(json.dumps(self.job))
        differ = [key for key in {**job, **begun} if job.get(key) != begun.get(key)]
        if differ:
            told = (
                "pictures: others were there"
                if key == "pictures"
                else f"{key}: {begun.get(key)} then, {job.get(key)} now"
                for key in differ
            )
            raise ValueError(f"{self.folder} was begun otherwise ({'; '.join(told)}). {self._remedy()}")

    def _remedy(self) -> str:
        return f"Remove {self.folder} to begin anew"

    def _write(self, file: Path, pictures: NDArray[Any], labels: list[int], classes: Sequence[str]) -> None:
        if self.job["format"] == "npy":
            write_array(file, pictures)
        else:
            quality = self.job["quality"]
            write_whole(file, lambda stream: write_table(stream, pictures, labels, classes, quality))

    def _check_classes(self, records: list[dict[str, Any]]) -> None:
        """Whether the training split still has pictures of all classes."""
        if dataset := self.splits.get("train"):
            trained = {
                label
                for (split, _), record in zip(self.shards, records, strict=True)
                if split == "train"
                for label in record["labels"]
            }
            lost = [name for label, name in enumerate(dataset.classes) if label not in trained]
            if trained and lost:
                raise ImageError(f"train: no picture can be decoded of {len(lost)} classes: {', '.join(lost[:5])}")

    def _part(self, split: str, records: list[dict[str, Any]]) -> dict[str, Any]:
        """What the manifest says of a split, whose labels are written."""
        mine = [(self._file(index), record) for index, record in enumerate(records) if self.shards[index][0] == split]
        files = {file.relative_to(self.folder).as_posix(): record["bytes"] for file, record in mine if record["bytes"]}
        skipped = [one for _, record in mine for one in record["skipped"]]
        if not files:
            raise ImageError(f"{split}: none of {len(skipped):,} pictures can be decoded. {': '.join(skipped[0])}")
        if self.job["format"] == "npy":
            labels = self.folder / f"{split}-labels.npy"
            numbers = [label for _, record in mine for label in record["labels"]]
            write_array(labels, torch.tensor(numbers).numpy())
            files[labels.name] = labels.stat().st_size
        pictures = sum(len(record["labels"]) for _, record in mine)
        return {"rule": self.splits[split].rule, "pictures": pictures, "files": files, "skipped": skipped}


def write_array(file: Path, array: NDArray[Any]) -> None:
    """Write a file of numpy's format."""
    import numpy

    # numpy hands a file of Python's to the C library, and does not notice when the disk is full
    write_whole(file, lambda stream: numpy.save(SimpleNamespace(write=stream.write), array))


def write_table(
    stream: BinaryIO, pictures: Iterable[NDArray[Any]], labels: Sequence[int], classes: Sequence[str], quality: int
) -> None:
    """Write a parquet file of JPEG files and labels, in the layout of ``datasets``."""
    import datasets
    import pyarrow.parquet
    from PIL import Image

    files = []
    for picture in pictures:
        encoded = BytesIO()
        Image.fromarray(picture).save(encoded, "JPEG", quality=quality)
        files.append({"bytes": encoded.getvalue(), "path": None})
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(classes)))
    table = pyarrow.Table.from_pydict({"image": files, "label": list(labels)}, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, stream)


def _derived(sums: Statistics) -> dict[str, Any]:
    derived = ("mean", "std", "eigenvalues", "eigenvectors")
    return asdict(sums) | {name: getattr(sums, name) for name in derived}


def _shards(dataset: Dataset) -> int:
    return -(-len(dataset) // SHARD)


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def _write_json(file: Path, content: object) -> None:
    write_whole(file, lambda stream: stream.write(json.dumps(content, indent=1).encode()))
