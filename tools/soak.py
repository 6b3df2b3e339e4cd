"""``make soak``: do memory and caches stay bounded over 100,000 calls of all sizes, by threads that come and go?

Waves of threads make the calls of ``soak_calls.py``, where some answers are checked. Between waves memory and every
cache of the package are measured. The first fifth of the calls warms up; after it nothing may grow with their number.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import random
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .soak_calls import Calls, Model

WARM_UP = 0.2  # of the calls
SAMPLES = 50
CALLS_OF_A_THREAD = 250
NEW_MODEL = 0.12  # of the waves of the warm-up: TorchDynamo itself keeps one or two MB of each
MB = 1 << 20
# How much a straight line through the samples after the warm-up may rise: so many MB, or if that is more this share of
# the memory. What is in use hardly varies, and 16 MB are 200 bytes a call.
ALLOWED = {"in_use": (16.0, 0.0), "held": (32.0, 0.05)}


@dataclass(frozen=True)
class Sample:
    """The process after so many calls.

    Args:
        calls: made so far.
        resident: memory, in MB.
        free: what was freed of it, in MB, and the C library has not given back: holes in the heaps of its arenas, of
            which it has up to 8 for each core.
        in_use: what is allocated from the C library, in MB: neither Python's small objects nor kept blocks.
        threads: of the process.
        caches: how many entries each cache and container of the package has, and how many it may have, None for any
            number; and how many objects of each of its classes live.
    """

    calls: int
    resident: float
    free: float
    in_use: float
    threads: int
    caches: dict[str, tuple[int, int | None]]

    @property
    def held(self) -> float:
        """All that is not free, in MB."""
        return self.resident - self.free


# -- measuring --------------------------------------------------------------------------------------------------------


class _Mallinfo2(ctypes.Structure):
    """Of the GNU C library, for all of its arenas."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


def sample(calls: int) -> Sample:
    """Of this process, as it is: nothing is given back to the system for it."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        calls,
        pages * os.sysconf("SC_PAGESIZE") / MB,
        info.fordblks / MB,
        (info.uordblks + info.hblkhd) / MB,
        len(os.listdir("/proc/self/task")),
        caches(),
    )


def caches() -> dict[str, tuple[int, int | None]]:
    """See :class:`Sample`; whatever there is in the package is found, without a list of names."""
    classes = Counter(type(o) for o in gc.get_objects() if str(type(o).__module__).startswith("fastcnn."))
    found: dict[str, tuple[int, int | None]] = {f"{c.__qualname__} objects": (n, None) for c, n in classes.items()}
    seen = set()
    for name, value in _attributes():
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict | list | set | Mapping):
            found[name] = len(value), None
        elif hasattr(value, "cache_info") and not isinstance(value, type):
            info = value.cache_info()
            found[name] = info.currsize, info.maxsize
    return found


def _attributes() -> Iterator[tuple[str, Any]]:
    """Of the package's modules, and of their classes."""
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "fastcnn"]:
        for name, value in [*vars(module).items()]:
            if not name.startswith("__"):
                yield f"{module.__name__}.{name}", value
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield from ((f"{module.__name__}.{name}.{a}", getattr(value, a)) for a in vars(value) if a[:2] != "__")


# -- judging ----------------------------------------------------------------------------------------------------------


