"""Check the outputs, then take the times: every provider of a case in turn, one call each a round."""

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .. import backends
from .cases import Case
from .inputs import make_inputs, make_parameters
from .peers import NotInstalled
from .providers import Call, Op, Provider, build
from .rows import Row, add_ratios
from .verify import Mismatch, check, expected_outputs, tolerances

_OVERWRITTEN = 2**28  # bytes, more than any L2 cache has
_MATMUL = 8192  # height and width of the matrices whose product stands for a GPU's rate


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


def saved_bytes(op: Op, x: Tensor, *parameters: Tensor) -> int:
    """Memory that autograd holds between forward and backward of ``op``, its input included, each storage once."""
    leaf = x.detach().requires_grad_()
    return held_bytes(lambda: op(leaf, *parameters), parameters)


def held_bytes(run: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Memory that autograd holds for the backward of what ``run`` returns, each storage once, without the parameters'.

    A feature that the caller's loss saves counts, whoever computed it.
    """
    storages = {}
    never = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in never:
            storages[storage.data_ptr()] = storage  # kept, or the allocator could give its address to the next
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(storage.nbytes() for storage in storages.values())


def time_rounds(calls: dict[str, Call], budget: Budget, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every call, in rounds: each round calls each once, in a new order, so that all see the same noise."""
    order, shuffle = list(calls), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in order}
    clock = cpu_seconds if device == "cpu" else gpu_clock(device)
    start = time.perf_counter()
    while not budget.enough(len(times[order[0]]), time.perf_counter() - start):
        shuffle(order)
        for name in order:
            try:
                times[name].append(clock(calls[name]))
            except Exception as error:
                raise CallError(name, error) from error
    return times


class CallError(Exception):
    """A call that worked before failed when its time was taken; after it the device may be lost to all of them."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"{name}: {reason(error)}")
        self.name, self.error = name, error


def cpu_seconds(call: Call) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def gpu_clock(device: str) -> Callable[[Call], float]:
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


def measure(case: Case, providers: Iterable[Provider], source: str, budget: Budget, device: str = "cpu") -> list[Row]:
    """A row for each provider that takes part in the case: checked, and if right then timed.

    In a 16-bit case fastcnn's C++ kernels also run in fp32, and so does a torch provider that has no 16-bit kernels:
    the rows named "... (fp32)".
    """
    providers = [provider for provider in providers if provider.takes_part(case)]
    if not providers:
        return []
    torch.compiler.reset()  # a new shape is a new compilation, and there is a limit to those of one function
    x, dy = make_inputs(case, source, device)
    expected = expected_outputs(case, x, dy)
    rows: list[Row] = []
    calls: dict[str, Call] = {}

    @cache
    def allowed(dtype: torch.dtype) -> list[float]:
        return tolerances(case, x.to(dtype), dy.to(dtype), expected)

    def take_part(provider: Provider, name: str, x: Tensor, dy: Tensor) -> None:
        row = Row(**asdict(case), provider=name, bytes_moved=case.bytes_moved(x.element_size()), flop=case.flop)
        rows.append(row)
        try:
            call = build(provider, case, x, dy)
            row.error, row.tolerance = check(call(), expected, allowed(x.dtype))  # and the warm-up
            if case.mode != "forward":
                with backends.use(provider.backend):
                    parameters = [parameter.requires_grad_() for parameter in make_parameters(case, x)]
                    row.saved_bytes = saved_bytes(provider.op(case), x, *parameters)
        except Exception as error:
            row.failure = reason(error)
        else:
            calls[name] = call

    for provider in providers:
        take_part(provider, provider.name, x, dy)
        failed_torch = provider.name.startswith("torch.") and rows[-1].failure is not None
        if case.dtype != "fp32" and (provider.name == "fastcnn.cpu" or failed_torch):
            take_part(provider, f"{provider.name} (fp32)", x.float(), dy.float())
    if calls:
        try:
            add_times(rows, calls, x, budget, device)
        except CallError as failed:
            for row in rows:
                if row.provider == failed.name:
                    row.failure = reason(failed.error)
    return rows


def reason(error: Exception) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if isinstance(error, Mismatch | NotInstalled) else f"{type(error).__name__}: {text[:120]}"


def add_times(rows: list[Row], calls: dict[str, Call], x: Tensor, budget: Budget, device: str) -> None:
    copy = torch.zeros_like(x)
    others: dict[str, Call] = {"copy": lambda: (copy.copy_(x),)}
    if rows[0].flop and device != "cpu":
        others["matmul"], flop = matmul(_MATMUL, x.dtype, device)
    times = time_rounds({**calls, **others}, budget, device)
    copy_gb_per_s = 2 * x.nbytes / statistics.median(times["copy"]) / 1e9
    for row in rows:
        row.copy_gb_per_s = copy_gb_per_s
        if "matmul" in times:
            row.matmul_gflop_per_s = flop / statistics.median(times["matmul"]) / 1e9
        if row.provider in calls:
            median_ms = add_median(row, times[row.provider])
            assert row.bytes_moved is not None
            row.gb_per_s = row.bytes_moved / median_ms / 1e6
            row.gflop_per_s = row.flop / median_ms / 1e6 if row.flop else None
    add_ratios(rows)


def matmul(size: int, dtype: torch.dtype, device: str) -> tuple[Call, int]:
    """A product of square matrices, whose rate stands for the machine's, and its operations."""
    a, b = torch.randn(2, size, size).to(device, dtype)
    product = torch.mm(a, b)
    return lambda: (torch.mm(a, b, out=product),), 2 * size**3


def add_median(row: Row, seconds: Iterable[float]) -> float:
    """Fill in the median of the times, in milliseconds, and their quartiles; return the median."""
    ms = [1e3 * s for s in seconds]
    median = statistics.median(ms)
    row.n, row.median_ms = len(ms), median
    row.q1_ms, _, row.q3_ms = statistics.quantiles(ms, method="inclusive") if len(ms) > 1 else ms * 3
    return median
