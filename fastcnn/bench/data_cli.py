"""The command ``fastcnn bench data``."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from ..data import open_dataset
from ..data.workers import cpus
from .console import print_tables, tracked
from .data import PHOTOGRAPHS, data_table, make_sources, measure_source
from .report import report, write_json


def data(
    data: Annotated[
        str, typer.Option(help="A data set, as of training, or JPEG files made of photographs.")
    ] = PHOTOGRAPHS,
    pictures: Annotated[int, typer.Option(min=1, help="Of an epoch.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Pictures of a batch.")] = 128,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode; one per CPU.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Epochs of each provider.")] = 7,
    out: Annotated[Path, typer.Option(help="Folder for data.json.")] = Path("results"),
) -> None:
    """Measure how fast pictures come in, without augmentation, as 256x256 pixels.

    By default the pictures are parts of photographs, of about 500x375 pixels, as ImageNet's are: as JPEG files in a
    folder, as JPEG files that were scaled once, and packed both ways. "Decoding alone" is Image.open(...).load() of the
    same files in as many processes, which throw the pixels away. The last column says which part of that rate others
    reach: for fastcnn, the share of its time that is decoding. What it gives is checked before any time is taken.
    """
    processes = cpus() if workers is None else workers
    with TemporaryDirectory() as folder:
        if data == PHOTOGRAPHS:
            sources = make_sources(Path(folder), pictures, processes)
        else:
            try:
                sources = {data: open_dataset(data)}
            except (OSError, ValueError, ImportError) as error:
                raise typer.BadParameter(str(error), param_hint="--data") from None
        tables = [
            measure_source(name, sources[name], batch, pictures, processes, repeats) for name in tracked(list(sources))
        ]
    header = report([], command=shlex.join(["fastcnn", *sys.argv[1:]]), source=data)["header"]
    file = out / "data.json"
    write_json(file, {"header": header, "rows": [asdict(row) for rows in tables for row in rows]})
    print_tables(header, [data_table(rows) for rows in tables])
    typer.echo(f"written: {file}", err=True)
