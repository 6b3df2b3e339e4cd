"""Top-k predictions for images: classes and probabilities, printed, plotted or as JSON."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from .data import ImageError, read_image
from .models import PREPROCESSINGS, Preprocessing, WeightsReport, create_model, list_models, load_weights

if TYPE_CHECKING:
    from PIL.Image import Image


ModelOptions = Annotated[list[str] | None, typer.Option(help="Model option, e.g. lrn_groups=1; may be repeated.")]
WeightsFile = Annotated[
    Path,
    typer.Option(
        help="A file of torch, TorchScript, safetensors (.safetensors, or .index.json of several) or ONNX.",
        show_default=False,
    ),
]
EntryOption = Annotated[str | None, typer.Option(help="Which network of a file that holds several, e.g. model_ema.")]


@dataclass(frozen=True)
class Guess:
    """A class, its label if there are labels, and its probability from 0 to 1."""

    index: int
    label: str
    probability: float


def classify(
    model: nn.Module,
    image: Image,
    *,
    top: int = 5,
    labels: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
) -> list[Guess]:
    """The ``top`` most probable classes of one picture, the most probable first.

    Args:
        model: of :func:`fastcnn.models.create_model`, in evaluation mode.
        image: a picture of any size and mode of Pillow; its centre is what the model sees.
        labels: the names of the classes in their order; empty for none.
        preprocessing: the model's own if None.

    Raises:
        ImageError: as :func:`fastcnn.data.to_rgb`.
        ValueError: ``top`` is not positive, or there are labels, but another number than classes.
    """
    if top < 1:
        raise ValueError(f"classify(): top must be at least 1, but got top={top}")
    prepare, size = preprocessing or model.preprocessing, model.input_size
    assert isinstance(prepare, Preprocessing)
    assert isinstance(size, int)
    parameter = next(model.parameters())
    with torch.inference_mode():
        logits: Tensor = model(prepare(image, size)[None].to(parameter.device, parameter.dtype))[0]
    if len(labels) not in (0, len(logits)):
        raise ValueError(f"classify(): expected {len(logits)} labels, but got {len(labels)}")
    probabilities, indices = logits.double().softmax(0).topk(min(top, len(logits)))
    return [
        Guess(index, labels[index] if labels else "", probability)
        for index, probability in zip(indices.tolist(), probabilities.tolist(), strict=True)
    ]


def plot(images: Sequence[Image], guesses: Sequence[Sequence[Guess]], path: Path) -> None:
    """Save the pictures below each other, each with bars of its probabilities beside it.

    Raises:
        ImportError: matplotlib is not installed (it comes with ``fastcnn[models]``).
        ValueError, OSError: what matplotlib raises for an unknown suffix or a folder that is not there.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), 2, squeeze=False, width_ratios=(1, 2))
    for (picture, bars), image, top in zip(axes, images, guesses, strict=True):
        picture.imshow(image)
        picture.set_axis_off()
        rows = range(len(top))
        bars.barh(rows, [guess.probability for guess in top])
        bars.set_yticks(rows, [guess.label or f"class {guess.index}" for guess in top])
        bars.invert_yaxis()
        bars.set_xlim(0, 1)
        bars.set_xlabel("probability")
    figure.savefig(path, dpi=120)


def predict(
    images: Annotated[list[Path], typer.Argument(help="Pictures.", show_default=False)],
    model: Annotated[str, typer.Option(help="A name of fastcnn.models.", show_default=False)],
    weights: WeightsFile,
    labels: Annotated[Path | None, typer.Option(help="A file of the classes' names, one a line.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="How many; as many as labels, or 1000.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    size: Annotated[int | None, typer.Option(min=1, help="Of the images the model takes.")] = None,
    preprocessing: Annotated[
        str | None, typer.Option(help=f"{', '.join(PREPROCESSINGS)}; the model's own if not given.")
    ] = None,
    option: ModelOptions = None,
    entry: EntryOption = None,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="Save pictures and bars to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show the most probable classes of pictures."""
    names = _labels(labels)
    number = classes or len(names) or 1000
    if names and len(names) != number:
        raise typer.BadParameter(f"{len(names)} lines for {number} classes", param_hint="--labels")
    if preprocessing not in (None, *PREPROCESSINGS):
        raise typer.BadParameter(
            f"{preprocessing!r} is none of {', '.join(PREPROCESSINGS)}", param_hint="--preprocessing"
        )
    network = build_model(model, options_of(option), input_size=size, num_classes=number)
    for package in ("PIL", "matplotlib") if plot_to else ("PIL",):
        if importlib.util.find_spec(package) is None:
            raise typer.BadParameter(f"{package} is not installed: pip install fastcnn[models]")
    report = load(network, weights, entry, preprocessing)
    guesses, thumbnails, problems = [], [], []
    for path in images:
        try:
            picture = read_image(path)
        except ImageError as error:
            problems.append(str(error))
            continue
        guesses.append(classify(network, picture, top=top, labels=names))
        picture.thumbnail((512, 512))
        thumbnails.append(picture)
    if problems:
        raise typer.BadParameter("; ".join(problems), param_hint="IMAGES")
    if plot_to is not None:
        try:
            plot(thumbnails, guesses, plot_to)
        except (ValueError, OSError) as error:
            raise typer.BadParameter(str(error), param_hint="--plot") from None
    prepare = network.preprocessing
    assert isinstance(prepare, Preprocessing)
    if as_json:
        found = [
            {"image": str(path), "top": [asdict(guess) for guess in best]}
            for path, best in zip(images, guesses, strict=True)
        ]
        told = {"model": model, "weights": str(report), "preprocessing": prepare.name, "images": found}
        typer.echo(json.dumps(told, indent=1))
        return
    console = Console(highlight=False)
    for path, best in zip(images, guesses, strict=True):
        console.print(f"[bold]{escape(str(path))}", soft_wrap=True)
        console.print(_table(best), "")
    console.print(f"preprocessing: {prepare.name}\n{report}", markup=False)


def build_model(name: str, options: dict[str, Any], **common: Any) -> nn.Module:
    """The model in evaluation mode, its parameters not set, or an error of the command line."""
    if name not in list_models():
        raise typer.BadParameter(f"{name!r} is none of {', '.join(list_models())}", param_hint="--model")
    try:
        with torch.device("meta"):
            network = create_model(name, **common, **options)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    return network.to_empty(device="cpu").eval()


def load(
    network: nn.Module, weights: Path, entry: str | None = None, preprocessing: str | None = None
) -> WeightsReport:
    """Load a file of weights, or an error of the command line; the network takes the settings of an ONNX file."""
    adapt = weights.suffix.lower() == ".onnx"
    try:
        return load_weights(network, weights, entry=entry, preprocessing=preprocessing, adapt=adapt)
    except (RuntimeError, OSError, ImportError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--weights") from None


def options_of(given: list[str] | None) -> dict[str, Any]:
    """``name=value``, where a value is a Python literal or else a string."""
    options = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not of the form name=value", param_hint="--option")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            options[name] = value
    return options


def _labels(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors put a mark in front
        return text.removesuffix("\n").split("\n") if text else []
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}", param_hint="--labels") from None


def _table(best: Sequence[Guess]) -> Table:
    table = Table("class", box=None)
    if any(guess.label for guess in best):
        table.add_column("label", overflow="fold")
    table.add_column("probability", justify="right")
    for guess in best:
        label = [escape(guess.label)] if len(table.columns) == 3 else []
        table.add_row(str(guess.index), *label, f"{guess.probability:.4f}")
    return table
