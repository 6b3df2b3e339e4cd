"""Serving: client threads share one network; each waits for its answer, then asks again.

Providers take turns: a round is a burst of each, with each number of clients. What every client got last in a burst is
checked, as the network's outputs are before the first one.
"""

import math
import random
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from rich.console import Group
from rich.text import Text
from torch import Tensor

from .cases import Case
from .network_workload import NetworkWorkload
from .providers import NetworkProvider
from .report import new_table, number
from .workload import Call, reason

SERVING = ("fastcnn", "torch.eager channels_last", "torch.compile", "onnxruntime", "openvino")


@dataclass
class ServeRow:
    """One provider and a number of clients; without figures where ``failure`` says why. Latencies are of a call."""

    model: str
    batch: int
    size: int
    dtype: str
    clients: int
    provider: str
    failure: str | None = None
    error: float | None = None
    tolerance: float | None = None
    calls: int = 0
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    images_per_s: float | None = None


@dataclass
class Burst:
    """What clients saw: seconds of each call, and of them all from the first to the last; each client's last answer."""

    latencies: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    answers: list[tuple[Tensor, ...]] = field(default_factory=list)


def measure_serving(
    case: Case, providers: Iterable[NetworkProvider], clients: Sequence[int], seconds: float, rounds: int
) -> list[ServeRow]:
    """A row for each provider and number of clients, on photographs."""
    torch.compiler.reset()
    batch, _, size, _ = case.shape
    rows: list[ServeRow] = []
    calls: dict[str, Call] = {}
    workload = NetworkWorkload(case)
    for provider in providers:
        mine = [ServeRow(case.op, batch, size, case.dtype, count, provider.name) for count in clients]
        rows += mine
        try:
            entry = workload.prepare(provider, case.dtype)
            error, tolerance = workload.check(entry.check(), case.dtype)
        except Exception as failed:
            for row in mine:
                row.failure = reason(failed)
        else:
            calls[provider.name] = entry.call
            for row in mine:
                row.error, row.tolerance = error, tolerance
    _add_bursts(workload, rows, calls, seconds, rounds)
    return rows


def _add_bursts(
    workload: NetworkWorkload, rows: list[ServeRow], calls: dict[str, Call], seconds: float, rounds: int
) -> None:
    order, shuffle = [row for row in rows if row.failure is None], random.Random(0).shuffle
    seen = {id(row): Burst() for row in order}
    for _ in range(rounds):
        shuffle(order)
        for row in order:
            if row.failure is not None:
                continue
            try:
                got = burst(calls[row.provider], row.clients, seconds)
                for answer in got.answers:
                    workload.check(answer, workload.case.dtype)
            except Exception as error:
                row.failure = reason(error)
            else:
                seen[id(row)].latencies += got.latencies
                seen[id(row)].elapsed += got.elapsed
    for row in order:
        if row.failure is None:
            add_figures(row, seen[id(row)])


def burst(call: Call, clients: int, seconds: float) -> Burst:
    """Each client calls again and again for this long, but at least once.

    Before, it calls once: what a thread does only the first time, such as starting a team of OpenMP's, is not timed.
    """
    threads = torch.get_num_threads()
    ready = threading.Barrier(clients)

    def client() -> tuple[list[float], float, float, tuple[Tensor, ...]]:
        torch.set_num_threads(threads)  # of this thread's team, which otherwise has one for each core
        try:
            call()
        except BaseException:
            ready.abort()  # or the others would wait forever
            raise
        ready.wait()
        latencies: list[float] = []
        start = now = time.perf_counter()
        while not latencies or now - start < seconds:
            before, answer = now, call()
            now = time.perf_counter()
            latencies.append(now - before)
        return latencies, start, now, answer

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client) for _ in range(clients)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    latencies, starts, ends, answers = zip(*(future.result() for future in futures), strict=True)
    return Burst([one for each in latencies for one in each], max(ends) - min(starts), list(answers))


def add_figures(row: ServeRow, seen: Burst) -> None:
    """Fill in the percentiles of the latencies and the images a second."""
    row.calls = len(seen.latencies)
    row.p50_ms, row.p90_ms, row.p99_ms = (1e3 * percentile(seen.latencies, percent) for percent in (50, 90, 99))
    row.images_per_s = row.batch * row.calls / seen.elapsed


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest of the values that so many percent of them do not exceed."""
    return sorted(values)[math.ceil(percent / 100 * len(values)) - 1]


def serve_tables(rows: Sequence[ServeRow]) -> list[Group]:
    """One table for each network, batch and dtype; in it the providers under each number of clients."""
    titles = dict.fromkeys((row.model, row.batch, row.size, row.dtype) for row in rows)
    return [_table([row for row in rows if (row.model, row.batch, row.size, row.dtype) == title]) for title in titles]


def _table(rows: list[ServeRow]) -> Group:
    first = rows[0]
    title = f"{first.model} serving, batch {first.batch}, {first.size} px, {first.dtype}"
    table = new_table(title, "images/s", "p50 ms", "p90 ms", "p99 ms", "calls")
    for clients in dict.fromkeys(row.clients for row in rows):
        table.add_row(f"{clients} client{'s' if clients > 1 else ''}", style="cyan")
        for row in rows:
            if row.clients != clients:
                continue
            figures = [number(row.images_per_s), *(number(ms, 2) for ms in (row.p50_ms, row.p90_ms, row.p99_ms))]
            missing = "not installed" if (row.failure or "").startswith("not installed") else "[red]failed[/red]"
            cells = [*figures, str(row.calls)] if row.failure is None else [missing]
            table.add_row(f"  {row.provider}", *cells, style="bold" if row.provider == "fastcnn" else "")
    notes = dict.fromkeys(f"{row.provider}: {row.failure}" for row in rows if row.failure is not None)
    return Group(table, *(Text(note, style="red") for note in notes))
