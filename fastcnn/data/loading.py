"""Batches of pictures for training and evaluation, on torch's DataLoader."""

from __future__ import annotations

import logging
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .augment import Augmentation
from .colours import Statistics, total
from .dataset import Arrays, Dataset
from .images import ImageError, centre_square
from .order import Order
from .workers import cpus, integer, same, watch_parent

DEFAULT_SIZE = 256
log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Pictures, their labels, and their numbers in the data set.

    ``images`` are uint8 of shape (n, height, width, 3), or what an augmentation makes of them; ``labels`` is int64 of
    shape (n,), on the same device; ``indices`` is int64 of shape (n,), on the CPU. ``n`` may be 0.

    Without augmentation, on the CPU, images that a worker has read are in memory that forked processes share. It is
    used again when no tensor is left in it: of a part that is to be kept for long, keep a clone.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class Fetched(NamedTuple):
    """Pictures as bytes, their numbers, and which could not be read and why."""

    pictures: Tensor
    indices: Tensor
    failures: list[tuple[int, str]]


def loader(
    dataset: Dataset,
    batch: int,
    *,
    augment: Augmentation | None = None,
    size: int | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    seed: int = 0,
    rank: int | None = None,
    world: int | None = None,
    workers: int | None = None,
    prefetch: int = 2,
    device: torch.device | str = "cpu",
    cache: str | None = None,
) -> Loader:
    """Batches of a data set, of which :meth:`Loader.epoch` gives those of an epoch.

    Processes decode the pictures and scale and crop them to squares; this process augments them on the device. The
    order of an epoch and every random choice depend on (seed, epoch, number of the picture) alone, so that any number
    of workers and ranks gives the same global batches, and an epoch can be resumed at any step.

    Args:
        dataset: of :func:`open_dataset`.
        batch: pictures of a global batch, all ranks together. The last batch of an epoch has what is left. Rank ``r``
            of ``w`` has the pictures from ``b * r // w`` to ``b * (r + 1) // w`` of a batch of ``b``, which may be
            none.
        augment: makes the network's input on the device; None for uint8 pictures.
        size: side of the squares, to which pictures of other sizes are scaled and cropped; None leaves pictures that
            are all of one size as they are, and makes others 256.
        shuffle: whether epochs have an order of their own, or that of the data set.
        drop_last: leave out the last batch if it is incomplete.
        seed: from 0 to 2**64 - 1.
        rank, world: of this process and of all; those of ``torch.distributed`` if None, where it is initialized.
        workers: processes that read; if None, one per CPU for files that are decoded, and none (this process reads) for
            arrays.
        prefetch: batches that each of them is ahead.
        device: of the batches; on their way to a GPU they are in pinned memory.
        cache: "device" copies the whole data set, which must be arrays of one size, to the device as uint8 once, and
            needs no workers.

    Raises:
        TypeError: ``dataset`` is none, or an argument no integer.
        ValueError: an argument is out of range; the crop is larger than the pictures; what is to be cached is no array,
            or does not fit.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"loader(): expected a fastcnn.data.Dataset, not {type(dataset).__name__}")
    if rank is None or world is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = (torch.distributed.get_rank() if distributed else 0) if rank is None else rank
        world = (torch.distributed.get_world_size() if distributed else 1) if world is None else world
    order = Order(len(dataset), batch, seed, shuffle, drop_last, rank, world)
    device = torch.device(device)
    workers = (cpus() if dataset.decodes else 0) if workers is None else integer("workers", workers)
    prefetch, size = integer("prefetch", prefetch), None if size is None else integer("size", size)
    if workers < 0 or prefetch < 1 or cache not in (None, "device"):
        raise ValueError(
            "loader(): expected workers >= 0, prefetch >= 1, and cache None or 'device', but got "
            f"workers={workers}, prefetch={prefetch}, cache={cache!r}"
        )
    height, width = shape = (size, size) if size is not None else dataset.shape or (DEFAULT_SIZE, DEFAULT_SIZE)
    if min(shape) < 1:
        raise ValueError(f"loader(): there are no pictures of {height}x{width} pixels")
    if augment is not None:
        augment.check(height, width)
    if cache is not None:
        return Loader(dataset, order, Cached(dataset, shape, device), augment, device)
    reading = Reading(dataset, shape, order.largest, min(workers, order.steps), prefetch)
    return Loader(dataset, order, reading, augment, device)


class Loader:
    """See :func:`loader`, which makes it.

    Attributes:
        skipped: pictures of this rank that could not be read when they were last needed, by their numbers, and why.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        source: Callable[[list[Tensor]], Iterator[Fetched]],
        augment: Augmentation | None,
        device: torch.device,
    ) -> None:
        self.dataset, self.order, self.source, self.augment, self.device = dataset, order, source, augment, device
        self.skipped: dict[int, str] = {}
        self._begun = 0

    def __len__(self) -> int:
        """Steps of an epoch."""
        return self.order.steps

    def epoch(self, epoch: int, step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from a step on, which are the same whatever was asked for before.

        There is one for each step that is left. Pictures that cannot be read are missing in their batches, are logged
        as warnings, and are in ``skipped``; so a batch may be empty, as may be the part of a rank.

        Raises:
            TypeError, ValueError: as :meth:`Order.epoch`.
            ImageError: at the end of a whole epoch of one rank, if none of the pictures could be read.
            RuntimeError: when another epoch of this loader has begun before this one has ended; or a worker has died,
                after which another epoch may begin.
        """
        plan = self.order.epoch(epoch, step)
        self._begun += 1
        return self._batches(integer("epoch", epoch), plan, self._begun, whole=step == 0 and self.order.world == 1)

    def _batches(self, epoch: int, plan: list[Tensor], begun: int, whole: bool) -> Iterator[Batch]:
        read, failed = 0, 0
        self._check_is_last(begun)
        for fetched in self.source(plan):
            self._note(fetched)
            read, failed = read + len(fetched.indices), failed + len(fetched.failures)
            yield self._batch(epoch, fetched)
            self._check_is_last(begun)
        if whole and failed and not read:
            raise ImageError(f"{self.dataset.source}: no picture could be read. {next(iter(self.skipped.values()))}")

    def _batch(self, epoch: int, fetched: Fetched) -> Batch:
        pictures = fetched.pictures
        if pictures.device.type != self.device.type:
            pin = self.device.type == "cuda"
            pictures = (pictures.pin_memory() if pin else pictures).to(self.device, non_blocking=pin)
        labels = self.dataset.labels[fetched.indices].to(self.device, non_blocking=True)
        if self.augment is not None:
            pictures = self.augment(pictures, self.order.seed, epoch, fetched.indices)
        return Batch(pictures, labels, fetched.indices)

    def _check_is_last(self, begun: int) -> None:
        if self._begun != begun:
            raise RuntimeError("Loader.epoch(): another epoch has begun before the end of this one")

    def _note(self, fetched: Fetched) -> None:
        """What could be read, and what could not."""
        for index in fetched.indices.tolist() if self.skipped else ():
            self.skipped.pop(index, None)
        for index, why in fetched.failures:
            if index not in self.skipped:
                log.warning("skipped: %s", why)
            self.skipped[index] = why


class Reader(torch.utils.data.Dataset):
    """Reads the pictures with given numbers into one of its buffers, or into new memory."""

    def __init__(self, dataset: Dataset, shape: tuple[int, int], buffers: Tensor) -> None:
        self.dataset, self.shape, self.buffers = dataset, shape, buffers

    def __getitem__(self, task: tuple[int | None, Tensor]) -> tuple[Tensor | int, list[int], list[tuple[int, str]]]:
        """The buffer's number, or new memory; the numbers of the pictures in it; those that cannot be read, and why."""
        buffer, indices = task
        into = _new((len(indices), *self.shape, 3)) if buffer is None else self.buffers[buffer]
        array = into.numpy()
        read: list[int] = []
        failures: list[tuple[int, str]] = []
        for index in indices.tolist():
            try:
                picture = self.dataset.pixels(index)
            except ImageError as error:
                failures.append((index, str(error)))
                continue
            array[len(read)] = picture if picture.shape[:2] == self.shape else centre_square(picture, self.shape[0])
            read.append(index)
        return into if buffer is None else buffer, read, failures


class Buffers:
    """Memory that processes share, in parts of a batch each, which are lent and come back.

    If workers sent tensors, as is usual, the pages of each would be mapped, cleared and unmapped again, which takes as
    long as half of the decoding.
    """

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.memory = _new((count, *shape))
        if count:
            self.memory.share_memory_()
        self.free = list(range(count))
        self.lent = set[int]()
        self.returned = deque[int]()  # by whatever thread drops a tensor; the rest is of one thread alone

    def take(self) -> int | None:
        """A free buffer, the one that was used last, if there is one."""
        self._sort()
        return self.free.pop() if self.free else None

    def take_back(self) -> None:
        """All but those that are lent."""
        self._sort()
        self.free = [buffer for buffer in range(len(self.memory)) if buffer not in self.lent]

    def lend(self, buffer: int) -> Tensor:
        """The tensor in a buffer, which is free again when neither it nor a view of it is left."""
        array = self.memory[buffer].numpy()
        self.lent.add(buffer)
        weakref.finalize(array, self.returned.append, buffer).atexit = False
        return torch.from_numpy(array)  # holds the array as long as its memory is in use

    def _sort(self) -> None:
        while self.returned:
            buffer = self.returned.popleft()
            self.lent.remove(buffer)
            self.free.append(buffer)


class Tasks(torch.utils.data.Sampler[tuple[int | None, Tensor]]):
    """What a DataLoader is to read in its next iteration, and into which buffers; None for memory of its own."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers, self.plan = buffers, list[Tensor]()

    def __iter__(self) -> Iterator[tuple[int | None, Tensor]]:
        self.buffers.take_back()  # what was being read when the last iteration was left
        for indices in self.plan:
            yield self.buffers.take(), indices


class Reading:
    """Batches by a DataLoader, whose processes live as long as it does."""

    def __init__(self, dataset: Dataset, shape: tuple[int, int], batch: int, workers: int, prefetch: int) -> None:
        count = workers * prefetch + 3 if workers else 0  # one with the caller, one for what it asks for, and one more
        self.buffers = Buffers(count, (batch, *shape, 3))
        self.tasks = Tasks(self.buffers)
        self.start = partial(
            DataLoader,
            Reader(dataset, shape, self.buffers.memory),
            batch_size=None,
            sampler=self.tasks,
            num_workers=workers,
            collate_fn=same,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # or else torch's own would advance
            worker_init_fn=partial(watch_parent, os.getpid()),
        )
        self.loader = self.start()

    def __call__(self, plan: list[Tensor]) -> Iterator[Fetched]:
        self.tasks.plan = plan
        try:
            with torch.device("cpu"):  # the default, for a number that DataLoader draws
                batches = iter(self.loader)
            for where, read, failures in batches:
                indices = torch.tensor(read, dtype=torch.int64, device="cpu")
                yield Fetched(self._pictures(where)[: len(read)], indices, failures)
        except Exception:
            self.loader = self.start()  # one that has lost a worker fails for ever
            raise

    def _pictures(self, where: Tensor | int) -> Tensor:
        if isinstance(where, int):
            return self.buffers.lend(where)
        return where.clone() if self.loader.num_workers else where  # a file descriptor each, of which there are few


class Cached:
    """Batches of a data set that is on the device."""

    def __init__(self, dataset: Dataset, shape: tuple[int, int], device: torch.device) -> None:
        if not isinstance(dataset, Arrays) or dataset.shape != shape:
            raise ValueError("loader(): only arrays in their own size can be cached; fastcnn pack makes such")
        needed, free = sum(array.nbytes for array in dataset.arrays), _free(device)
        if needed > free:
            raise ValueError(f"loader(): {needed:,} bytes are to be cached on {device}, where {free:,} are free")
        first = dataset.arrays[0]
        self.pictures = torch.empty((len(dataset), *first.shape[1:]), dtype=first.dtype, device=device)
        for array, part in zip(dataset.arrays, self.pictures.split(list(map(len, dataset.arrays))), strict=True):
            part.copy_(array)
        self.device = device

    def __call__(self, plan: list[Tensor]) -> Iterator[Fetched]:
        for indices in plan:
            pictures = self.pictures[indices.to(self.device, non_blocking=True)]
            yield Fetched(pictures.expand(-1, -1, -1, 3).contiguous(), indices, [])


def _new(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, device="cpu")


def _free(device: torch.device) -> int:
    """Bytes of memory: what is free on a GPU, or all that this machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure(dataset: Dataset, *, size: int | None = None, workers: int | None = None) -> Statistics:
    """Mean, deviation and principal components of the colours of a data set's pictures, at ``size`` as in
    :func:`loader`."""
    batches = loader(dataset, 64, size=size, shuffle=False, workers=workers).epoch(0)
    return total(Statistics.of(picture) for batch in batches for picture in batch.images)
