"""The command ``fastcnn pack``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .data import pack as write_packed
from .data.packing import FORMATS
from .data.sources import KINDS

SHOWN = 10  # skipped pictures


def pack(
    source: Annotated[str, typer.Argument(help=f"{KINDS[0].upper()}{KINDS[1:]}.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write, which must not be there.", show_default=False)],
    size: Annotated[int, typer.Option(min=1, help="Height and width, in pixels.")] = 256,
    format: Annotated[
        str, typer.Option(help="npy: pixels, the fastest; parquet: JPEG files, a tenth as large.")
    ] = "npy",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG files.")] = 95,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes; one per CPU.")] = None,
) -> None:
    """Decode a data set once: the short side scaled to --size, the centre cropped.

    When interrupted, the same command goes on. Pictures that cannot be decoded are left out and named. The mean,
    deviation and principal components of the training pictures' colours are computed on the way.
    """
    if format not in FORMATS:
        raise typer.BadParameter(f"{format!r} is not one of {', '.join(FORMATS)}", param_hint="--format")
    rate = TextColumn("{task.fields[rate]}")
    began, first = time.monotonic(), None
    with Progress(BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, rate="")

        def progress(done: int, of: int) -> None:
            nonlocal first
            first = done if first is None else first  # was done before
            speed = (done - first) / (time.monotonic() - began)
            bar.update(task, completed=done, total=of, rate=f"{speed:,.0f} pictures/s" if speed else "")

        try:
            packed = write_packed(
                source, out, size=size, format=format, quality=quality, workers=workers, progress=progress
            )
        except (FileNotFoundError, FileExistsError, ValueError, ImportError) as error:
            raise typer.BadParameter(printable(str(error))) from None
        except (OSError, RuntimeError, MemoryError) as error:
            what = f"{printable(str(error) or type(error).__name__)}. The same command goes on with what is missing."
            bar.console.print(what, style="red", markup=False, highlight=False)
            raise typer.Exit(1) from None
    _print(packed, out)


def printable(text: str) -> str:
    """With escapes in place of control characters, and of bytes that are no text."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _print(packed: dict, out: Path) -> None:
    console = Console(highlight=False)
    table = Table("split", box=None)
    for heading in ("pictures", "skipped", "MB"):
        table.add_column(heading, justify="right")
    for split, part in packed["splits"].items():
        size = sum(part["files"].values()) / 1e6
        table.add_row(split, f"{part['pictures']:,}", f"{len(part['skipped']):,}", f"{size:,.1f}")
    console.print(table)
    if packed["statistics"]:
        for name in ("mean", "std"):
            console.print(f"{name}: {', '.join(f'{value:.3f}' for value in packed['statistics'][name])}")
    for split, part in packed["splits"].items():
        for _, why in part["skipped"][:SHOWN]:
            console.print(f"skipped: {escape(printable(why))}", style="yellow", soft_wrap=True)
        if len(part["skipped"]) > SHOWN:
            console.print(f"skipped of {split}: {len(part['skipped']) - SHOWN:,} more, see packed.json", style="yellow")
    console.print(f"written: {escape(printable(str(out)))}", soft_wrap=True)
