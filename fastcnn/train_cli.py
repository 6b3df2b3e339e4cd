"""The commands ``fastcnn train`` and ``fastcnn eval``."""

import inspect
import json
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from .data import open_dataset
from .data.sources import KINDS
from .models import list_models
from .pack import printable
from .predict import ModelOptions, options_of
from .training import RECIPES, Diverged, Recipe, Result, load_model
from .training import evaluate as evaluate_model
from .training import train as train_model
from .training.checkpoints import list_checkpoints
from .training.events import Begun, Epoch, Event, Step
from .training.saved import choose_checkpoint, read_job
from .training.trainer import choose_device

WINDOW = 50  # steps that the shown speed is the mean of
REFUSALS = (FileNotFoundError, FileExistsError, NotADirectoryError, BlockingIOError, ValueError, TypeError, ImportError)


def train(
    out: Annotated[Path, typer.Option(help="The folder of the run.", show_default=False)],
    data: Annotated[str | None, typer.Option(help=f"The data set: {KINDS}.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help=f"One of {', '.join(list_models())}.", show_default=False)] = None,
    recipe: Annotated[str | None, typer.Option(help=f"{', '.join(RECIPES)}; plain if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out.")] = False,
    width: Annotated[float | None, typer.Option(help="Factor of all channels and hidden units.")] = None,
    input_size: Annotated[int | None, typer.Option(help="Height and width of the images; the model's own.")] = None,
    option: ModelOptions = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order, augmentation and dropout; 0.")] = None,
    plain: Annotated[bool | None, typer.Option("--plain", help="Torch's layers instead of fused ones.")] = None,
    start_from: Annotated[str | None, typer.Option(help="Run of a vgg_a, for deeper VGGs to start from.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read pictures.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU, if there is one.")] = None,
    checkpoint_minutes: Annotated[float, typer.Option(min=0, help="Minutes between checkpoints within an epoch.")] = 10,
    **recipe_fields: Any,
) -> None:
    """Train a network; with --resume, continue where it was interrupted.

    Ctrl-C saves a checkpoint and stops. The folder of the run has checkpoints, metrics.jsonl, files for TensorBoard,
    and at the end plots of loss, accuracy and the first convolution's filters.
    """
    screen = Screen()
    try:
        with screen:
            result = train_model(
                data,
                model,
                recipe,
                out=out,
                resume=resume,
                workers=workers,
                device=device,
                checkpoint_minutes=checkpoint_minutes,
                listeners=[screen],
                width=width,
                input_size=input_size,
                options=options_of(option) if option else None,
                seed=seed,
                plain=plain,
                start_from=start_from,
                **{name: _value(name, value) for name, value in recipe_fields.items() if value is not None},
            )
    except Diverged as error:
        raise _failed(str(error)) from None
    except (*REFUSALS, RuntimeError, OSError, MemoryError) as error:
        told = str(error) or type(error).__name__
        if screen.task is not None:  # it has begun
            raise _failed(told + _remedy(out)) from None
        if isinstance(error, REFUSALS):
            raise typer.BadParameter(printable(told)) from None
        raise _failed(told) from None
    screen.finish(result)
    if not result.complete:
        raise typer.Exit(130)


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a run of fastcnn train.", show_default=False)],
    data: Annotated[str | None, typer.Option(help="The data set; the run's own if not given.")] = None,
    split: Annotated[str, typer.Option(help="train or validation.")] = "validation",
    checkpoint: Annotated[str, typer.Option(help="best, newest, or a name such as step-1000.")] = "best",
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures at a time; the run's if not given.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read pictures.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU, if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Evaluate the network of a run: loss, top-1 and top-5 accuracy of the centre crops."""
    try:
        where = choose_device(device)
        chosen = choose_checkpoint(run, checkpoint)
        _, job = read_job(chosen)
        pictures = open_dataset(job.data if data is None else data, split)
        if pictures.classes != job.classes:
            raise ValueError(_other_classes(pictures.source, pictures.classes, job.classes))
        format = torch.channels_last if job.recipe.channels_last else torch.contiguous_format
        network = load_model(run, chosen.name).to(where, memory_format=format)  # type: ignore[call-overload]
        batches = job.loader(pictures, training=False, batch=batch, workers=workers, device=where)
        found = evaluate_model(network, batches.epoch(0), autocast=lambda: job.autocast(where))
    except REFUSALS as error:
        raise typer.BadParameter(printable(str(error))) from None
    except (RuntimeError, OSError, MemoryError) as error:
        raise _failed(str(error) or type(error).__name__) from None
    assert found is not None
    told = {"run": str(run), "checkpoint": chosen.name, "data": pictures.source, "split": split, **asdict(found)}
    if as_json:
        typer.echo(json.dumps({**told, "skipped": batches.skipped}, indent=1))
        return
    table = Table(box=None, show_header=False)
    table.add_column(style="cyan")
    told |= {"loss": f"{found.loss:.4f}", "top1": f"{found.top1:.2%}", "top5": f"{found.top5:.2%}"}
    for name, value in told.items():
        table.add_row(name, escape(printable(str(value))))
    table.add_row("skipped", str(len(batches.skipped)))
    Console(highlight=False).print(table)


class Screen:
    """A listener that shows the progress of a run."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.fields[told]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.recent: deque[Step] = deque(maxlen=WINDOW)
        self.task: TaskID | None = None
        self.began = time.monotonic()

    def __enter__(self) -> "Screen":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Begun):
            self._begin(event)
        elif isinstance(event, Step) and self.task is not None:
            self.recent.append(event)
            epoch = f"{event.epoch + 1}/{self.epochs}"
            self.bar.update(self.task, completed=event.step, epoch=epoch, told=self._speed())
        elif isinstance(event, Epoch):
            found = event.validation
            told = (
                f"top-1 {found.top1:.2%}, top-5 {found.top5:.2%}, loss {found.loss:.4f}" if found else "no validation"
            )
            skipped = f", {event.skipped:,} pictures skipped" if event.skipped else ""
            self._print(f"epoch {event.epoch + 1}/{self.epochs}: {told}; {self._speed()}{skipped}")

    def finish(self, result: Result) -> None:
        """After the run: what has become of it, and plots."""
        minutes, seconds = divmod(round(time.monotonic() - self.began), 60)
        if not result.complete:
            self._print(f"interrupted and saved in {result.checkpoint}; continue with --resume")
            return
        validations = [found for found in result.validations if found]
        console = Console(highlight=False)
        if validations:
            best = max(validations, key=lambda found: found.top1)
            told = (
                f"validation: top-1 {validations[-1].top1:.2%}, top-5 {validations[-1].top5:.2%}; "
                f"the best epoch's top-1 {best.top1:.2%} ({result.best and result.best.name})"
            )
            console.print(told)
        console.print(f"{minutes} min {seconds} s; {result.out}", markup=False, soft_wrap=True)
        try:
            from .training.plots import plot_run

            plots = plot_run(result.out, load_model(result.out))
        except (ImportError, OSError, RuntimeError) as error:
            self._print(f"no plots: {error}")
        else:
            console.print(f"plots: {', '.join(plot.name for plot in plots)}", markup=False)

    def _begin(self, event: Begun) -> None:
        job, self.epochs = event.job, event.job.recipe.epochs
        self._print(
            f"{job.model} on {job.data}, {len(job.classes)} classes, images of {job.input_size}, width {job.width:g}"
        )
        self._print(str(job.recipe))
        if event.step:
            self._print(f"resumes after step {event.step:,} of {event.steps:,}")
        for note in event.notes:
            self.console.print(note, style="yellow", markup=False)
        self.task = self.bar.add_task("", total=event.steps, completed=event.step, epoch="", told="")

    def _speed(self) -> str:
        if not self.recent:
            return ""
        seconds = sum(step.seconds for step in self.recent)
        pictures, waiting = (sum(getattr(s, name) for s in self.recent) for name in ("pictures", "waiting"))
        loss = sum(step.loss for step in self.recent) / len(self.recent)
        return f"loss {loss:.4f}  {pictures / seconds:,.0f} pictures/s  {waiting / seconds:.0%} waiting"

    def _print(self, text: str) -> None:
        self.console.print(printable_lines(text), markup=False, soft_wrap=True)


def printable_lines(text: str) -> str:
    """As :func:`printable`, a line at a time."""
    return "\n".join(map(printable, text.splitlines()))


def _remedy(out: Path) -> str:
    with suppress(OSError):
        if list_checkpoints(out):
            return f"\nResume from the last checkpoint with: fastcnn train --resume --out {out}"
    return ""


def _failed(what: str) -> typer.Exit:
    Console(stderr=True, highlight=False).print(printable_lines(what), style="red", markup=False, soft_wrap=True)
    return typer.Exit(1)


def _other_classes(data: str, theirs: tuple[str, ...], ours: tuple[str, ...]) -> str:
    if len(theirs) != len(ours):
        return f"{data}: has {len(theirs)} classes, and the network was trained for {len(ours)}"
    label = next(label for label, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    return f"{data}: class {label} is {theirs[label]!r}, and the network was trained with {ours[label]!r}"


def _value(name: str, value: Any) -> Any:
    """Of an option, for the field of a recipe."""
    if _kinds()[name] != "tuple[int, ...]":
        return value
    try:
        return () if value == "none" else tuple(map(int, value.split(",")))
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not numbers such as 25,51", param_hint=_flag(name)) from None


def _kinds() -> dict[str, str]:
    return {field.name: str(field.type) for field in fields(Recipe) if field.name != "name"}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add_options() -> None:
    """An option of the command for every field of a recipe, with its help."""
    types: dict[str, Any] = {"float": float, "int": int, "bool": bool, "str": str, "tuple[int, ...]": str}
    signature = inspect.signature(train)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
    options = []
    for field in fields(Recipe):
        if field.name == "name":
            continue
        help = field.metadata["help"]
        choices = field.metadata["choices"]
        help = f"{help}: {', '.join(choices)}" if choices else help
        flag = f"{_flag(field.name)}/--no-{_flag(field.name)[2:]}" if field.type == "bool" else _flag(field.name)
        option = typer.Option(flag, help=f"{help[0].upper()}{help[1:]}.", rich_help_panel="The recipe's, to change it")
        kind: Any = Annotated[types[str(field.type)] | None, option]
        options.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    train.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    train.__annotations__ |= {option.name: option.annotation for option in options}


_add_options()
