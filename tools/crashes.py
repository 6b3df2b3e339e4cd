"""``make crashes``: is a run that is killed again and again, and resumed, the same to the bit as one left alone?

Each process that trains is forked from this one, which has imported everything and computed nothing, so that threads
are started in the children only. It is killed with SIGKILL

- at random moments, as often as is asked for;
- before and after every call that writes, flushes, renames or deletes for the last checkpoint, one process for each.

Then the run is resumed to its end. Weights, the optimizer's state and the lines of ``metrics.jsonl`` must be those of a
run that nobody killed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch  # noqa: F401  (what training imports when it begins)
import tensorboard.compat.proto.event_pb2
import tensorboard.summary.writer.record_writer  # noqa: F401
import torch
import torch._dynamo
from rich.console import Console

from fastcnn.data import Dataset
from fastcnn.data.dataset import Arrays
from fastcnn.training import checkpoints, train

CALLS = {  # of a checkpoint, by what they do
    "write": (checkpoints, "_write"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "mkdir": (os, "mkdir"),
    "unlink": (os, "unlink"),
    "rmdir": (os, "rmdir"),
}


class Small(Arrays):
    """Twelve pictures for training and four for validation, of two classes."""

    def __init__(self, split: str, count: int) -> None:
        pictures = torch.arange(count * 5 * 5, dtype=torch.int64).mul(7919).remainder(251).to(torch.uint8)
        labels = torch.arange(count) % 2
        super().__init__("small", split, "all", ["a", "b"], labels, [pictures.view(count, 5, 5, 1)])


def small() -> dict[str, Dataset]:
    """A data set of which an epoch takes a moment."""
    return {"train": Small("train", 12), "validation": Small("validation", 4)}


def finish(out: Path, settings: Mapping[str, Any]) -> None:
    """Start the run, or resume it."""
    begun = bool(checkpoints.list_checkpoints(out))
    train(**settings, out=out, resume=begun)


def child(run: Callable[[], object]) -> int:
    """A process of its own that does this."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(process: int) -> bool:
    """Wait for a process: whether it has done its work, or was killed."""
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        sys.exit(f"a process has failed: {os.waitstatus_to_exitcode(status)}")
    return True


def content(out: Path) -> dict[str, Any]:
    """Of a run: a hash of its last weights and optimizer's state, and what happened in each step and epoch."""
    newest = checkpoints.list_checkpoints(out)
    last = newest[max(newest)]
    found: dict[str, Any] = {
        file.name: sha256(file.read_bytes()).hexdigest() for file in sorted(last.glob("*.safetensors"))
    }
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for measured in ("time", "seconds", "waiting"):
            line.pop(measured, None)
    state = checkpoints.read_state(last)
    state.pop("environment")
    return {**found, "state": state, "checkpoints": list(newest), "lines": lines}


@contextmanager
def counted(hit: Callable[[str], None]) -> Iterator[None]:
    """Within, ``hit`` is called before and after each call of CALLS."""
    originals = {name: getattr(*place) for name, place in CALLS.items()}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            hit(f"before {name}")
            result = originals[name](*args, **options)
            hit(f"after {name}")
            return result

        return call

    for name, (module, function) in CALLS.items():
        setattr(module, function, wrapped(name))
    try:
        yield
    finally:
        for name, (module, function) in CALLS.items():
            setattr(module, function, originals[name])


def killed_at(out: Path, settings: Mapping[str, Any], number: int) -> None:
    """Start the run, or resume it, and die at the call of this number."""
    left = number

    def hit(_: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with counted(hit):
        finish(out, settings)


def calls_of(out: Path, settings: Mapping[str, Any]) -> list[str]:
    """The calls of a whole run, in a process of its own."""
    told = out.with_suffix(".calls")

    def run() -> None:
        hits: list[str] = []
        with counted(hits.append):
            finish(out, settings)
        told.write_text("\n".join(hits))

    if not ended(child(run)):
        sys.exit("the run was killed")
    return told.read_text().split("\n")


def kill_at_random(
    out: Path, settings: Mapping[str, Any], kills: int, seconds: float, seed: int, check: Callable[[str, Path], None]
) -> None:
    """Kill a run so often, up to so many seconds after each start, and check it; when it ends before, begin another."""
    draw, done, of_this = random.Random(seed), 0, 0
    while done < kills:
        process = child(partial(finish, out, settings))
        time.sleep(draw.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        if ended(process):
            check(f"killed at {of_this} random moments", out)
            of_this = 0
        else:
            done, of_this = done + 1, of_this + 1
    if not ended(child(partial(finish, out, settings))):
        sys.exit("the run was killed by someone else")
    check(f"killed at {of_this} random moments", out)
    Console(highlight=False).print(f"killed at {done} random moments in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", help="a data set; a tiny one if not given")
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--width", type=float, default=0.02)
    parser.add_argument("--input-size", type=int, default=67)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--kills", type=int, default=20, help="at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of these moments")
    parser.add_argument("--checkpoint-minutes", type=float, default=0)
    parser.add_argument("--points", choices=("none", "last", "all"), default="last", help="of which checkpoints")
    options = parser.parse_args()
    settings: dict[str, Any] = {
        "data": options.data or small(),
        "model": options.model,
        "width": options.width,
        "input_size": options.input_size,
        "batch": options.batch,
        "epochs": options.epochs,
        "checkpoint_minutes": options.checkpoint_minutes,
    }
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        began = time.monotonic()
        calls = calls_of(alone, settings)
        seconds, wanted, wrong = time.monotonic() - began, content(alone), 0
        console.print(f"left alone: {seconds:.1f} s, {len(wanted['lines'])} steps and epochs, {len(calls)} points")

        def check(what: str, out: Path) -> None:
            nonlocal wrong
            found = content(out)
            differs = [name for name in wanted if found.get(name) != wanted[name]]
            wrong += bool(differs)
            console.print(f"{what}: {'the same bits' if not differs else 'other ' + ', '.join(differs)}")
            shutil.rmtree(out)

        if options.kills:
            kill_at_random(Path(folder) / "random", settings, options.kills, seconds, options.seed, check)
        last = max(number for number, call in enumerate(calls) if call == "before mkdir")
        first = {"none": len(calls), "last": last, "all": 0}[options.points]
        out = Path(folder) / "injected"
        for number, call in list(enumerate(calls))[first:]:
            if ended(child(partial(killed_at, out, settings, number))):
                sys.exit(f"the run was not killed at point {number}")
            if not ended(child(partial(finish, out, settings))):
                sys.exit("the run was killed by someone else")
            check(f"killed {call} ({number})", out)
    if wrong:
        sys.exit(f"{wrong} runs differ")
    console.print("all runs end with the same bits")


if __name__ == "__main__":
    main()
