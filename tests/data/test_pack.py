"""Packing: the right pixels and sums, the same bytes however often it is interrupted, nothing that is half there."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.nn.functional import interpolate
from typer.testing import CliRunner, Result

from fastcnn.cli import app
from fastcnn.data import ImageError, Statistics, open_dataset, open_splits, pack, packing, photographs
from fastcnn.data.colours import total
from fastcnn.data.images import centre_square
from fastcnn.data.packing import Packing

Image = pytest.importorskip("PIL.Image")
from .pictures import picture, png, write_folder, write_mnist  # noqa: E402

pytestmark = pytest.mark.usefixtures("datasets_cache")

Tree = dict[str, bytes]


def tree(folder: Path) -> Tree:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Four shards, two of the training split, with two broken pictures."""
    monkeypatch.setattr("fastcnn.data.packing.SHARD", 8)
    files = write_folder(tmp_path / "source/train", {"a": 7, "b": 6})
    write_folder(tmp_path / "source/val", {"a": 5, "b": 6}, first=100)
    files[2].write_bytes(b"no picture")
    files[9].write_bytes(files[9].read_bytes()[:-40])
    return str(tmp_path / "source")


# What is packed


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_pictures_labels_and_rules_are_those_of_the_source(tmp_path: Path, source: str, format: str) -> None:
    packed = pack(source, tmp_path / "out", size=16, format=format, quality=100, workers=0)
    for split, dataset in open_splits(str(tmp_path / "out")).items():
        before = open_splits(source)[split]
        good = [index for index in range(len(before)) if not (split == "train" and index in (2, 9))]
        assert (dataset.classes, dataset.rule) == (before.classes, before.rule)
        assert dataset.labels.tolist() == before.labels[good].tolist()
        for place, index in enumerate(good):
            expected, got = centre_square(before.pixels(index), 16).astype(int), dataset.image(place).numpy()
            if format == "npy":
                assert numpy.array_equal(expected, got)
            else:  # of noise, JPEG leaves little
                assert numpy.corrcoef(expected.ravel(), got.ravel())[0, 1] > 0.4
    assert [name for name, _ in packed["splits"]["train"]["skipped"]] == ["train/a/0002.png", "train/b/0009.png"]
    assert "not an image" in packed["splits"]["train"]["skipped"][0][1]
    assert (packed["splits"]["train"]["pictures"], packed["splits"]["validation"]["pictures"]) == (11, 11)
    assert packed == json.loads((tmp_path / "out/packed.json").read_text())


