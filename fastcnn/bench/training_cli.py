"""The command ``fastcnn bench training``."""

import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from ..data import open_splits
from ..training import RECIPES
from ..training.job import new_job
from .console import print_tables
from .data import PHOTOGRAPHS, write_photographs
from .report import report, write_json
from .training import compare, measure_training, parity_table, training_table


def training(
    data: Annotated[
        str, typer.Option(help="A data set, as of training, or JPEG files made of photographs.")
    ] = PHOTOGRAPHS,
    model: Annotated[str, typer.Option(help="A name of fastcnn.models.")] = "alexnet",
    recipe: Annotated[str, typer.Option(help=", ".join(RECIPES))] = "alexnet-as-run",
    batch: Annotated[int, typer.Option(min=1, help="Pictures of a step.")] = 128,
    size: Annotated[int | None, typer.Option(min=1, help="Of the images; the model's own.")] = None,
    width: Annotated[float, typer.Option(help="Factor of the model's channels.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Of a provider's turn.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each provider.")] = 5,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode, also in the turns of others.")] = 0,
    check_data: Annotated[str, typer.Option(help="What the networks learn that are compared.")] = "digits",
    check_steps: Annotated[int, typer.Option(min=10, help="Of that.")] = 50,
    out: Annotated[Path, typer.Option(help="Folder for training.json.")] = Path("results"),
) -> None:
    """Measure training, its input included, beside the same loop on torch's layers, which must learn alike before.

    The pictures are parts of photographs, of about 500x375 pixels, as ImageNet's are, as JPEG files in a folder. They
    are decoded by this process, so that each provider's time has the decoding of its own pictures in it.
    """
    if recipe not in RECIPES:
        raise typer.BadParameter(f"{recipe!r} is not one of {', '.join(RECIPES)}", param_hint="--recipe")
    try:
        small, plain = open_splits(check_data), replace(RECIPES["plain"], warmup=0)
        parity = compare(new_job(model, plain, small, input_size=67, width=0.125), small, check_steps)
        with TemporaryDirectory() as folder:
            if data == PHOTOGRAPHS:
                write_photographs(Path(folder), 8 * batch)
            splits = open_splits(folder if data == PHOTOGRAPHS else data)
            chosen = replace(RECIPES[recipe], batch=batch, schedule="steps")
            job = new_job(model, chosen, splits, input_size=size, width=width)
            rows = measure_training(job, splits, steps=steps, rounds=repeats, workers=workers) if parity.passed else []
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise typer.BadParameter(str(error)) from None
    header = report([], command=shlex.join(["fastcnn", *sys.argv[1:]]), source=data)["header"]
    title = f"{model}, recipe {recipe}, batch {batch}, images of {job.input_size}"
    tables = [parity_table(parity), *([training_table(title, rows)] if rows else [])]
    print_tables(header, tables)
    if not parity.passed:
        raise typer.Exit(1)
    file = out / "training.json"
    document = {"header": header, "job": title, "parity": asdict(parity), "rows": [asdict(row) for row in rows]}
    write_json(file, document)
    typer.echo(f"written: {file}", err=True)
