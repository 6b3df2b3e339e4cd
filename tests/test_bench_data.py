"""``fastcnn bench data``: what is read, by whom, and that nothing wrong has figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from narrow import assert_readable
from rich.console import Console
from typer.testing import CliRunner, Result

from fastcnn.bench import data
from fastcnn.bench.data import BARE, LOADER, DataRow, add_figures, data_table, make_sources, measure_source
from fastcnn.cli import app
from fastcnn.data import Dataset, loading, open_dataset, photographs
from tools import readme

pytest.importorskip("PIL")
pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Dataset]:
    return make_sources(tmp_path, 12, 0)


def data_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "data", *map(str, arguments)], env={"COLUMNS": "80", "TERM": "dumb"})


def text_of(rows: list[DataRow]) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(data_table(rows))
    return capture.get()


def test_sources_are_the_same_pictures(sources: dict[str, Dataset]) -> None:
    original, *scaled = sources.values()
    assert [len(dataset) for dataset in sources.values()] == [12] * 4
    shapes = {tuple(original.image(index).shape) for index in range(12)}
    assert shapes <= {(375, 500, 3), (500, 375, 3), (333, 500, 3)}
    for index in range(12):
        folder, parquet, npy = (dataset.image(index).int() for dataset in scaled)
        assert torch.equal(folder, parquet)
        assert (npy - parquet).abs().float().mean() < 5  # JPEG
    assert len({dataset.image(index).numpy().tobytes() for index in range(12) for dataset in (original,)}) == 12
    assert photographs(8).shape[0] == len(original.classes)


@pytest.mark.parametrize("workers", [0, 2])
def test_everyone_reads_every_picture(
    sources: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    for name, dataset in sources.items():
        rows = measure_source(name, dataset, batch=5, pictures=12, workers=workers, repeats=2)
        providers = list(data.PROVIDERS) if dataset.decodes else [LOADER]
        assert [row.provider for row in rows] == providers
        for row in rows:
            assert row.processes == (workers if dataset.decodes else 0)
            if row.failure is not None:
                assert row.failure.startswith("not installed")
                continue
            assert (row.pictures, row.n) == (12, 2)
            assert 0 < (row.q1 or 0) <= (row.pictures_per_s or 0) <= (row.q3 or 0)
            assert (row.of_bare is None) != dataset.decodes
    decoded: list[int] = []
    monkeypatch.setattr(data.Decoding, "__getitem__", lambda self, indices: decoded.extend(indices.tolist()) or 0)
    run = data.PROVIDERS[BARE](dataset := sources["folder, JPEG of 256x256"], data.Order(len(dataset), 5), 0)
    run(1)
    assert sorted(decoded) == list(range(12))


def test_wrong_pictures_have_no_figures(sources: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    real = loading.centre_square
    monkeypatch.setattr(loading, "centre_square", lambda pixels, size: numpy.flip(real(pixels, size)))
    (name, dataset), *_ = sources.items()
    rows = measure_source(name, dataset, batch=5, pictures=12, workers=0, repeats=1)
    assert "is not what it should be" in (rows[0].failure or "")
    assert rows[0].pictures_per_s is None
    assert rows[1].of_bare == 1
    assert "failed" in text_of(rows)


def test_rivals_that_decode_something_else_have_no_figures(
    sources: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"turned": lambda file: torch.zeros(3, 256, 256), "black": lambda file: numpy.zeros((256, 256, 3))}
    for name, decode in wrong.items():
        monkeypatch.setitem(data.PROVIDERS, name, data._alone(decode))
    rows = measure_source("x", sources["folder, JPEG of 256x256"], batch=5, pictures=12, workers=0, repeats=1)
    found = {row.provider: row for row in rows}
    assert all("is not what it should be" in (found[name].failure or "") for name in wrong)


def test_figures_follow_from_the_rates() -> None:
    row = DataRow("folder", LOADER, 2, 8)
    add_figures(row, [100.0, 300.0, 200.0], [200.0, 300.0, 800.0])
    assert (row.pictures_per_s, row.q1, row.q3, row.n, row.of_bare) == (200, 150, 250, 3, 0.5)
    shown = text_of([row, DataRow("folder", BARE, 2, 8, failure="not installed: no module")])
    assert "folder; 2 processes" in shown
    assert f"{LOADER} 200 150 to 250 0.50" in " ".join(shown.split())


def test_tables_of_the_results_are_readable() -> None:
    rows = readme.read_data_rows(readme.documents("data")[0])
    assert {row.provider for row in rows} == set(data.PROVIDERS)
    for source in dict.fromkeys(row.source for row in rows):
        mine = [row for row in rows if row.source == source]
        assert_readable(text_of(mine), source, *(row.provider for row in mine))


def test_the_command_prints_tables_and_writes_a_file(tmp_path: Path) -> None:
    options: tuple[Any, ...] = ("--pictures", 9, "--batch", 4, "--workers", 1, "--repeats", 1, "--out", tmp_path)
    result = data_command(*options)
    assert result.exit_code == 0, result.output
    titles = ("folder, JPEG of 256x256; 1 process", "packed, npy; no process of its own", "pictures/s")
    assert_readable(result.stdout, *titles, LOADER, BARE)
    document = json.loads((tmp_path / "data.json").read_text())
    assert len({row["source"] for row in document["rows"]}) == 4
    assert document["header"]["threads"] == torch.get_num_threads()
    result = data_command("--data", "digits", *options)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "data.json").read_text())["rows"]
    assert (row["source"], row["provider"], row["processes"], row["pictures"]) == ("digits", LOADER, 0, 9)
    assert open_dataset("digits").shape == (8, 8)


@pytest.mark.parametrize("options", [("--data", "nothing"), ("--pictures", 0), ("--workers", -1)])
def test_the_command_refuses(options: tuple[object, ...]) -> None:
    result = data_command(*options)
    assert result.exit_code == 2
    assert str(options[0]) in result.output