def test_parquet_is_a_data_set_of_datasets(tmp_path: Path, source: str) -> None:
    import datasets

    pack(source, tmp_path / "out", size=16, format="parquet", workers=0)
    found = datasets.load_dataset(str(tmp_path / "out"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 11, "validation": 11}
    assert isinstance(found["train"].features["image"], datasets.Image)
    assert found["train"].features["label"].names == ["a", "b"]
    assert found["train"][0]["image"].size == (16, 16)
    assert found["train"][0]["image"].format == "JPEG"


def test_the_short_side_is_scaled_and_the_centre_cropped() -> None:
    """Rounded once in each direction, as Pillow does; rounding the exact result alone is off by 0.29."""
    for photograph in photographs(300):
        pixels = photograph.permute(1, 2, 0)[20:250].numpy()  # 230 x 300
        square = torch.from_numpy(pixels[:, 35:265].copy())
        planes = square.permute(2, 0, 1)[None].double()
        exact = interpolate(planes, (128, 128), mode="bicubic", antialias=True).clamp(0, 255)[0].permute(1, 2, 0)
        difference = centre_square(pixels, 128) - exact.numpy()
        assert (difference**2).mean() ** 0.5 < 0.37
        assert numpy.abs(difference).max() < 3
    assert numpy.array_equal(centre_square(pixels, 230), square)


def test_small_and_long_pictures_are_scaled_up_and_cut(tmp_path: Path) -> None:
    """Also one of which the whole, scaled, would have 4 billion pixels."""
    write_folder(tmp_path / "source/train", {"a": 1, "b": 1}, width=3, height=2)
    Image.new("L", (65_000, 1), 77).save(tmp_path / "source/train/a/long.png")
    pack(str(tmp_path / "source"), tmp_path / "out", size=256, workers=0)
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.shape == (256, 256)
    assert dataset.image(1).eq(77).all()


# Sums


def exact(pixels: Any) -> tuple[Any, Any, Any]:
    x = pixels.reshape(-1, 3).astype(numpy.longdouble)
    mean = x.mean(0)
    return mean, x.std(0), (x - mean).T @ (x - mean) / len(x)


def test_statistics_are_those_of_the_pixels() -> None:
    pixels = photographs(64).permute(0, 2, 3, 1).numpy()
    got = total(Statistics.of(torch.from_numpy(one)) for one in pixels)
    mean, std, covariance = exact(pixels)
    assert got.mean == tuple(float(x) for x in mean)
    assert got.std == pytest.approx([float(x) for x in std], rel=1e-15)
    values, vectors = numpy.linalg.eigh(covariance.astype(float))
    assert got.eigenvalues == pytest.approx(values[::-1].tolist(), rel=1e-12)
    for got_vector, expected in zip(got.eigenvectors, vectors.T[::-1], strict=True):
        assert max(got_vector, key=abs) > 0
        assert numpy.allclose(numpy.asarray(got_vector) * numpy.sign(expected @ got_vector), expected, atol=1e-12)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (7, 7, 9)])
def test_statistics_of_one_colour(colour: tuple[int, int, int]) -> None:
    got = Statistics.of(torch.tensor(colour, dtype=torch.uint8).expand(50, 40, 3))
    assert got.mean == tuple(float(x) for x in colour)
    assert got.std == got.eigenvalues == (0.0, 0.0, 0.0)


def test_statistics_of_grey_have_one_component() -> None:
    got = Statistics.of(torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 3))
    assert got.mean == (127.5,) * 3
    assert got.eigenvalues == pytest.approx((3 * (256**2 - 1) / 12, 0, 0), abs=1e-9)
    assert got.eigenvectors[0] == pytest.approx((3**-0.5,) * 3, rel=1e-15)


def test_sums_are_exact_beyond_float64() -> None:
    half = Statistics(2**40, (2**47 + 1,) * 3, (2**55 + 1,) * 6)
    both = half + Statistics(1, (1, 2, 3), (1, 2, 3, 4, 6, 9))
    assert both.products == tuple(2**55 + 1 + x for x in (1, 2, 3, 4, 6, 9))
    assert both.sums == tuple(2**47 + 1 + x for x in (1, 2, 3))


def test_the_manifest_has_the_statistics_of_the_training_split(tmp_path: Path, source: str) -> None:
    packed = pack(source, tmp_path / "out", size=16, workers=0)
    dataset = open_dataset(str(tmp_path / "out"))
    got = total(Statistics.of(dataset.image(index)) for index in range(len(dataset)))
    assert dataset.statistics == got
    for name in ("mean", "std", "eigenvalues", "eigenvectors"):
        assert json.dumps(packed["statistics"][name]) == json.dumps(getattr(got, name))


# The same bytes


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_the_same_bytes_with_any_number_of_processes(tmp_path: Path, source: str, format: str) -> None:
    trees = []
    for workers in range(4):
        pack(source, tmp_path / str(workers), size=16, format=format, workers=workers)
        trees.append(tree(tmp_path / str(workers)))
    assert trees[1:] == trees[:1] * 3
    assert not list(tmp_path.glob("*.partial*"))


