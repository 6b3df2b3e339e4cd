"""Batches: the right pictures, the same whoever reads them, and what happens to those that cannot be read."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from fastcnn.data import (
    Augmentation,
    Batch,
    Dataset,
    ImageError,
    Loader,
    Statistics,
    epoch_order,
    loader,
    measure,
    open_dataset,
    pack,
)
from fastcnn.data.images import centre_square
from fastcnn.data.loading import Buffers, Reading
from fastcnn.data.workers import cpus

pytest.importorskip("PIL")
from .pictures import picture, write_folder, write_mnist

SEED = 5


@pytest.fixture
def folder(tmp_path: Path) -> Dataset:
    """23 pictures of 20x16 pixels."""
    write_folder(tmp_path / "source/train", {"a": 12, "b": 11})
    return open_dataset(str(tmp_path / "source"))


@pytest.fixture
def packed(folder: Dataset, tmp_path: Path) -> Dataset:
    pack(folder.source, tmp_path / "packed", size=16, workers=0)
    return open_dataset(str(tmp_path / "packed"))


def make(dataset: Dataset, batch: int = 5, **options: Any) -> Loader:
    return loader(dataset, batch, **{"seed": SEED, "workers": 0, **({"size": 16} | options)})


def content(batches: Any) -> list[tuple[bytes, list[int], list[int]]]:
    return [(one.images.numpy().tobytes(), one.labels.tolist(), one.indices.tolist()) for one in batches]


def squares(indices: Tensor) -> Tensor:
    """What the pictures of ``folder`` become at 16 pixels."""
    found = [centre_square(picture(index), 16) for index in indices.tolist()]
    return torch.from_numpy(numpy.array(found, numpy.uint8).reshape(-1, 16, 16, 3))


# What is in a batch


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_pictures_of_the_order(folder: Dataset, workers: int) -> None:
    load = make(folder, workers=workers)
    order = epoch_order(23, SEED, 3)
    assert len(load) == 5
    for step, (images, labels, indices) in enumerate(load.epoch(3)):
        assert torch.equal(indices, order[5 * step : 5 * step + 5])
        assert torch.equal(images, squares(indices))
        assert torch.equal(labels, (indices >= 12).long())


def test_pictures_of_one_size_stay_as_they_are(packed: Dataset, tmp_path: Path) -> None:
    batch = next(make(packed, size=None).epoch(0))
    assert torch.equal(batch.images, squares(batch.indices))
    write_mnist(tmp_path / "mnist")
    grey = open_dataset(str(tmp_path / "mnist"))
    batch = next(make(grey, size=None).epoch(0))
    assert batch.images.shape == (5, 5, 7, 3)
    assert torch.equal(batch.images, torch.stack([grey.image(index) for index in batch.indices]))
    batch = next(make(grey, size=9).epoch(0))
    assert torch.equal(batch.images[2], torch.from_numpy(centre_square(grey.pixels(int(batch.indices[2])), 9)))


def test_other_pictures_become_256(folder: Dataset) -> None:
    assert next(make(folder, size=None).epoch(0)).images.shape == (5, 256, 256, 3)


# The same whoever reads


def test_any_number_of_workers_and_ranks_gives_the_same(folder: Dataset) -> None:
    statistics = measure(folder, size=16, workers=0)
    augment = Augmentation(9, noise=0.1, statistics=statistics, jitter=(9, 21), dtype=torch.float64)
    expected = list(make(folder, augment=augment).epoch(2))
    for workers, world in ((1, 1), (3, 1), (0, 2), (2, 3), (0, 7)):
        loaders = [make(folder, augment=augment, workers=workers, rank=r, world=world) for r in range(world)]
        for whole, *parts in zip(expected, *(load.epoch(2) for load in loaders), strict=True):
            for field, joined in zip(Batch._fields, map(torch.cat, zip(*parts, strict=True)), strict=True):
                assert torch.equal(joined, getattr(whole, field)), (workers, world, field)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_goes_on_exactly(folder: Dataset, workers: int) -> None:
    load = make(folder, augment=Augmentation(9), workers=workers)
    whole = content(load.epoch(1))
    assert content(load.epoch(1)) == whole
    for step in range(6):
        assert content(load.epoch(1, step)) == whole[step:]
    assert content(load.epoch(2)) != whole


def in_rank(rank: int, source: str, meeting: Path, queue: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    batches = list(make(open_dataset(source), batch=4, workers=1).epoch(1, step=3))
    queue.put((rank, [batch.indices.tolist() for batch in batches]))
    torch.distributed.destroy_process_group()


def test_processes_know_their_ranks(folder: Dataset, tmp_path: Path) -> None:
    """Resumed in the middle of an epoch, two ranks go on in the right order: accelerate's issue 4195."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (folder.source, tmp_path / "meeting", queue)
    processes = [context.Process(target=in_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=100) for _ in processes)
    for process in processes:
        process.join()
    order = epoch_order(23, SEED, 1).split(4)[3:]
    assert [first + second for first, second in zip(found[0], found[1], strict=True)] == [b.tolist() for b in order]
    assert found[0] == [b.tolist()[: len(b) // 2] for b in order]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_may_be_started_in_any_way(
    folder: Dataset, packed: Dataset, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dataset in (folder, packed):
        expected = content(make(dataset).epoch(0))
        load = make(dataset, workers=1)
        assert isinstance(load.source, Reading)
        load.source.loader.multiprocessing_context = method
        assert content(load.epoch(0)) == expected


def test_randomness_of_others_is_left_alone(folder: Dataset) -> None:
    state = torch.get_rng_state()
    for workers in (0, 1):
        list(make(folder, workers=workers, augment=Augmentation(9)).epoch(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_defaults_of_torch_do_not_matter(folder: Dataset) -> None:
    augment = Augmentation(9, noise=0.1, statistics=measure(folder, size=16, workers=0), std=(3.0, 4.0, 5.0))
    expected = content(make(folder, augment=augment).epoch(0))
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            for workers in (0, 1):
                assert content(make(folder, workers=workers, augment=augment).epoch(0)) == expected
    finally:
        torch.set_default_dtype(torch.float32)


# Memory


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_kept_do_not_change(folder: Dataset, workers: int) -> None:
    """Nor do parts of them: their memory is used again only when nothing is left of them."""
    expected = list(make(folder, batch=2).epoch(0))
    load = make(folder, batch=2, workers=workers)
    kept = list(load.epoch(0))
    parts = [batch.images[0] for batch in load.epoch(0)]
    del load
    gc.collect()
    for batch, part, right in zip(kept, parts, expected, strict=True):
        assert torch.equal(batch.images, right.images)
        assert torch.equal(part, right.images[0])


def test_memory_is_used_again_when_a_batch_is_dropped(folder: Dataset) -> None:
    load = make(folder, batch=2, workers=1)
    addresses = [batch.images.data_ptr() for epoch in range(4) for batch in load.epoch(epoch)]
    assert len(addresses) == 48
    assert len(set(addresses)) <= 5  # 2 ahead, one here, one that is asked for, one more


def test_batches_may_be_dropped_by_any_thread(folder: Dataset) -> None:
    """Also while another epoch begins: no part of the memory is given out twice."""
    buffers, interval = Buffers(8, (4,)), sys.getswitchinterval()
    queue: SimpleQueue[Tensor | None] = SimpleQueue()

    def drop() -> None:
        while queue.get() is not None:
            pass

    thread = threading.Thread(target=drop)
    thread.start()
    try:
        sys.setswitchinterval(1e-6)
        for step in range(20_000):
            if step % 7 == 0:
                buffers.take_back()
            taken = buffers.take()
            if taken is not None:
                queue.put(buffers.lend(taken))
            assert len({*buffers.free, *buffers.lent}) == len(buffers.free) + len(buffers.lent) <= 8
    finally:
        sys.setswitchinterval(interval)
        queue.put(None)
        thread.join()


def test_who_keeps_all_batches_needs_no_file_for_each(folder: Dataset) -> None:
    load = make(folder, batch=1, workers=1)
    before = len(os.listdir("/proc/self/fd"))
    kept = list(load.epoch(0))
    assert len(kept) == 23
    assert len(os.listdir("/proc/self/fd")) <= before + 12  # of the processes


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_may_be_left(folder: Dataset, workers: int) -> None:
    """Again and again; each time memory that was being read into comes back."""
    load = make(folder, batch=2, workers=workers)
    for epoch in range(12):
        kept = [batch for _, batch in zip(range(3), load.epoch(epoch), strict=False)]
        for step, batch in enumerate(kept):
            assert torch.equal(batch.indices, epoch_order(23, SEED, epoch)[2 * step : 2 * step + 2])
            assert torch.equal(batch.images, squares(batch.indices))
    assert content(load.epoch(0)) == content(make(folder, batch=2).epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_two_epochs_at_once_are_refused(folder: Dataset, workers: int) -> None:
    load = make(folder, workers=workers)
    first = load.epoch(0)
    next(first)
    second = load.epoch(1)
    with pytest.raises(RuntimeError, match="another epoch has begun"):
        next(first)
    assert content(second) == content(make(folder).epoch(1))
    going_on = load.epoch(0)
    next(going_on)
    with pytest.raises(ValueError, match="epoch=-1"):
        load.epoch(-1)
    next(going_on)
    never = load.epoch(2)
    assert content(load.epoch(0)) == content(make(folder).epoch(0))
    with pytest.raises(RuntimeError, match="another epoch has begun"):
        next(never)


@pytest.mark.parametrize("grey", [False, True])
def test_a_cached_set_gives_the_same(packed: Dataset, tmp_path: Path, grey: bool) -> None:
    if grey:
        write_mnist(tmp_path / "mnist")
        packed = open_dataset(str(tmp_path / "mnist"))
    cached = make(packed, size=None, cache="device")
    for epoch, step in ((0, 0), (1, 1)):
        assert content(cached.epoch(epoch, step)) == content(make(packed, size=None).epoch(epoch, step))
    assert not isinstance(cached.source, Reading)
    images = next(cached.epoch(0)).images
    images[..., 0] += 1
    assert images.is_contiguous()


# Pictures that cannot be read


def test_broken_pictures_are_left_out_counted_and_named(folder: Dataset, logged: list[str]) -> None:
    root = Path(folder.source)
    broken = [int(index) for index in epoch_order(23, SEED, 0)[[1, 6, 7, 8, 9, 5]]]  # one, and a whole batch
    for index in broken:
        (root / folder.name(index)).write_bytes(b"no picture")
    for workers in (0, 2):
        load = make(folder, workers=workers)
        for epoch in range(3):
            batches = list(load.epoch(epoch))
            seen = torch.cat([batch.indices for batch in batches])
            assert sorted([*seen.tolist(), *broken]) == list(range(23))
            for batch in batches:
                assert torch.equal(batch.images, squares(batch.indices))
                assert len(batch.labels) == len(batch.indices)
        assert sorted(load.skipped) == sorted(broken)
        assert sorted(logged) == sorted(f"skipped: {why}" for why in load.skipped.values())
        assert all(folder.name(index) in load.skipped[index] for index in broken)
        logged.clear()
    assert [len(batch.indices) for batch in make(folder).epoch(0)] == [4, 0, 5, 5, 3]
    assert [len(batch.indices) for batch in make(folder).epoch(0, 1)] == [0, 5, 5, 3]


def test_ranks_keep_step_where_none_can_be_read(folder: Dataset) -> None:
    root = Path(folder.source)
    for index in epoch_order(23, SEED, 0)[10:12].tolist():  # the third batch's first part
        (root / folder.name(index)).write_bytes(b"no picture")
    parts = [list(make(folder, rank=rank, world=2, augment=Augmentation(9)).epoch(0)) for rank in range(2)]
    assert [[len(batch.indices) for batch in part] for part in parts] == [[2, 2, 0, 2, 1], [3, 3, 3, 3, 2]]
    assert parts[0][2].images.shape == (0, 3, 9, 9)


def test_a_rest_that_cannot_be_read_is_no_error(folder: Dataset) -> None:
    """Nor the part of a rank: the others would wait for it."""
    last = int(epoch_order(23, SEED, 0)[-1])
    Path(folder.source, folder.name(last)).unlink()
    load = make(folder, batch=22)
    assert [len(batch.indices) for batch in load.epoch(0)] == [22, 0]
    assert [len(batch.indices) for batch in load.epoch(0, 1)] == [0]
    assert list(load.epoch(1, 2)) == []
    assert [len(batch.indices) for batch in make(folder, batch=23, rank=22, world=23).epoch(0)] == [0]


@pytest.mark.parametrize("workers", [0, 1])
def test_none_that_can_be_read_is_an_error(folder: Dataset, workers: int) -> None:
    for index in range(23):
        Path(folder.source, folder.name(index)).unlink()
    load = make(folder, workers=workers)
    with pytest.raises(ImageError, match=r"no picture could be read\. .*train/[ab]/00\d\d.png"):
        list(load.epoch(0))
    assert len(load.skipped) == 23


def test_other_errors_are_errors(folder: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(folder), "pixels", lambda self, index: 1 // 0)
    for workers in (0, 1):
        with pytest.raises(ZeroDivisionError):
            list(make(folder, workers=workers).epoch(0))


def test_a_worker_that_dies_is_an_error_and_then_there_are_others(
    folder: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = make(folder, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "pixels", lambda self, index: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(RuntimeError, match=r"worker .* exited unexpectedly|killed by signal: Killed"):
            list(load.epoch(0))
    assert content(load.epoch(0)) == content(make(folder).epoch(0))


# What is refused


@pytest.mark.parametrize(
    "options",
    [{"workers": -1}, {"prefetch": 0}, {"cache": "disk"}, {"seed": -1}, {"rank": 1, "world": 1}, {"batch": 0}],
)
def test_what_a_loader_refuses(folder: Dataset, options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        make(folder, **options)


@pytest.mark.parametrize("name", ["batch", "seed", "rank", "world", "workers", "prefetch", "size"])
@pytest.mark.parametrize("value", [1.0, True, "1"])
def test_numbers_must_be_integers(folder: Dataset, name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer, not {value!r}"):
        make(folder, **{name: value})


def test_integers_of_numpy_and_torch_will_do(folder: Dataset) -> None:
    load = make(folder, batch=numpy.int64(5), seed=torch.tensor(SEED), size=numpy.uint8(16))
    expected = content(make(folder).epoch(1, 2))
    assert content(load.epoch(numpy.uint32(1), torch.tensor(2))) == expected  # type: ignore[arg-type]
    for epoch, step in ((1.0, 0), (0, 1.0), (True, 0)):
        with pytest.raises(TypeError, match="must be an integer"):
            load.epoch(epoch, step)  # type: ignore[arg-type]


def test_jitter_makes_pictures_larger_than_the_crop(folder: Dataset) -> None:
    augment = Augmentation(20, jitter=(22, 50))
    for batch, plain in zip(make(folder, augment=augment).epoch(1), make(folder).epoch(1), strict=True):
        assert batch.images.shape[1:] == (3, 20, 20)
        assert torch.equal(batch.images, augment(plain.images, SEED, 1, plain.indices))


def test_workers_are_no_more_than_steps_and_a_share_of_the_cpus(
    folder: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for workers, batch, expected in ((9, 10, 3), (1, 10, 1), (0, 10, 0)):
        source = make(folder, batch, workers=workers).source
        assert isinstance(source, Reading)
        assert source.loader.num_workers == expected
    here = cpus()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * here))
    assert cpus() == 1


def test_what_no_loader_can_be_made_of(folder: Dataset, packed: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"expected a fastcnn\.data\.Dataset, not list"):
        loader([1, 2], 3)  # type: ignore[arg-type]
    for dataset in (folder, packed):
        with pytest.raises(ValueError, match="pictures of 16x16 pixels are smaller than a crop of 17"):
            make(dataset, augment=Augmentation(17))
    with pytest.raises(ValueError, match="pictures of 0x0 pixels"):
        make(folder, size=0)
    with pytest.raises(ValueError, match="only arrays in their own size can be cached; fastcnn pack makes such"):
        make(folder, cache="device")
    with pytest.raises(ValueError, match="only arrays in their own size"):
        make(packed, size=17, cache="device")
    monkeypatch.setattr("fastcnn.data.loading._free", lambda device: 17_000)
    with pytest.raises(ValueError, match="17,664 bytes are to be cached on cpu, where 17,000 are free"):
        make(packed, cache="device")


# Statistics


def test_statistics_of_a_data_set(folder: Dataset, packed: Dataset) -> None:
    expected = Statistics.of(squares(torch.arange(23)))
    assert measure(folder, size=16, workers=2) == measure(packed) == packed.statistics == expected
    assert numpy.allclose(expected.mean, squares(torch.arange(23)).double().mean((0, 1, 2)), rtol=1e-15)
