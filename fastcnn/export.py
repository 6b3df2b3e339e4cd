"""A network with its weights as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .predict import EntryOption, ModelOptions, WeightsFile, build_model, load, options_of


def export(
    model: Annotated[str, typer.Argument(help="A name of fastcnn.models.", show_default=False)],
    weights: WeightsFile,
    onnx: Annotated[Path, typer.Option(help="The file to write, or to replace.", show_default=False)],
    classes: Annotated[int, typer.Option(min=1, help="How many.")] = 1000,
    size: Annotated[int | None, typer.Option(min=1, help="Of the images the model takes.")] = None,
    option: ModelOptions = None,
    entry: EntryOption = None,
) -> None:
    """Write a model to an ONNX file of plain nodes, after onnxruntime has computed the same with it."""
    from .models import to_onnx

    network = build_model(model, options_of(option), input_size=size, num_classes=classes)
    report = load(network, weights, entry)
    try:
        differs = to_onnx(network, onnx)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error), param_hint="--onnx") from None
    typer.echo(f"{report}\n{onnx}: {onnx.stat().st_size:,} bytes; onnxruntime's output differs by {differs:.1e}")
