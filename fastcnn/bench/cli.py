"""The commands ``fastcnn bench ...``."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from . import report
from .cases import ANY_FORMAT, DTYPES, FORMATS, Case, Shape
from .console import among, print_tables, tracked
from .data_cli import data
from .inputs import SOURCES, check_source
from .measure import Budget, measure
from .network_workload import NetworkWorkload
from .networks import NETWORK_DTYPES, NETWORK_MODES, NETWORKS, check_size, select_networks
from .operator_workload import OperatorWorkload
from .operators import CONVOLUTIONS, MODES, OPERATORS, SHAPES, select
from .providers import NetworkProvider, OperatorProvider, network_providers, operator_providers
from .rows import Row
from .serve_cli import serve
from .training_cli import training
from .workload import Workload
from .zoo_cli import zoo

Isolate = Annotated[
    bool,
    typer.Option("--isolate", help="Give each provider a process of its own, stopped while it is another's turn."),
]

_NOT_QUICK = ("fastcnn NCHW", "torch.compile NCHW")

bench = typer.Typer(no_args_is_help=True)
bench.command()(zoo)
bench.command()(serve)
bench.command()(data)
bench.command()(training)


@bench.callback()
def main() -> None:
    """Measure fastcnn beside PyTorch. Outputs are checked before any time is taken."""


@bench.command()
def kernels(
    op: Annotated[list[str] | None, typer.Option(help=f"Operator: {', '.join(OPERATORS)}. Repeat for more.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help=f"N,C,H,W or {', '.join(SHAPES)} (of AlexNet).")] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help=f"Convolution: {', '.join(CONVOLUTIONS)}; all. Repeat for more.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=", ".join(DTYPES))] = None,
    format: Annotated[list[str] | None, typer.Option(help=", ".join(FORMATS))] = None,
    mode: Annotated[list[str] | None, typer.Option(help=", ".join(MODES))] = None,
    providers: Annotated[
        list[str] | None, typer.Option(help="Who takes part, of fastcnn.<backend>, torch.eager, torch.compile; all.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Replaces the N of every shape.")] = None,
    input: Annotated[str, typer.Option(help="random, or the feature maps of photographs.")] = "random",
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds of each case.")] = None,
    time: Annotated[float | None, typer.Option(min=0, help="Seconds for each case, at least 11 rounds.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch and fastcnn.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the plots.")] = Path("results"),
    isolate: Isolate = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rounds, and fastcnn.reference only where it is the fallback in use.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Every shape, dtype, format and mode.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure the operators as AlexNet uses them, side by side with PyTorch eager and torch.compile.

    Without filters: every operator at the shape of AlexNet's first stage (the convolution: of conv2), batch 32, in the
    modes that matter. Both memory formats are timed in the same rounds, and the ratios are to PyTorch's faster one.
    """
    cases = select(
        ops=among("--op", op, OPERATORS),
        shapes=[_shape(text) for text in shape or ()],
        dtypes=among("--dtype", dtype, DTYPES),
        formats=among("--format", format, FORMATS),
        modes=among("--mode", mode, MODES),
        batch=batch,
        layers=list(CONVOLUTIONS) if layer == ["all"] else among("--layer", layer, CONVOLUTIONS),
        full=full,
    )
    if not cases:
        raise typer.BadParameter("no operator has this combination of --op, --mode and --shape (pictures are N,3,H,W)")
    here = operator_providers()
    names = among("--providers", providers, here) or list(here)
    if quick and not providers and "fastcnn.cpu" in here:
        names.remove("fastcnn.reference")
    among("--input", [input], SOURCES)
    for case in cases:
        try:
            check_source(case, input)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--input") from None
    if threads is not None:
        torch.set_num_threads(threads)
    budget = Budget(1.0, 5, repeats) if quick else Budget(repeats=repeats)
    if time is not None:
        budget = Budget(time, budget.at_least, repeats)

    chosen = [here[name] for name in names]
    rows = _measure_all(cases, partial(OperatorWorkload, source=input), chosen, budget, isolate)
    _report("kernels", rows, input, out, as_json, with_summaries=True)


