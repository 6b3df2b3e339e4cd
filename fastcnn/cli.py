"""What the command ``fastcnn`` does; ``__main__.py`` starts it."""

import json
import warnings
from dataclasses import asdict
from itertools import groupby
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import backends
from .bench.cli import bench
from .bench.environment import environment
from .export import export
from .models import list_models
from .models.summary import LayerRow, layer_table
from .ops.register import IMPLEMENTATIONS, what_runs
from .pack import pack
from .predict import predict
from .train_cli import evaluate, train

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.add_typer(bench, name="bench")
app.command()(predict)
app.command()(export)
app.command()(pack)
app.command()(train)
app.command("eval")(evaluate)


@app.callback()
def main() -> None:
    """Fused kernels for AlexNet- and VGG-era networks in PyTorch."""


@app.command()
def info(
    model: Annotated[str | None, typer.Option(help="Show the layers of this model instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, the backends that can run here and why others cannot, and what runs each operator."""
    if model is not None:
        _info_of_model(model, as_json)
        return
    facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    can_run = {name: f"[yellow]no:[/] {escape(why)}" if why else "yes" for name, why in facts["backends"].items()}
    _print("environment", {name: escape(_shown(value)) for name, value in facts["environment"].items()})
    _print("backends that can run here", can_run)
    for device, runs in facts["operators"].items():
        _print(f"what runs on {device}", runs)
    for name, part in (("C++", "build"), ("CUDA", "cuda_build")):
        _print(f"the {name} library", {key: escape(value) for key, value in facts[part].items()} or {"": "not there"})


def _info_of_model(name: str, as_json: bool) -> None:
    if name not in list_models():
        raise typer.BadParameter(f"{name!r} is none of {', '.join(list_models())}", param_hint="--model")
    try:
        rows = layer_table(name)
    except ImportError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    used = dict.fromkeys(row.operator for row in rows if row.operator)
    runs = {device: {op: _runs_of_layers(op, device) for op in used} for device in _devices()}
    if as_json:
        layers = [{**asdict(row), "runs": {device: _runner(row, runs[device]) for device in runs}} for row in rows]
        typer.echo(json.dumps({"model": name, **_totals(rows), "layers": layers}, indent=1))
        return
    console = Console(highlight=False)
    console.print(f"[bold]{name}: its layers, under the operators that run them", _layers(rows), "", sep="\n")
    for device in runs:
        _print(f"what runs on {device}", runs[device])


def _layers(rows: list[LayerRow]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("output")
    for heading in ("parameters", "multiply-adds"):
        table.add_column(heading, justify="right")
    for operator, layers in groupby(rows, key=lambda row: row.operator or "torch"):
        table.add_row(operator, style="cyan")
        for row in layers:
            counts = (f"{count:,}" if count else "" for count in (row.parameters, row.multiply_adds))
            table.add_row(f"  {row.name} [dim]{row.kind}[/]", "x".join(map(str, row.output)), *counts)
    table.add_row("total", "", *(f"{total:,}" for total in _totals(rows).values()))
    return table


def _totals(rows: list[LayerRow]) -> dict[str, int]:
    return {key: sum(getattr(row, key) for row in rows) for key in ("parameters", "multiply_adds")}


def _runs_of_layers(operator: str, device: str) -> str:
    """What runs an operator of a layer table: "conv2d" is the convolution that stands in front of a tail."""
    if operator == "conv2d":
        return "cuDNN" if device == "cuda" else _runs("conv2d_relu", device)
    return _runs(operator, device)


def _runner(row: LayerRow, runs: dict[str, str]) -> str:
    if row.operator is None:
        return "torch"
    return runs["conv2d"] if row.operator == "conv2d" else f"{row.operator} ({runs[row.operator]})"


def _facts() -> dict[str, Any]:
    return {
        "environment": environment(),
        "backends": backends.status(),
        "operators": {device: {op: _runs(op, device) for op in sorted(IMPLEMENTATIONS)} for device in _devices()},
        "build": dict(backends._C.build_info()) if backends._C is not None else {},
        "cuda_build": dict(backends._C_cuda.build_info()) if backends._C_cuda is not None else {},
    }


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _runs(op: str, device: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a backend is missing is in the table
        try:
            return what_runs(op, device)
        except RuntimeError as error:
            return str(error)


def _print(title: str, rows: dict[str, str]) -> None:
    table = Table(show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, value)
    Console(highlight=False).print(f"[bold]{title}", table, "", sep="\n")


def _shown(value: object) -> str:
    return "not there" if value is None else str(value)