def child(work: Callable[[], object]) -> int:
    """The process id of a fork of this one, which does something and ends: with status 0 if it went well."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        torch.set_num_threads(1)  # the others are not in the fork
        work()
        status = 0
    finally:
        os._exit(status)


def status_of(pid: int) -> int:
    """How a child ended; minus the number of a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(name: str, nth: int, after: bool, work: Callable[[], object]) -> None:
    """Do something, and be killed before or after the nth call of a function of ``os``."""
    real, calls = getattr(os, name), iter(range(1, 10_000))

    def call(*arguments: Any) -> Any:
        number = next(calls)
        result = real(*arguments) if after or number != nth else None
        if number == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, name, call)
    work()


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_killed_at_every_step_and_resumed(tmp_path: Path, source: str, format: str) -> None:
    """Before and after each flush and each renaming, in one packing after the other."""
    options = {"size": 16, "format": format, "workers": 0}
    pack(source, tmp_path / "whole", **options)
    killed = 0
    for name, after in (("fsync", False), ("fsync", True), ("replace", False), ("replace", True), ("rename", False)):
        for nth in range(1, 30):
            out = tmp_path / f"{name}{after}{nth}"
            ended = status_of(child(lambda: killed_at(name, nth, after, lambda: pack(source, out, **options))))  # noqa: B023
            if ended == -signal.SIGKILL:
                killed += 1
                if not out.exists():  # not yet renamed
                    pack(source, out, **options)
            assert tree(out) == tree(tmp_path / "whole")
            if ended == 0:
                break
    assert killed >= 40
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_killed_twice_at_random_moments_and_resumed(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """What workers that outlive their parent still write does no harm."""
    pack(source, tmp_path / "whole", size=16, workers=0)
    draw, out, ended = random.Random(workers), tmp_path / "out", []
    with monkeypatch.context() as patch:
        patch.setattr(packing, "centre_square", lambda *arguments: (time.sleep(0.06), centre_square(*arguments))[1])
        while len(ended) < 2 and not out.exists():
            pid = child(lambda: pack(source, out, size=16, workers=workers))
            time.sleep(draw.uniform(0.05, 0.6 / workers))
            os.kill(pid, signal.SIGKILL)
            ended.append(status_of(pid))
    assert -signal.SIGKILL in ended
    if not out.exists():
        pack(source, out, size=16, workers=workers)
    assert tree(out) == tree(tmp_path / "whole")


# What is refused


def interrupted(source: str, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A packing of which the first two shards are finished."""
    real = Packing.__getitem__

    def fail(self: Packing, index: int) -> OSError | None:
        return real(self, index) if index < 2 else OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Packing, "__getitem__", fail)
        with pytest.raises(OSError, match="No space left"):
            pack(source, out, size=16, workers=0, **options)
    assert not out.exists()


def test_what_was_finished_is_not_done_again(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(source, tmp_path / "out", monkeypatch)
    told: list[tuple[int, int]] = []
    pack(source, tmp_path / "out", size=16, workers=0, progress=lambda *numbers: told.append(numbers))
    assert told == [(13, 24), (21, 24), (24, 24)]
    pack(source, tmp_path / "whole", size=16, workers=0)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def grow(root: Path) -> None:
    with open(root / "train/a/0003.png", "ab") as file:
        file.write(b"x")


def shrink(root: Path) -> None:
    os.truncate(root / "train/a/0003.png", 5)


def add(root: Path) -> None:
    (root / "train/a/0003x.png").write_bytes(png(picture(0)))


def relabel(root: Path) -> None:
    (root / "train/a/0003.png").rename(root / "train/b/0003.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grow, r"train/a/0003.png of .*source has ([\d,]+) bytes, and had .* when it was packed"),
        (shrink, r"train/a/0003.png of .*source has 5 bytes"),
        (add, "begun otherwise .pictures: others were there"),
        (relabel, "begun otherwise .pictures: others were there"),
    ],
)
def test_pictures_that_changed_meanwhile(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], message: str
) -> None:
    interrupted(source, tmp_path / "out", monkeypatch)
    before = tree(tmp_path / "out.partial")
    change(Path(source))
    with pytest.raises(ValueError, match=rf"{message}.*Remove .*out.partial to begin anew"):
        pack(source, tmp_path / "out", size=16, workers=0)
    assert tree(tmp_path / "out.partial") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 17}, "size: 16 then, 17 now"),
        ({"format": "parquet"}, "format: npy then, parquet now; quality: None then, 95 now"),
    ],
)
def test_other_options_do_not_go_on(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    interrupted(source, tmp_path / "out", monkeypatch)
    with pytest.raises(ValueError, match=message):
        pack(source, tmp_path / "out", **{"size": 16, "workers": 0, **options})


def test_orphans_write_nothing(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose parent was killed finds another packing in its place when it has decoded its shard."""
    with monkeypatch.context() as patch:
        patch.setattr(packing, "centre_square", lambda *arguments: (time.sleep(0.1), centre_square(*arguments))[1])
        pid = child(lambda: pack(source, tmp_path / "out", size=24, workers=1))
        time.sleep(0.4)
        os.kill(pid, signal.SIGKILL)
        status_of(pid)
    shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    interrupted(source, tmp_path / "out", monkeypatch)
    before = tree(tmp_path / "out.partial")
    time.sleep(1.2)
    assert tree(tmp_path / "out.partial") == before


def test_what_others_have_put_there_stays(tmp_path: Path, source: str) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine.tmp").write_text("")
    with pytest.raises(FileExistsError, match=r"is there already, and not from packing: .*out\.partial"):
        pack(source, tmp_path / "out", size=16, workers=0)
    assert list(tree(tmp_path / "out.partial")) == ["mine.tmp"]


def test_a_set_of_other_pixels_does_not_go_on(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of files for each picture, but of the same number and labels."""
    for kind in ("mnist", "parquet", "npy"):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        for first in (0, 5):
            shutil.rmtree(tmp_path / "other", ignore_errors=True)
            if kind == "mnist":
                write_mnist(tmp_path / "other", train=24)
                file = tmp_path / "other/train-images-idx3-ubyte"
                file.write_bytes(file.read_bytes()[:-1] + bytes([first]))
            else:
                monkeypatch.setattr("fastcnn.data.packing.SHARD", 512)
                pack(source, tmp_path / "other", size=16 + first, format=kind, workers=0)
            monkeypatch.setattr("fastcnn.data.packing.SHARD", 8)
            if not first:
                interrupted(str(tmp_path / "other"), tmp_path / "out", monkeypatch)
        with pytest.raises(ValueError, match=r"others were there|when it was packed"):
            pack(str(tmp_path / "other"), tmp_path / "out", size=16, workers=0)
        shutil.rmtree(tmp_path / "out.partial")


def test_outputs_that_are_refused_before(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="would be within"):
        pack(source, Path(source, "packed"))
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(ValueError, match="where a disk is mounted"):
        pack(source, tmp_path / "out")


def test_a_class_of_which_nothing_can_be_decoded_is_an_error(tmp_path: Path, source: str) -> None:
    for file in Path(source, "train/b").iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(ImageError, match="no picture can be decoded of 1 classes: b"):
        pack(source, tmp_path / "out", size=16, workers=0)


def test_what_is_there_already_is_not_overwritten(tmp_path: Path, source: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    (tmp_path / "file").write_text("")
    for out in ("out", "file"):
        with pytest.raises(FileExistsError, match=out):
            pack(source, tmp_path / out)
    (tmp_path / "out/mine").unlink()
    pack(source, tmp_path / "out", size=16, workers=0)
    assert len(open_dataset(str(tmp_path / "out"))) == 11


def test_two_at_once_are_refused(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with monkeypatch.context() as patch:
        patch.setattr(packing, "centre_square", lambda *arguments: (os.write(writing, b"x"), time.sleep(60)))
        pid = child(lambda: pack(source, tmp_path / "out", size=16, workers=0))
    os.read(reading, 1)
    with pytest.raises(BlockingIOError, match=r"out\.partial\.lock: another process holds it"):
        pack(source, tmp_path / "out", size=16, workers=0)
    os.kill(pid, signal.SIGKILL)
    status_of(pid)
    pack(source, tmp_path / "out", size=16, workers=0)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_a_full_disk_leaves_what_was_finished(tmp_path: Path, source: str, workers: int, format: str) -> None:
    """A limit of the size of files stands for it: the kernel refuses to write all of the first shard."""
    options = {"size": 16, "format": format, "quality": 50, "workers": workers}
    pack(source, tmp_path / "whole", **options)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "whole").rglob("train-0*"))
    limit = (sizes[0] + sizes[1]) // 2

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError, match="File too large"):
            pack(source, tmp_path / "out", **options)

    assert status_of(child(fill)) == 0
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    for file in (tmp_path / "out.partial").rglob("*-0*.[np]*"):
        assert file.read_bytes() == (tmp_path / "whole" / file.relative_to(tmp_path / "out.partial")).read_bytes()
    pack(source, tmp_path / "out", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_disk_that_is_too_small_is_noticed_before(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_000, 1_000))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="18,432 bytes are needed, and 1,000 are free"):
        pack(source, tmp_path / "out", size=16)


def test_no_picture_that_can_be_read_is_an_error(tmp_path: Path) -> None:
    for file in write_folder(tmp_path / "source/train", {"a": 2, "b": 1}):
        file.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"train: none of 3 pictures can be decoded.*train/a/0000.png.*not an image"):
        pack(str(tmp_path / "source"), tmp_path / "out", workers=0)


def test_a_shard_of_broken_pictures_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcnn.data.packing.SHARD", 2)
    files = write_folder(tmp_path / "source/train", {"a": 4, "b": 2})
    for file in files[2:4]:
        file.write_bytes(b"no picture")
    for format in ("npy", "parquet"):
        pack(str(tmp_path / "source"), tmp_path / format, size=16, format=format, workers=0)
        dataset = open_dataset(str(tmp_path / format))
        assert dataset.labels.tolist() == [0, 0, 1, 1]
        assert [dataset.image(index).shape for index in range(4)] == [(16, 16, 3)] * 4


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"size": 65_536}, {"quality": 0}, {"quality": 101}, {"format": "zip"}]
)
def test_what_pack_refuses(tmp_path: Path, options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        pack("digits", tmp_path / "out", **options)


# The command


def pack_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["pack", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})


def test_the_command_says_what_it_wrote_and_what_it_skipped(tmp_path: Path, source: str) -> None:
    Path(source, "train/a/[bold]x.png").write_bytes(b"")
    result = pack_command(source, tmp_path / "out", "--size", 16, "--workers", 1)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["train", "11", "3", "0.0"] in lines
    assert ["validation", "11", "0", "0.0"] in lines
    assert f"skipped: {source}/train/a/[bold]x.png: " in result.stdout
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.statistics is not None
    assert f"mean: {', '.join(f'{value:.3f}' for value in dataset.statistics.mean)}" in result.stdout


def test_the_command_packs_other_kinds(tmp_path: Path) -> None:
    write_mnist(tmp_path / "source")
    result = pack_command(tmp_path / "source", tmp_path / "out", "--size", 10, "--workers", 0, "--format", "parquet")
    assert result.exit_code == 0, result.output
    assert len(open_dataset(str(tmp_path / "out"), "validation")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "out"), "nothing: there is no such file"),
        (("digits", "out", "--format", "zip"), "'zip' is not one of npy, parquet"),
        (("digits", "out", "--size", "0"), "--size"),
        (("digits", ".", "--size", "8"), "is there already"),
    ],
)
def test_the_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    result = pack_command(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command_says_that_it_can_go_on(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "train\x1b[31m-00000.npy")
    with monkeypatch.context() as patch:
        patch.setattr(Packing, "__getitem__", lambda self, index: full)
        result = pack_command(source, tmp_path / "out", "--size", 16, "--workers", 0)
    assert result.exit_code == 1
    assert r"No space left on device: 'train\x1b[31m-00000.npy'. The same command goes on" in result.output
    assert pack_command(source, tmp_path / "out", "--size", 16, "--workers", 0).exit_code == 0
