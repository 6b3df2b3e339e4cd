"""Every kind of data set gives the pictures and labels that were written, or says what is wrong with it."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fastcnn.data import Dataset, ImageError, open_dataset, open_splits, pack
from fastcnn.data.sources import idx

pytest.importorskip("PIL")
from .pictures import picture, png, write_folder, write_idx, write_mnist, write_parquet, write_stl10

pytestmark = pytest.mark.usefixtures("datasets_cache")


def assert_is(dataset: Dataset, split: str, classes: list[str], labels: list[int], pictures: list[Any]) -> None:
    assert (dataset.split, dataset.classes, len(dataset)) == (split, tuple(classes), len(labels))
    assert dataset.labels.tolist() == labels == [dataset.label(index) for index in range(len(dataset))]
    for index, expected in enumerate(pictures):
        image = dataset.image(index)
        assert image.dtype == torch.uint8
        assert numpy.array_equal(image, numpy.broadcast_to(expected, (*expected.shape[:2], 3)))
        assert dataset.shape in (None, image.shape[:2])


# What there is


def test_digits_are_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    pixels, labels = sklearn.load_digits(return_X_y=True)
    found = open_splits("digits")
    assert {split: len(dataset) for split, dataset in found.items()} == {"train": 1437, "validation": 360}
    assert found["validation"].rule == "the last 360 digits"
    both = torch.cat([found["train"].labels, found["validation"].labels])
    assert numpy.array_equal(both, labels)
    expected = numpy.round(pixels[1437].reshape(8, 8, 1) * 255 / 16).astype(numpy.uint8)
    assert_is(found["validation"], "validation", list("0123456789"), labels[1437:].tolist(), [expected])
    assert expected.max() == 255


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path: Path, suffix: str) -> None:
    write_mnist(tmp_path, suffix=suffix)
    found = open_splits(str(tmp_path))
    for first, (split, count) in enumerate({"train": 6, "validation": 3}.items()):
        pictures = [picture(100 * first + number, 7, 5)[..., :1] for number in range(count)]
        assert_is(found[split], split, ["0", "1", "2"], [number % 3 for number in range(count)], pictures)
    assert found["train"].rule == f"the file train-images-idx3-ubyte{suffix} and its labels"


def test_labels_of_idx_files_are_those_that_occur(tmp_path: Path) -> None:
    """EMNIST's letters are 1 to 26, in files with longer names; of a file both plain and compressed, one is read."""
    for name, count in (("train", 6), ("test", 2)):
        images = numpy.stack([picture(number, 7, 5)[..., 0] for number in range(count)])
        write_idx(tmp_path / f"emnist-letters-{name}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"emnist-letters-{name}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"emnist-letters-{name}-labels-idx1-ubyte.gz", numpy.uint8([3, 1, 2, 3, 1, 2][:count]))
    found = open_splits(str(tmp_path))
    assert (found["train"].classes, found["train"].labels.tolist()) == (("1", "2", "3"), [2, 0, 1, 2, 0, 1])
    assert found["validation"].labels.tolist() == [2, 0]
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    with pytest.raises(ValueError, match="several files are images for train: emnist-letters-train"):
        open_splits(str(tmp_path))


def test_fashion_mnist_is_found_where_debian_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "FASHION_MNIST", tmp_path)
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        open_splits("fashion-mnist")
    write_mnist(tmp_path, classes=10, train=20, suffix=".gz")
    found = open_splits("fashion-mnist")
    assert found["train"].classes[9] == "ankle boot"
    assert found["validation"].source == "fashion-mnist"


@pytest.mark.parametrize("inner", ["", "stl10_binary"])
def test_stl10(tmp_path: Path, inner: str) -> None:
    write_stl10(tmp_path / inner)
    found = open_splits(str(tmp_path))
    assert found["train"].classes[4] == "deer"
    for first, (split, count) in enumerate({"train": 10, "validation": 4}.items()):
        pictures = [picture(100 * first + number, 96, 96) for number in range(count)]
        assert_is(found[split], split, list(found["train"].classes), list(range(count)), pictures)
    (tmp_path / inner / "class_names.txt").write_text("\n".join("abcdefghij"))
    assert open_dataset(str(tmp_path)).classes == tuple("abcdefghij")


