"""The command ``fastcnn``, also ``python -m fastcnn``."""

import json
import warnings
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import backends
from .bench.cli import bench
from .bench.environment import environment
from .models import list_models
from .models.summary import layer_table
from .ops.register import IMPLEMENTATIONS, what_runs
from .predict import predict

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.add_typer(bench, name="bench")
app.command()(predict)


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


def _info_of_model(name: str, as_json: bool) -> None:
    if name not in list_models():
        raise typer.BadParameter(f"{name!r} is none of {', '.join(list_models())}", param_hint="--model")
    try:
        rows = layer_table(name)
    except ImportError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    runs = {device: _operators(device) for device in _devices()}
    layers = [
        {**asdict(row), "runs": {device: runs[device].get(row.operator or "", "torch") for device in runs}}
        for row in rows
    ]
    totals = {key: sum(layer[key] for layer in layers) for key in ("parameters", "multiply_adds")}
    if as_json:
        typer.echo(json.dumps({"model": name, **totals, "layers": layers}, indent=1))
        return
    table = Table("layer", "", "output", title=name, title_justify="left", title_style="bold", box=None)
    for heading in ("parameters", "multiply-adds"):
        table.add_column(heading, justify="right")
    for device in runs:
        table.add_column(f"runs on {device}")
    for layer in layers:
        counts = (f"{layer[key]:,}" if layer[key] else "" for key in totals)
        table.add_row(
            layer["name"], layer["kind"], "x".join(map(str, layer["output"])), *counts, *layer["runs"].values()
        )
    table.add_section()
    table.add_row("total", "", "", *(f"{total:,}" for total in totals.values()))
    Console(highlight=False).print(table)


def _operators(device: str) -> dict[str, str]:
    """What runs each operator of a layer table, and the convolutions that stand in front of a tail."""
    convolution = "cuDNN" if device == "cuda" else _runs("conv2d_relu", device)
    return {"conv2d": convolution, **{op: f"{op} ({_runs(op, device)})" for op in IMPLEMENTATIONS}}


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


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _shown(value: object) -> str:
    return "not there" if value is None else str(value)
