"""``make fuzz``: a broken ONNX file is refused, or the network made of it computes what onnxruntime computes.

Every file is loaded three times, each in a process with limits on time and memory: by onnxruntime, by
:func:`fastcnn.models.from_onnx`, and by :func:`fastcnn.models.load_weights` into the network of the
intact file. Where onnxruntime refuses a file or dies, ours must refuse it; elsewhere ours may.
"""

import argparse
import os
import pickle
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx  # noqa: F401  (once, and not in each process)
import onnxruntime  # noqa: F401
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fastcnn import models
from fastcnn.models.graph.onnxruntime import Runtime, difference

from .fuzz_files import FILES, mutated

SECONDS, BYTES = 20, 8 << 30  # of a process
LARGEST = 1 << 22  # values of an input that is still tried
ALLOWED = 1e-4


@dataclass(frozen=True)
class Outcome:
    """What a process came to: "refused", "output", "raised" in the forward, "loaded" or "skipped" unrun, "died"."""

    what: str
    detail: str = ""
    output: Tensor | None = None
    image: Tensor | None = None


def in_a_process(function: Callable[[], Outcome]) -> Outcome:
    """What a function gives, called in a fork of this process, which must not have started threads."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(function, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return pickle.loads(data) if status == 0 and data else Outcome("died", f"exit status {status}")


def _run(function: Callable[[], Outcome], writing: int) -> None:
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            outcome = function()
        except MemoryError:
            outcome = Outcome("died", "out of memory")
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(outcome, pipe)
        os._exit(0)
    finally:
        os._exit(1)


def by_onnxruntime(path: Path, image: Callable[[list[Any]], Tensor | None]) -> Outcome:
    try:
        runtime = Runtime(path)
    except Exception as error:
        return Outcome("refused", str(error))
    x = image(runtime.shape)
    if x is None:
        return Outcome("skipped", f"images of {runtime.shape}")
    try:
        return Outcome("output", output=runtime(x), image=x)
    except Exception as error:
        return Outcome("raised", str(error), image=x)


def by_fastcnn(path: Path, into: str, x: Tensor | None) -> Outcome:
    """``into`` is the file whose network takes the weights; empty: a network is made of the graph."""
    try:
        if into:
            network: torch.nn.Module = models.from_onnx(into)
            models.load_weights(network, path)
        else:
            network = models.from_onnx(path)
    except models.WeightsError as error:
        return Outcome("refused", str(error))
    try:
        with torch.no_grad():
            return Outcome("loaded") if x is None else Outcome("output", output=network(x))
    except Exception as error:
        return Outcome("raised", str(error))


def image(shape: list[Any], usual: list[Any]) -> Tensor | None:
    """An input of this shape, where it is open as ``usual`` has it; None if that is none, or large."""
    default = [n if isinstance(n, int) else (2 if i == 0 else 21) for i, n in enumerate(usual)]
    lengths = [n if isinstance(n, int) and n > 0 else default[i % 4] for i, n in enumerate(shape)]
    if any(n > LARGEST for n in lengths) or torch.Size(lengths).numel() > LARGEST:
        return None
    return torch.randn(lengths, generator=torch.Generator().manual_seed(0))


def judged(theirs: Outcome, ours: Outcome) -> str:
    """How the two go together, "WRONG" in front where they do not."""
    if ours.what == "refused":
        return "refused"
    if ours.what == "died":
        return "WRONG: ours died"
    if theirs.what in ("refused", "died"):
        return f"WRONG: onnxruntime {theirs.what}, and we did not refuse"
    if theirs.what == "skipped":
        return "loaded, but of images too large to try"
    if theirs.what == ours.what == "raised":
        return "loaded, and raised in the forward like onnxruntime"
    if theirs.output is None or ours.output is None:
        return f"WRONG: onnxruntime {theirs.what}, ours {ours.what}"
    differs = difference(ours.output, theirs.output)
    return "loaded, and equal" if differs <= ALLOWED else f"WRONG: differs by {differs:.1e}"


def tried(seed: int, folder: Path) -> list[tuple[str, str, str]]:
    """What became of the file of a seed: how it broke, who loaded it, and the judgement."""
    name, how, data = mutated(seed)
    path = folder / "mutated.onnx"
    path.write_bytes(data)
    base = folder / f"{name}.onnx"
    usual = [d.dim_value or None for d in FILES[name]().graph.input[0].type.tensor_type.shape.dim]
    theirs = in_a_process(lambda: by_onnxruntime(path, lambda shape: image(shape, usual)))
    results = []
    for function, into in (("from_onnx", ""), ("load_weights", str(base))):
        ours = in_a_process(lambda into=into: by_fastcnn(path, into, theirs.image))  # type: ignore[misc]
        text = judged(theirs, ours)
        results.append(
            (f"{name}: {how}", function, f"{text} ({ours.detail or theirs.detail})" if "WRONG" in text else text)
        )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--verbose", action="store_true", help="print what became of each")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork has none of the threads that were started before
    console = Console()
    counts: Counter[tuple[str, str]] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, make in FILES.items():
            path = folder / f"{file}.onnx"
            path.write_bytes(make().SerializeToString())
            models.load_weights(models.from_onnx(path), path)  # what this imports, no process has to
        seeds = range(options.first, options.first + options.files)
        for seed in track(seeds, "files", console=console, disable=not console.is_terminal):
            for how, function, text in tried(seed, folder):
                counts[function, text.partition(" (")[0].partition(" by ")[0]] += 1
                if options.verbose:
                    console.print(f"{seed} {how} {function}: {text}", markup=False, soft_wrap=True)
                if "WRONG" in text:
                    wrong.append(f"seed {seed}, {how}, {function}: {text}")
    table = Table("function", "what became of the file", "files", box=None)
    for (function, text), count in sorted(counts.items()):
        table.add_row(function, text, f"{count:,}")
    console.print(table)
    for line in wrong:
        console.print(line, markup=False, soft_wrap=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
