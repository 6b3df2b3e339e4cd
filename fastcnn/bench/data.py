"""How many pictures a second a loader gives, beside decoding alone by as many processes.

Providers of a source take turns, an epoch each; their processes live as long as the measurement.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.text import Text
from torch.utils.data import DataLoader

from ..data import Dataset, Order, loader, open_dataset, pack, read_image
from ..data.dataset import Encoded
from ..data.images import centre_square
from ..data.workers import same
from .report import new_table, number
from .rows import quartiles
from .workload import reason

PHOTOGRAPHS = "photographs"
SIDES = ((500, 375), (375, 500), (500, 333))  # as ImageNet's are on average
LOADER = "fastcnn"
BARE = "Pillow, decoding alone"


@dataclass
class DataRow:
    """One provider of one source; without figures where ``failure`` says why. ``of_bare`` is its rate by Pillow's."""

    source: str
    provider: str
    processes: int
    pictures: int
    failure: str | None = None
    pictures_per_s: float | None = None
    q1: float | None = None
    q3: float | None = None
    n: int = 0
    of_bare: float | None = None


def make_sources(folder: Path, pictures: int, workers: int) -> dict[str, Dataset]:
    """Data sets made of the four photographs: cut-outs as JPEG files, and the same once packed."""
    original = folder / "original"
    write_photographs(original, pictures)
    pack(str(original), folder / "npy", workers=workers)
    pack(str(original), folder / "parquet", format="parquet", workers=workers)
    rows = open_dataset(str(folder / "parquet"))
    assert isinstance(rows, Encoded)
    for index in range(len(rows)):
        file = folder / "scaled" / "train" / rows.classes[rows.label(index)] / f"{index:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(rows.file(index).read())  # type: ignore[union-attr]
    return {
        "folder, JPEG of about 500x375": open_dataset(str(original)),
        "folder, JPEG of 256x256": open_dataset(str(folder / "scaled")),
        "packed, parquet with JPEG": rows,
        "packed, npy": open_dataset(str(folder / "npy")),
    }


def write_photographs(folder: Path, pictures: int) -> None:
    """JPEG files of quality 90, each another part of a photograph, in a class per photograph below ``train``."""
    from PIL.Image import Resampling

    photographs = [read_image(path) for path in sorted((Path(__file__).parents[1] / "data/photographs").glob("*.jpg"))]
    draw = random.Random(0)
    for index in range(pictures):
        photograph, side = photographs[index % len(photographs)], draw.choice(SIDES)
        width = min(photograph.width, photograph.height * side[0] / side[1]) * draw.uniform(0.6, 1)
        height = width * side[1] / side[0]
        left, top = draw.uniform(0, photograph.width - width), draw.uniform(0, photograph.height - height)
        file = folder / "train" / str(index % len(photographs)) / f"{index:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        part = photograph.resize(side, Resampling.BICUBIC, (left, top, left + width, top + height))
        part.save(file, quality=90)


def measure_source(name: str, dataset: Dataset, batch: int, pictures: int, workers: int, repeats: int) -> list[DataRow]:
    """A row for each provider: fastcnn's loader without augmentation, and who decodes alone, if there is what to
    decode."""
    order = Order(min(pictures, len(dataset)), batch)
    epochs: dict[str, Callable[[int], int]] = {}
    rows: dict[str, DataRow] = {}
    for provider, make in PROVIDERS.items():
        if provider != LOADER and not isinstance(dataset, Encoded):
            continue
        processes = workers if dataset.decodes else 0
        rows[provider] = DataRow(name, provider, processes, order.pictures)
        try:
            epochs[provider] = make(dataset, order, processes)
            epochs[provider](0)  # the warm-up
        except ImportError as error:
            rows[provider].failure = f"not installed: {error}"
        except Exception as error:
            rows[provider].failure = reason(error)
            epochs.pop(provider, None)
    rates: dict[str, list[float]] = {provider: [] for provider in epochs}
    order_of_turns, shuffle = list(epochs), random.Random(0).shuffle
    for epoch in range(1, repeats + 1):
        shuffle(order_of_turns)
        for provider in order_of_turns:
            before = time.perf_counter()
            done = epochs[provider](epoch)
            rates[provider].append(done / (time.perf_counter() - before))
    for provider, found in rates.items():
        add_figures(rows[provider], found, rates.get(BARE))
    return list(rows.values())


