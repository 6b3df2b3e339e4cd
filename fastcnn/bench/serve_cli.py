"""The command ``fastcnn bench serve``."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from .cases import ANY_FORMAT, Case
from .console import among, print_tables, tracked
from .networks import NETWORK_DTYPES, NETWORKS, check_size
from .providers import network_providers
from .report import report, write_json
from .serve import SERVING, measure_serving, serve_tables

_MODELS = [name for name, network in NETWORKS.items() if "inference" in network.modes]


def serve(
    model: Annotated[list[str] | None, typer.Option(help=f"{', '.join(_MODELS)}. Repeat for more.")] = None,
    clients: Annotated[list[int] | None, typer.Option(min=1, help="Threads that ask at once; 1, 2 and 4.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a call.")] = 1,
    dtype: Annotated[str, typer.Option(help=", ".join(NETWORK_DTYPES))] = "fp32",
    providers: Annotated[list[str] | None, typer.Option(help=f"Who takes part, of {', '.join(SERVING)}.")] = None,
    size: Annotated[int | None, typer.Option(help="Height and width of the images; the network's own.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Of a burst.")] = 1.0,
    repeats: Annotated[int, typer.Option(min=1, help="Bursts of each provider and number of clients.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of PyTorch and fastcnn, and of a runtime.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for serve.json.")] = Path("results"),
) -> None:
    """Measure latency and throughput of networks that several threads call at once, on photographs.

    All clients call one network: fastcnn's optimize(inference=True), PyTorch's in channels_last, torch.compile's with
    freezing, another runtime's. In PyTorch and fastcnn each client has --threads threads of its own: 4 clients with 2
    are 8 threads that share the cores. onnxruntime and OpenVINO have one pool of --threads for all; in OpenVINO each
    client has an infer request, and the hint is LATENCY.

    Percentiles are of single calls. Providers take turns, in bursts of --seconds; what clients get is checked.
    """
    here = network_providers()
    chosen = [here[name] for name in among("--providers", providers, SERVING) or SERVING]
    among("--dtype", [dtype], NETWORK_DTYPES)
    cases = []
    for name in among("--model", model, _MODELS) or _MODELS:
        side = size or NETWORKS[name].size
        try:
            check_size(name, side)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--size") from None
        cases.append(Case(name, (batch, 3, side, side), dtype, ANY_FORMAT, "inference"))
    if threads is not None:
        torch.set_num_threads(threads)
    counts = clients or (1, 2, 4)
    rows = [row for case in tracked(cases) for row in measure_serving(case, chosen, counts, seconds, repeats)]
    header = report([], command=shlex.join(["fastcnn", *sys.argv[1:]]), source="photographs")["header"]
    file = out / "serve.json"
    write_json(file, {"header": header, "rows": [asdict(row) for row in rows]})
    print_tables(header, serve_tables(rows))
    typer.echo(f"written: {file}", err=True)
