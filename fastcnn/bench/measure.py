"""The engine: check the outputs, then take the times, every provider of a case in turn, one call each per round."""

import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from .cases import Case
from .isolate import Isolated, warmed
from .memory import peak_bytes, resident_bytes, saved_bytes
from .rows import FP32, Row, add_ratios, quartiles
from .workload import Call, Entry, Workload, Yardstick, reason

Clock = Callable[[Call], float]  # calls once, and returns the seconds
Timer = Callable[[], float]  # the same, of a call that it knows
_Name = TypeVar("_Name", bound=Hashable)

_OVERWRITTEN = 2**28  # bytes, more than any L2 cache has


@dataclass(frozen=True)
class Budget:
    """How long to measure a case: ``repeats`` rounds, or if None for ``seconds`` but at least ``at_least`` rounds."""

    seconds: float = 4.0
    at_least: int = 11
    repeats: int | None = None

    def enough(self, rounds: int, elapsed: float) -> bool:
        if self.repeats is not None:
            return rounds >= self.repeats
        return rounds >= self.at_least and elapsed >= self.seconds


class CallError(Exception):
    """A call that worked before failed when its time was taken; after it the device may be lost to all of them."""

    def __init__(self, name: Hashable, error: Exception) -> None:
        super().__init__(f"{name}: {reason(error)}")
        self.name, self.error = name, error


class Participant(Protocol):
    """A provider in a case: a row, which has a failure or wants times."""

    row: Row

    def seconds(self) -> float:
        """Of one call."""

    def finish(self) -> None:
        """Fill in what only the calls have told."""


def measure(
    cases: Sequence[Case],
    make: Callable[[Case], Workload],
    providers: Iterable[Any],
    budget: Budget,
    device: str = "cpu",
    *,
    isolate: bool = False,
    why: Callable[[Exception], str] = reason,
) -> list[Row]:
    """A row for each provider that takes part in a case: checked, and if right then timed.

    A torch provider that fails in 16 bits also runs in fp32, as fastcnn's C++ kernels do, in rows named "... (fp32)".

    Args:
        cases: cases that differ in nothing but the memory format, which are timed in the same rounds.
        make: builds a case's workload.
        providers: who, if their ``takes_part`` says so.
        budget: how long.
        device: where.
        isolate: each provider has a process of its own, which is stopped while it is another's turn.
        why: the text of a failure.
    """
    providers = list(providers)
    taking_part = [(case, provider) for case in cases for provider in providers if provider.takes_part(case)]
    if not taking_part:
        return []
    torch.compiler.reset()  # a new shape is a new compilation, and there is a limit to those of one function
    with torch.random.fork_rng(), ExitStack() as stack:
        workloads = {case: make(case) for case in dict(taking_part)}
        yardsticks = next(iter(workloads.values())).yardsticks()
        clock_here = clock(device)

        def start(case: Case, provider: Any, dtype: str) -> Participant:
            if not isolate:
                return Here(workloads[case], provider, dtype, clock_here, why, device)
            return stack.enter_context(Isolated(partial(_prepared, make, case, provider, dtype, device, why)))

        if isolate:
            workloads.clear()  # each process makes its own
        participants = list(_participants(taking_part, start))
        _add_times(participants, yardsticks, budget, clock_here, why, isolate)
    rows = [participant.row for participant in participants]
    add_ratios(rows)
    return rows


def _participants(
    taking_part: Iterable[tuple[Case, Any]], start: Callable[[Case, Any, str], Participant]
) -> Iterator[Participant]:
    for case, provider in taking_part:
        participant = start(case, provider, case.dtype)
        yield participant
        failed_torch = provider.name.startswith("torch.") and participant.row.failure is not None
        if case.dtype != "fp32" and (failed_torch or provider.name == "fastcnn.cpu"):
            yield start(case, provider, "fp32")