@bench.command(name="models")
def networks(
    model: Annotated[list[str] | None, typer.Option(help=f"{', '.join(NETWORKS)}. Repeat for more.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help=", ".join(NETWORK_MODES))] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images at a time. Repeat for more.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(NETWORK_DTYPES)}; only inference runs in another than fp32.")
    ] = None,
    providers: Annotated[
        list[str] | None, typer.Option(help=f"Who takes part, of {', '.join(network_providers())}.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Height and width of the images; the network's own.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds of each case.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch and fastcnn.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the plots.")] = Path("results"),
    isolate: Isolate = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rounds, fp32, and only fastcnn (channels_last) and PyTorch.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure whole networks on photographs: AlexNet, VGG-16 and InceptionV1, VGG-16's features with frozen weights.

    "fastcnn" runs in channels_last and infers with optimize(inference=True), torch.compile with freezing. Ratios are to
    the fastest of PyTorch's memory formats that passed the check.
    onnxruntime and OpenVINO only infer, and are optional: `pip install 'fastcnn\\[peers]'`.
    Training has dropout; for its check it is off. GFLOP/s are those of convolutions as they are defined, whoever needs
    fewer. The saved MB are what autograd keeps for backward without the parameters, the peak is the growth of the
    process during a call; with MALLOC_MMAP_THRESHOLD_=65536 in the environment the C library keeps nothing that is
    freed, and the peak is what was in use at once. The resident MB are how much more the process holds after a
    provider's warm-up than before it was prepared: weights, also packed, and libraries that it is the first to need.
    """
    cases = select_networks(
        networks=among("--model", model, NETWORKS),
        modes=among("--mode", mode, NETWORK_MODES),
        batches=batch or (),
        dtypes=among("--dtype", dtype, NETWORK_DTYPES),
        size=size,
        quick=quick,
    )
    if not cases:
        raise typer.BadParameter("no network has this combination of --model, --mode and --dtype")
    for case in cases:
        try:
            check_size(case.op, case.shape[-1])
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--size") from None
    here = network_providers()
    names = among("--providers", providers, here)
    if not names:
        names = [name for name, one in here.items() if not quick or not (one.export or name in _NOT_QUICK)]
    if threads is not None:
        torch.set_num_threads(threads)
    chosen, budget = [here[name] for name in names], Budget(1.0, 3, repeats) if quick else Budget(4.0, 7, repeats)
    rows = _measure_all(cases, NetworkWorkload, chosen, budget, isolate)
    _report("models", rows, "photographs", out, as_json)


def _report(
    name: str, rows: Sequence[Row], source: str, out: Path, as_json: bool, *, with_summaries: bool = False
) -> None:
    """Write ``<name>.json`` and the plots; print the tables, or the JSON."""
    document = report.report(rows, command=shlex.join(["fastcnn", *sys.argv[1:]]), source=source)
    report.write_json(out / f"{name}.json", document)
    if as_json:
        typer.echo(json.dumps(document, indent=1))
    else:
        print_tables(document["header"], [*report.tables(rows), *(report.summaries(rows) if with_summaries else ())])
    _plot(name, out, document, rows)


def _measure_all(
    cases: Sequence[Case],
    make: Callable[[Case], Workload],
    providers: Sequence[OperatorProvider] | Sequence[NetworkProvider],
    budget: Budget,
    isolate: bool,
) -> list[Row]:
    groups: dict[Case, list[Case]] = {}
    for case in cases:
        groups.setdefault(replace(case, format=ANY_FORMAT), []).append(case)
    return [
        row for one in tracked(list(groups)) for row in measure(groups[one], make, providers, budget, isolate=isolate)
    ]


def _plot(name: str, out: Path, document: dict[str, Any], rows: Sequence[Row]) -> None:
    try:
        from .plots import write_plots

        plots = write_plots(out, document, rows, name)
    except ImportError as error:
        typer.echo(f"no plots: {error}; `pip install fastcnn[bench]` brings what they need", err=True)
        plots = []
    typer.echo(f"written: {', '.join(map(str, (out / f'{name}.json', *plots)))}", err=True)


def _shape(text: str) -> Shape:
    if text in SHAPES:
        shape = SHAPES[text]
    else:
        try:
            n, c, h, w = map(int, text.split(","))
        except ValueError:
            raise typer.BadParameter(
                f"{text!r} is neither N,C,H,W nor one of {', '.join(SHAPES)}", param_hint="--shape"
            ) from None
        shape = (n, c, h, w)
    if min(shape) < 1 or min(shape[2:]) < 3:
        raise typer.BadParameter(f"{text!r}: N and C must be at least 1, H and W at least 3", param_hint="--shape")
    return shape