@pytest.mark.parametrize("validation", ["val", "validation", "test"])
def test_folders_of_splits(tmp_path: Path, validation: str) -> None:
    write_folder(tmp_path / "train", {"dogs": 2, "cats": 3})
    write_folder(tmp_path / validation, {"cats": 1, "dogs": 2}, first=50)
    found = open_splits(str(tmp_path))
    pictures = [picture(number) for number in (2, 3, 4, 0, 1)]
    assert_is(found["train"], "train", ["cats", "dogs"], [0, 0, 0, 1, 1], pictures)
    pictures = [picture(number) for number in (50, 51, 52)]
    assert_is(found["validation"], "validation", ["cats", "dogs"], [0, 1, 1], pictures)
    assert found["validation"].rule == f"the folder {validation}"
    assert found["train"].name(3) == "train/dogs/0000.png"


def test_a_folder_without_splits_is_split_by_names(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cats": 60, "dogs": 60}, width=2, height=2)
    found = open_splits(str(tmp_path))
    names = {split: {dataset.name(i) for i in range(len(dataset))} for split, dataset in found.items()}
    assert len(names["train"] | names["validation"]) == 120
    assert 4 <= len(names["validation"]) <= 24
    assert found["validation"].rule == "a tenth of the pictures, chosen by a hash of their names"
    for number in range(0, 120, 2):
        next(tmp_path.glob(f"*/{number:04d}.png")).unlink()
    for split, dataset in open_splits(str(tmp_path)).items():
        assert {dataset.name(i) for i in range(len(dataset))} <= names[split]


def test_folders_are_searched_to_the_bottom(tmp_path: Path, logged: list[str]) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b/deep/deeper": 1, "c": 0})
    write_folder(tmp_path / "elsewhere", {"c": 2}, first=9)
    (tmp_path / "train/c/link").symlink_to(tmp_path / "elsewhere/c")
    for name, target in (("loop", "train/c"), ("up", "train"), ("top", ".")):
        (tmp_path / "train/c" / name).symlink_to(tmp_path / target)
    (tmp_path / "train/itself").symlink_to(tmp_path / "train/itself")
    (tmp_path / "train/a/.hidden").mkdir()
    (tmp_path / "train/a/.hidden/x.png").write_bytes(png(picture(8)))
    (tmp_path / "train/a/notes.txt").write_text("no picture")
    (tmp_path / "train/a/.hidden.png").write_text("no picture")
    (tmp_path / "train/a/PHOTO.JPG").write_bytes(png(picture(7)))
    dataset = open_dataset(str(tmp_path))
    assert [dataset.name(i) for i in range(5)] == [
        "train/a/0000.png",
        "train/a/PHOTO.JPG",
        "train/b/deep/deeper/0001.png",
        "train/c/link/0009.png",
        "train/c/link/0010.png",
    ]
    assert dataset.labels.tolist() == [0, 0, 1, 2, 2]
    assert logged == [f"{tmp_path}/train: 1 files that are no pictures by their names are ignored"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "train", {"a/closed": 1, "b": 1})
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        open_splits(str(tmp_path))


def test_no_class_is_held_out_as_a_whole(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"class{number}": 1 for number in range(40)}, width=2, height=2)
    assert list(open_splits(str(tmp_path))) == ["train"]


def test_labels_that_are_kept_secret_are_no_validation_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [ONE] * 40, [0, 1] * 20, ["a", "b"])
    write_parquet(tmp_path / "test.parquet", [ONE] * 3, [-1] * 3, ["a", "b"])
    found = open_splits(str(tmp_path))
    assert sum(map(len, found.values())) == 40
    assert "hash" in found["validation"].rule


def test_parquet_with_the_features_of_datasets(tmp_path: Path) -> None:
    images = [{"bytes": png(picture(number)), "path": None} for number in range(7)]
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", images[:3], [1, 0, 1], ["cats", "dogs"])
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", images[3:5], [0, 0], ["cats", "dogs"])
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", images[5:], [1, 1], ["cats", "dogs"])
    found = open_splits(str(tmp_path))
    assert_is(found["train"], "train", ["cats", "dogs"], [1, 0, 1, 0, 0], [picture(number) for number in range(5)])
    assert_is(found["validation"], "validation", ["cats", "dogs"], [1, 1], [picture(5), picture(6)])
    assert found["validation"].rule == "the split test"