def add_figures(row: DataRow, rates: Sequence[float], bare: Sequence[float] | None) -> None:
    """Fill in the median, the quartiles, and the median of the ratios to decoding alone in the same round."""
    row.n, row.pictures_per_s = len(rates), statistics.median(rates)
    row.q1, row.q3 = quartiles(rates)
    if bare is not None:
        row.of_bare = statistics.median(rate / other for rate, other in zip(rates, bare, strict=True))


def data_table(rows: Sequence[DataRow]) -> Group:
    """The rows of a source."""
    first = rows[0]
    table = new_table(f"{first.source}; {who(first.processes)}", "pictures/s", "quartiles", "of Pillow's")
    for row in rows:
        if row.failure is None:
            figures = f"{row.pictures_per_s:,.0f}", f"{row.q1:,.0f} to {row.q3:,.0f}", number(row.of_bare, 2)
        else:
            figures = ("not installed" if row.failure.startswith("not installed") else "[red]failed[/red]", "", "")
        table.add_row(row.provider, *figures, style="bold" if row.provider == LOADER else "")
    notes = [f"{row.provider}: {row.failure}" for row in rows if row.failure is not None]
    return Group(table, *(Text(note, style="red") for note in notes))


def who(processes: int) -> str:
    """In words, who reads."""
    return f"{processes} process{'es' if processes > 1 else ''}" if processes else "no process of its own"


# Who takes part: each makes a function that reads an epoch and says how many pictures it has read.


def _loader(dataset: Dataset, order: Order, workers: int) -> Callable[[int], int]:
    import numpy

    loaded = loader(dataset, order.batch, workers=workers, size=256)
    loaded.order = order
    first = next(loaded.epoch(0))
    for picture, index in zip(first.images, first.indices.tolist(), strict=True):
        if not numpy.array_equal(picture, centre_square(dataset.pixels(index), 256)):
            raise AssertionError(f"picture {index} is not what it should be")
    return lambda epoch: sum(len(batch.indices) for batch in loaded.epoch(epoch))


class Decoding(torch.utils.data.Dataset):
    """Batches of pictures that are decoded and thrown away."""

    def __init__(self, dataset: Encoded, decode: Callable[[Any], object]) -> None:
        self.dataset, self.decode = dataset, decode

    def __getitem__(self, indices: torch.Tensor) -> int:
        for index in indices.tolist():
            self.decode(self.dataset.file(index))
        return len(indices)


class Epochs(torch.utils.data.Sampler[torch.Tensor]):
    """The batches of the epoch that is set."""

    epoch = 0

    def __init__(self, order: Order) -> None:
        self.order = order

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.order.epoch(self.epoch))


def _alone(decode: Callable[[Any], object]) -> Callable[[Dataset, Order, int], Callable[[int], int]]:
    def make(dataset: Dataset, order: Order, workers: int) -> Callable[[int], int]:
        assert isinstance(dataset, Encoded)
        _check_decoded(decode(dataset.file(0)), dataset)
        epochs = Epochs(order)
        reading = DataLoader(
            Decoding(dataset, decode),
            None,
            sampler=epochs,
            num_workers=workers,
            collate_fn=same,
            persistent_workers=workers > 0,
        )

        def run(epoch: int) -> int:
            epochs.epoch = epoch
            return sum(reading)

        return run

    return make


def _check_decoded(decoded: Any, dataset: Dataset) -> None:
    """Whether it is the first picture, where it is kept; decoders round differently."""
    if decoded is not None:
        pixels = torch.as_tensor(decoded.copy() if hasattr(decoded, "copy") else decoded.permute(1, 2, 0))
        expected = dataset.image(0)
        if pixels.shape != expected.shape or (pixels.float() - expected).abs().mean() > 1:
            raise AssertionError("the first picture is not what it should be")


def _pillow(file: Any) -> None:
    from PIL import Image

    with Image.open(file) as image:
        image.load()


def _pillow_array(file: Any) -> object:
    import numpy
    from PIL import Image

    with Image.open(file) as image:
        return numpy.asarray(image.convert("RGB"))


def _torchvision(file: Any) -> object:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    data = (
        torch.frombuffer(bytearray(file.read()), dtype=torch.uint8) if hasattr(file, "read") else read_file(str(file))
    )
    return decode_jpeg(data, ImageReadMode.RGB)


PROVIDERS: dict[str, Callable[[Dataset, Order, int], Callable[[int], int]]] = {
    LOADER: _loader,
    BARE: _alone(_pillow),
    "Pillow, to arrays": _alone(_pillow_array),
    "torchvision, to tensors": _alone(_torchvision),
}
