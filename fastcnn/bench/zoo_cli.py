"""The command ``fastcnn bench zoo``."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from .console import among, print_tables, tracked
from .measure import Budget
from .zoo import (
    BATCHES,
    SIZES,
    TORCHVISION,
    ZOO_MODES,
    ZooNetwork,
    inception,
    measure_zoo,
    networks_of,
    select_zoo,
    torchvision_networks,
    zoo_providers,
)
from .zoo_report import is_done, read_results, write_results, zoo_summary, zoo_table

_INTERRUPTED = 130  # the exit status of a command that SIGINT ended


def zoo(
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"torchvision's {', '.join(TORCHVISION)}; inception_v1; those of --networks; all."),
    ] = None,
    networks: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="A Python file with NETWORKS = {name: (factory, size)}."),
    ] = None,
    mode: Annotated[list[str] | None, typer.Option(help=", ".join(ZOO_MODES))] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help=f"{', '.join(map(str, BATCHES))}.")] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(min=1, help=f"{', '.join(map(str, SIZES))}; 224 is the own size of networks that have one."),
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="1, and PyTorch's number.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Also torch.compile, which takes long.")] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds of each case.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for zoo.json.")] = Path("results"),
    quick: Annotated[bool, typer.Option("--quick", help="One case of eight, and fewer rounds.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what zoo.json has of these cases.")] = False,
) -> None:
    """See whether optimize() is slower than PyTorch for any network: torchvision's, InceptionV1 and yours.

    Networks and images are NCHW. "fastcnn" is optimize(model), for inference with inference=True, "plain" without
    it. The ratio is that of the faster of PyTorch's two memory formats: 1.1 means that fastcnn is 1.1 times faster.
    Training is forward, loss and backward. What a network cannot do is shown so: images that are too small for it, or a
    view of channels_last maps.

    zoo.json is written after every case. A case that it has of the same versions, sources and threads is not run again,
    so that a run that was interrupted goes on; changes to the networks' file need --fresh. torchvision is optional:
    `pip install 'fastcnn\\[zoo]'`.
    """
    here, skipped = _networks(networks or (), model)
    if skipped:
        typer.echo(skipped)
    if not here:
        raise typer.BadParameter("no network is left", param_hint="--model")
    cases = select_zoo(
        here,
        threads=threads or sorted({1, torch.get_num_threads()}),
        modes=among("--mode", mode, ZOO_MODES),
        batches=batch or (),
        sizes=size or (),
        quick=quick,
    )
    budget = Budget(1.0, 3, repeats) if quick else Budget(2.0, 5, repeats)
    file, command = out / "zoo.json", shlex.join(["fastcnn", *sys.argv[1:]])
    results = read_results(file)
    if fresh:
        results = {case: result for case, result in results.items() if case not in cases}
    header = write_results(file, results, command)
    interrupted = False
    try:
        for case in tracked(cases):
            providers = zoo_providers(case.case.mode, compile)
            if not is_done(results.get(case), [provider.name for provider in providers]):
                results[case] = measure_zoo(case, here[case.case.op], providers, budget, command)
                write_results(file, results, command)
    except KeyboardInterrupt:
        interrupted = True
    shown = [results[case] for case in cases if case in results]
    counts = dict.fromkeys(str(case.threads) for case in cases)
    print_tables({**header, "threads": " and ".join(counts)}, [zoo_table(shown)] if shown else [])
    for line in [*zoo_summary(shown), *([skipped] if skipped else ())]:
        typer.echo(line)
    typer.echo(f"written: {file}", err=True)
    if interrupted:
        typer.echo("interrupted; the same command without --fresh goes on from here", err=True)
        raise typer.Exit(_INTERRUPTED)


def _networks(files: list[Path] | tuple[()], chosen: list[str] | None) -> tuple[dict[str, ZooNetwork], str]:
    """The networks to run by name, and a line about those that cannot, for want of torchvision."""
    every: dict[str, ZooNetwork] = {}
    missing: list[str] = []
    try:
        every.update(torchvision_networks())
    except ImportError:
        missing = list(TORCHVISION)
    every["inception_v1"] = inception()
    for file in files:
        try:
            found = networks_of(file)
        except Exception as error:
            raise typer.BadParameter(f"{file}: {type(error).__name__}: {error}", param_hint="--networks") from error
        if taken := sorted({*every, *missing} & {*found}):
            raise typer.BadParameter(f"{file}: the name {taken[0]!r} is taken", param_hint="--networks")
        every.update(found)
    names = among("--model", chosen, [*missing, *every]) or [*missing, *every]
    lost = [name for name in names if name in missing]
    skipped = f"skipped: {', '.join(lost)}: torchvision is not installed; pip install 'fastcnn[zoo]' brings it"
    return {name: every[name] for name in names if name in every}, skipped if lost else ""