def test_parquet_as_others_write_it(tmp_path: Path) -> None:
    """Bytes without features, words for labels, a file beside, and one file for both splits."""
    (tmp_path / "beside.png").write_bytes(png(picture(99)))
    images = [{"bytes": png(picture(number)), "path": "x.png"} for number in range(39)]
    images.append({"bytes": None, "path": str(tmp_path / "beside.png")})
    labels = [("dog", "ant", "cat")[number % 3] for number in range(40)]
    write_parquet(tmp_path / "set.parquet", images, labels, columns=("img", "cls"))
    found = open_splits(str(tmp_path / "set.parquet"))
    seen = {}
    for split, dataset in found.items():
        assert (dataset.split, dataset.classes) == (split, ("ant", "cat", "dog"))
        seen |= {int(dataset.name(i).split()[1]): (dataset, i) for i in range(len(dataset))}
    assert sorted(seen) == list(range(40))
    for row, (dataset, index) in seen.items():
        assert dataset.classes[dataset.label(index)] == labels[row]
        assert numpy.array_equal(dataset.image(index), picture(99 if row == 39 else row))


def test_a_hub_is_asked_for_what_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    images = [{"bytes": png(picture(number)), "path": None} for number in range(4)]
    write_parquet(tmp_path / "x.parquet", images, [0, 1, 0, 1], ["a", "b"])
    asked = []

    def load_dataset(name: str, *args: Any, real: Any = datasets.load_dataset, **options: Any) -> Any:
        asked.append(name)
        if name == "owner/missing":
            raise ConnectionError("cannot be reached")
        return real("parquet", data_files={"train": str(tmp_path / "x.parquet"), "test": str(tmp_path / "x.parquet")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert_is(open_dataset("owner/name"), "train", ["a", "b"], [0, 1, 0, 1], [picture(number) for number in range(4)])
    with pytest.raises(FileNotFoundError, match=r"owner/missing: no such folder.*cannot be reached"):
        open_splits("owner/missing")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileNotFoundError, match="photos/trian"):
        open_splits("photos/trian")
    assert asked == ["owner/name", "owner/missing"]


def test_relative_paths_are_those_of_when_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "source/train", {"a": 1, "b": 1})
    monkeypatch.chdir(tmp_path)
    pack("source", "packed", size=16, workers=0)
    found = open_dataset("source"), pickle.dumps(open_dataset("packed"))
    monkeypatch.chdir("/")
    assert numpy.array_equal(found[0].image(1), picture(1))
    assert len(pickle.loads(found[1]).image(1)) == 16


def test_pictures_that_cannot_be_read_raise_when_asked_for(tmp_path: Path) -> None:
    files = write_folder(tmp_path / "train", {"a": 3, "b": 1})
    files[0].write_bytes(files[0].read_bytes()[:-20])
    files[1].unlink()
    os.mkfifo(files[2].with_name("0002x.png"))
    dataset = open_dataset(str(tmp_path))
    files[2].unlink()
    for index in range(3):
        with pytest.raises(ImageError, match=rf"{dataset.name(index)}"):
            dataset.image(index)
    images = [{"bytes": png(picture(0))[:-30], "path": None}, {"bytes": None, "path": None}, None]
    write_parquet(tmp_path / "validation.parquet", images, [0, 1, 1], ["a", "b"])
    dataset = open_dataset(str(tmp_path / "validation.parquet"))
    for index in range(len(dataset)):
        with pytest.raises(ImageError, match=rf"row {dataset.name(index).split()[1]} of train"):
            dataset.image(index)


# What is wrong


def mnist_with(file: str, content: Callable[[bytes], bytes | None]) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        write_mnist(root)
        damaged = content((root / file).read_bytes())
        (root / file).unlink() if damaged is None else (root / file).write_bytes(damaged)
        return str(root)

    return make