class Here:
    """A provider in a case, in this process."""

    def __init__(
        self,
        workload: Workload,
        provider: Any,
        dtype: str,
        clock: Clock,
        why: Callable[[Exception], str] = reason,
        device: str = "cpu",
    ) -> None:
        case = workload.case
        name = provider.name + ("" if dtype == case.dtype else FP32)
        self.row = Row(**asdict(case), provider=name, bytes_moved=workload.bytes_moved(dtype), flop=workload.flop)
        self.clock = clock
        try:
            self.entry = self._checked(workload, provider, dtype, device)
        except Exception as error:
            self.row.failure = why(error)

    def _checked(self, workload: Workload, provider: Any, dtype: str, device: str) -> Entry:
        before = resident_bytes(device) if workload.measures_memory else None
        entry = workload.prepare(provider, dtype)
        self.row.error, self.row.tolerance = workload.check(entry.check(), dtype, entry.allowed)
        entry.call()  # the warm-up
        if entry.forward is not None:
            self.row.saved_bytes = saved_bytes(entry.forward, entry.parameters)
        if workload.measures_memory:
            after = resident_bytes(device)
            self.row.resident_bytes = None if before is None or after is None else after - before
            self.row.peak_bytes = peak_bytes(entry.call, device)
        if entry.phases is not None:
            entry.phases.clear()
        return entry

    def seconds(self) -> float:
        return self.clock(self.entry.call)

    def finish(self) -> None:
        phases = self.entry.phases
        if phases is not None:
            self.row.forward_ms, self.row.backward_ms, self.row.update_ms = (
                1e3 * statistics.median(phase) for phase in (phases.forward, phases.backward, phases.update)
            )


def _prepared(
    make: Callable[[Case], Workload],
    case: Case,
    provider: Any,
    dtype: str,
    device: str,
    why: Callable[[Exception], str],
) -> Here:
    """A participant that builds the workload itself, as one in another process has to."""
    return Here(make(case), provider, dtype, clock(device), why, device)


def _add_times(
    participants: Sequence[Participant],
    yardsticks: Mapping[str, Yardstick],
    budget: Budget,
    clock: Clock,
    why: Callable[[Exception], str],
    isolate: bool,
) -> None:
    right = {id(one): one for one in participants if one.row.failure is None}
    if not right:
        return
    timers: dict[Hashable, Timer] = {key: one.seconds for key, one in right.items()}
    yards = {name: partial(clock, yardstick.call) for name, yardstick in yardsticks.items()}
    timers.update({name: partial(warmed, timer) for name, timer in yards.items()} if isolate else yards)
    try:
        times = time_rounds(timers, budget)
    except CallError as failed:
        for key, one in right.items():
            culprit = right[failed.name].row.provider if failed.name in right else failed.name
            one.row.failure = why(failed.error) if key == failed.name else f"not timed: {culprit} failed meanwhile"
        return
    rates = {name: yardstick.amount / statistics.median(times[name]) / 1e9 for name, yardstick in yardsticks.items()}
    for key, one in right.items():
        one.finish()
        add_figures(one.row, times[key])
    for one in participants:
        one.row.copy_gb_per_s, one.row.matmul_gflop_per_s = rates.get("copy"), rates.get("matmul")


def add_figures(row: Row, seconds: Iterable[float]) -> None:
    """Fill in the median of the times, their quartiles, and the rates that follow from it."""
    ms = [1e3 * s for s in seconds]
    row.n, row.median_ms = len(ms), statistics.median(ms)
    row.q1_ms, row.q3_ms = quartiles(ms)
    if row.bytes_moved is None:
        row.images_per_s = 1e3 * row.shape[0] / row.median_ms
    else:
        row.gb_per_s = row.bytes_moved / row.median_ms / 1e6
    if row.flop is not None:
        row.gflop_per_s = row.flop / row.median_ms / 1e6


def time_rounds(timers: Mapping[_Name, Timer], budget: Budget) -> dict[_Name, list[float]]:
    """Seconds by each timer, in rounds: each round takes each once, in a new order, so that all see the same noise.

    Raises:
        CallError: one of them failed.
    """
    order, shuffle = list(timers), random.Random(0).shuffle
    times: dict[_Name, list[float]] = {name: [] for name in order}
    start = time.perf_counter()
    while not budget.enough(len(times[order[0]]), time.perf_counter() - start):
        shuffle(order)
        for name in order:
            try:
                times[name].append(timers[name]())
            except Exception as error:
                raise CallError(name, error) from error
    return times


def clock(device: str) -> Clock:
    """Of a device."""
    return cpu_seconds if device == "cpu" else gpu_clock(device)


def cpu_seconds(call: Call) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def gpu_clock(device: str) -> Clock:
    """A clock for calls on a GPU, whose L2 cache it overwrites first.

    While the GPU is busy with that, the host gets ahead of it, so that what is measured is the GPU's time and not the
    launches', as long as a call's launches take no longer.
    """
    cache = torch.empty(_OVERWRITTEN, dtype=torch.uint8, device=device)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(call: Call) -> float:
        cache.zero_()
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    return seconds
