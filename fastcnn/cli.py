"""The command ``fastcnn``, also ``python -m fastcnn``."""

from __future__ import annotations

import json
import warnings
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import backends
from .bench.cli import bench
from .bench.environment import environment
from .ops._operator import BACKENDS

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.add_typer(bench, name="bench")


@app.callback()
def main() -> None:
    """Fused kernels for AlexNet- and VGG-era networks in PyTorch."""


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, the backends that can run here and why others cannot, and what runs each operator."""
    facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    can_run = {name: f"[yellow]no:[/] {escape(why)}" if why else "yes" for name, why in facts["backends"].items()}
    tables = [
        _table("environment", {name: escape(_shown(value)) for name, value in facts["environment"].items()}),
        _table("backends that can run here", can_run),
        *(_table(f"what runs on {device}", runs) for device, runs in facts["operators"].items()),
        *(
            _table(
                f"the {name} library", {key: escape(value) for key, value in facts[part].items()} or {"": "not there"}
            )
            for name, part in (("C++", "build"), ("CUDA", "cuda_build"))
        ),
    ]
    for table in tables:
        Console(highlight=False).print(table, "")


def _facts() -> dict[str, Any]:
    return {
        "environment": environment(),
        "backends": backends.status(),
        "operators": {device: {op: _runs(op, device) for op in sorted(BACKENDS)} for device in _devices()},
        "build": dict(backends._C.build_info()) if backends._C is not None else {},
        "cuda_build": dict(backends._C_cuda.build_info()) if backends._C_cuda is not None else {},
    }


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _runs(op: str, device: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a backend is missing is in the table
        try:
            return backends.choose(op, BACKENDS[op], torch.empty(0, device=device))
        except RuntimeError as error:
            return str(error)


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _shown(value: object) -> str:
    return "not there" if value is None else str(value)