def folder(**counts: int) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        write_folder(root / "train", counts)
        return str(root)

    return make


def parquet(images: Any, labels: Any, **options: Any) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        write_parquet(root / "train.parquet", images, labels, **options)
        return str(root)

    return make


def stl10(size: int) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        write_stl10(root)
        with open(root / "train_X.bin", "r+b") as file:
            file.truncate(size)
        return str(root)

    return make


def validation_classes(root: Path) -> str:
    write_folder(root / "train", {"a": 1, "b": 1})
    write_folder(root / "val", {"a": 1, "zebra": 1})
    return str(root)


def file_of_text(root: Path) -> str:
    (root / "x.txt").write_text("pictures")
    return str(root / "x.txt")


def too_few_labels(root: Path) -> str:
    write_mnist(root)
    write_idx(root / "train-labels-idx1-ubyte", numpy.arange(5, dtype=numpy.uint8) % 3)
    return str(root)


def words(root: Path) -> str:
    write_parquet(root / "[train].parquet", [ONE] * 2, ["cat", "dog"])  # no pattern
    (root / "[train].parquet").rename(root / "train-[0].parquet")
    write_parquet(root / "test.parquet", [ONE], ["zebra"])
    return str(root)


def truncated_parquet(root: Path) -> str:
    parquet([ONE] * 4, [0, 1, 0, 1], names=["a", "b"])(root)
    data = (root / "train.parquet").read_bytes()
    (root / "train.parquet").write_bytes(data[: len(data) // 2])
    return str(root)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
ONE = {"bytes": png(picture(0)), "path": None}
WRONG: dict[str, tuple[Callable[[Path], str], type[Exception], str]] = {
    "missing": (lambda root: str(root / "nothing"), FileNotFoundError, "nothing: there is no such file"),
    "empty folder": (str, ValueError, "holds no data set"),
    "another file": (file_of_text, ValueError, "x.txt: not a data set"),
    "one class": (folder(cats=3), ValueError, r"at least two classes, but found \['cats'\]"),
    "empty class": (folder(cats=3, dogs=0, mice=0), ValueError, "no pictures of 2 classes: dogs, mice"),
    "no pictures": (folder(cats=0, dogs=0), ValueError, "there are no pictures"),
    "class of validation": (validation_classes, ValueError, "classes that train does not have: zebra"),
    "idx that shrank": (mnist_with(IMAGES, lambda data: data[:-1]), ValueError, f"{IMAGES}: has 209 bytes of data"),
    "idx that grew": (mnist_with(IMAGES, lambda data: data + b"x"), ValueError, f"{IMAGES}: has 211 bytes of data"),
    "idx of another kind": (mnist_with(LABELS, lambda data: b"\0\0\x0d" + data[3:]), ValueError, "not an idx file"),
    "idx without labels": (
        mnist_with(LABELS, lambda data: None),
        FileNotFoundError,
        f"{IMAGES} is there, but its labels",
    ),
    "too few labels": (too_few_labels, ValueError, "6 pictures, but 5 labels"),
    "labels of 255": (
        mnist_with("t10k-labels-idx1-ubyte", lambda data: data[:-1] + b"\xff"),
        ValueError,
        "no pictures of 1 classes: 255",
    ),
    "STL-10 that shrank": (stl10(27_000), ValueError, "has 27,000 bytes, which is not a multiple of 27,648"),
    "STL-10 with fewer": (stl10(27_648), ValueError, "1 pictures, but 10 labels"),
    "labels of parquet": (
        parquet([ONE] * 3, [0, -1, 1], names=["a", "b"]),
        ValueError,
        "1 labels are out of range: the one of picture 1 is -1, and there are 2 classes",
    ),
    "label that is too large": (parquet([ONE] * 2, [0, 2**60]), ValueError, f"has the label {2**60}, but only 2 pict"),
    "words that are no class": (words, ValueError, "labels that are no class of training: zebra"),
    "numbers for pictures": (parquet([3] * 2, [0, 1]), ValueError, "the column 'image' does not hold pictures"),
    "no name": (lambda root: "", ValueError, "data is empty"),
    "labels missing": (parquet([ONE] * 3, [0, None, 1]), ValueError, "does not hold a label in each row"),
    "labels that are none": (parquet([ONE] * 2, [0.5, 1.5]), ValueError, "does not hold a label in each row"),
    "no column of labels": (parquet([ONE], [0], columns=("image", "x")), ValueError, "columns image, x holds labels"),
    "no column of images": (parquet([ONE], [0], columns=("x", "label")), ValueError, "columns x, label holds pictures"),
    "truncated parquet": (truncated_parquet, ValueError, "train.parquet: cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_data_set(tmp_path: Path, case: str) -> None:
    make, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        open_splits(make(tmp_path))


def test_splits_that_there_are_not(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="has no split 'validation', only train"):
        open_dataset(str(tmp_path), "validation")
    with pytest.raises(ValueError, match="must be one of train, validation, not 'test'"):
        open_dataset(str(tmp_path), "test")


@pytest.mark.parametrize(("package", "data"), [("sklearn", "digits"), ("datasets", "x.parquet")])
def test_packages_that_are_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, data: str
) -> None:
    write_parquet(tmp_path / "x.parquet", [ONE], [0], ["a", "b"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.setitem(__import__("sys").modules, f"{package}.datasets", None)
    with pytest.raises(ImportError, match=r"pip install fastcnn\[data\]"):
        open_splits(data)


# Packed sets


@pytest.fixture(params=["npy", "parquet"])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_folder(tmp_path / "source/train", {"a": 2, "b": 1})
    write_folder(tmp_path / "source/val", {"a": 1}, first=9)
    pack(str(tmp_path / "source"), tmp_path / "packed", size=16, format=request.param, workers=0)
    return tmp_path / "packed"


def test_packed_files_must_be_as_they_were_written(packed: Path) -> None:
    file = next(path for path in sorted(packed.rglob("train-0*")))
    written = file.read_bytes()
    for content, message in (
        (written + b"x", f"has {len(written) + 1:,} bytes"),
        (written[:-9], "has"),
        (None, "is missing"),
    ):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file.name}: {message}.*, and had {len(written):,} when it was packed"):
            open_splits(str(packed))


def test_packed_sets_of_other_versions_are_refused(packed: Path) -> None:
    manifest = packed / "packed.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="was packed as version 2, and this is version 1"):
        open_splits(str(packed))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"version": 1}'])
def test_damaged_manifests_are_refused(packed: Path, content: bytes) -> None:
    (packed / "packed.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"packed/packed\.json: is not that of a packed set"):
        open_splits(str(packed))


def test_arrays_of_another_shape_or_kind_are_refused(packed: Path) -> None:
    file = packed / "train-00000.npy"
    if not file.exists():
        return
    written = file.read_bytes()
    for changed in (written.replace(b"16, 16, 3", b"16, 3, 16"), written.replace(b"|u1", b"|i1"), b"x" + written[1:]):
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"not pictures of 16x16|has files that numpy cannot read"):
            open_splits(str(packed))


def test_packed_sets_know_their_splits_and_statistics(packed: Path) -> None:
    found = open_splits(str(packed))
    assert [(split, len(dataset), dataset.rule) for split, dataset in found.items()] == [
        ("train", 3, "the folder train"),
        ("validation", 1, "the folder val"),
    ]
    for dataset in found.values():
        assert dataset.shape == (16, 16)
        assert dataset.statistics is not None
        assert dataset.statistics.pixels == 3 * 16 * 16
    shutil.rmtree(packed.parent / "source")
    assert open_dataset(str(packed)).image(0).shape == (16, 16, 3)


def test_a_pickled_packed_set_is_its_file_names(packed: Path) -> None:
    from multiprocessing.reduction import ForkingPickler

    dataset = open_dataset(str(packed))
    pickled = bytes(ForkingPickler.dumps(dataset))
    again = ForkingPickler.loads(pickled)
    assert all(torch.equal(again.image(index), dataset.image(index)) for index in range(3))
    if not dataset.decodes:
        assert dataset.image(0).numpy().tobytes() not in pickled
        assert not any(array.is_shared() for array in dataset.arrays)  # type: ignore[attr-defined]