def grown(samples: Sequence[Sample]) -> list[str]:
    """What grew with the number of calls after the warm-up, in words; nothing if all is well."""
    warm = [s for s in samples if s.calls > WARM_UP * samples[-1].calls]
    told = []
    for what, (megabytes, share) in ALLOWED.items():
        sizes = [getattr(s, what) for s in warm]
        slope = statistics.linear_regression([s.calls for s in warm], sizes).slope
        growth, allowed = slope * (warm[-1].calls - warm[0].calls), max(megabytes, share * statistics.mean(sizes))
        if growth > allowed:
            told.append(f"memory, {what.replace('_', ' ')}: by {growth:.1f} MB, where {allowed:.1f} MB are allowed")
    sizes_of = {name: [s.caches.get(name, (0, None))[0] for s in samples] for name in samples[-1].caches}
    unbounded = {name: sizes for name, sizes in sizes_of.items() if samples[-1].caches[name][1] is None}
    last = max(1, len(warm) // 3)
    for name, sizes in {"threads": [s.threads for s in samples], **unbounded}.items():
        if min(sizes[-last:]) > max(sizes[:-last]):
            told.append(f"{name}: up to {max(sizes[:-last])}, then from {min(sizes[-last:])} to {max(sizes[-last:])}")
    return told


# -- running ----------------------------------------------------------------------------------------------------------


def soak(calls: int, seed: int, samples: int = SAMPLES) -> Iterator[Sample]:
    """Make the calls, and measure at about equal distances.

    Raises:
        RuntimeError: a call failed, or its answer was wrong.
    """
    draw, done, measured = random.Random(seed), 0, 0
    torch.manual_seed(seed)
    while done < calls:
        if done == 0 or (done < WARM_UP * calls and draw.random() < NEW_MODEL):
            model = Model.drawn(draw)  # and nothing holds the last one
        workers = draw.randint(1, 4)
        each = min(CALLS_OF_A_THREAD, math.ceil(calls / samples / workers))
        _wave(model, [draw.getrandbits(32) for _ in range(workers)], each, threads=2 if workers == 1 else 1)
        done += workers * each
        if done >= calls / samples * (measured + 1):
            measured += 1
            yield sample(done)


def _wave(model: Model, seeds: Sequence[int], each: int, threads: int) -> None:
    """As many threads as seeds start, make calls, and end."""

    def work(seed: int) -> None:
        torch.set_num_threads(threads)
        calls = Calls(seed, model)
        for i in range(each):
            try:
                calls()
            except Exception as error:
                raise RuntimeError(f"call {i} of the thread with seed {seed} failed") from error

    torch.set_num_threads(threads)
    with ThreadPoolExecutor(len(seeds)) as pool:
        list(pool.map(work, seeds))  # raises what they raise


# -- showing ----------------------------------------------------------------------------------------------------------


def memory_table(samples: Sequence[Sample]) -> Table:
    """About a dozen of the samples."""
    table = Table("calls", "resident MB", "free MB", "held MB", "in use MB", "threads", box=None)
    for s in samples[:: -(-len(samples) // 12)]:
        megabytes = (f"{m:.0f}" for m in (s.resident, s.free, s.held, s.in_use))
        table.add_row(f"{s.calls:,}", *megabytes, str(s.threads))
    return table


def caches_table(samples: Sequence[Sample]) -> Table:
    """All that have a bound, and all others whose size changed."""
    table = Table("cache, container or class", "entries", "at most", "bound", box=None)
    bounds = {name: bound for s in samples for name, (_, bound) in s.caches.items()}
    for name, bound in sorted(bounds.items()):
        sizes = [s.caches.get(name, (0, None))[0] for s in samples]
        if bound is not None or len(set(sizes)) > 1:
            table.add_row(name, str(sizes[-1]), str(max(sizes)), "none" if bound is None else str(bound))
    return table


def plot(samples: Sequence[Sample], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for what in ("resident", *ALLOWED):
        axes.plot([s.calls for s in samples], [getattr(s, what) for s in samples], label=what.replace("_", " "))
    axes.axvline(WARM_UP * samples[-1].calls, color="grey", linestyle=":", label="end of the warm-up")
    axes.set(xlabel="calls", ylabel="memory, MB", ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder, for soak.json and soak.png")
    options = parser.parse_args()
    console = Console(highlight=False)
    running = soak(options.calls, options.seed)
    samples = [*track(running, "soaking", total=SAMPLES, console=Console(stderr=True), transient=True)]
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "soak.json").write_text(json.dumps([asdict(s) for s in samples], indent=1))
        plot(samples, options.out / "soak.png")
    console.print(memory_table(samples), caches_table(samples), sep="\n\n")
    told = [f"grew with the calls: {text}" for text in grown(samples)]
    console.print("", *(told or ["Nothing grew with the calls."]), sep="\n", markup=False, soft_wrap=True)
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
