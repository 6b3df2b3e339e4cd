"""What the commands have in common: options among names, a progress bar, tables."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .report import setting

_Case = TypeVar("_Case")


def among(option: str, values: Iterable[str] | None, allowed: Collection[str]) -> list[str]:
    """The values of an option, all of which must be allowed."""
    values = list(values or ())
    for value in values:
        if value not in allowed:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}", param_hint=option)
    return values


def tracked(cases: Sequence[_Case]) -> Iterator[_Case]:
    """The cases, while a bar shows how many are done and which one runs."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            yield case
            progress.advance(task)


def print_tables(header: dict[str, Any], tables: Sequence[RenderableType]) -> None:
    """Under a line that says what the figures were taken on."""
    console = Console(highlight=False)
    console.print(setting(header), "", markup=False)
    for table in tables:
        console.print(table)
        console.print()
