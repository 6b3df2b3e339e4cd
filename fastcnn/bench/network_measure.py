"""Check a network, then take the times: every provider of a case in turn, one call each a round."""

import ctypes
import gc
import statistics
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import torch

from .. import backends
from .cases import DTYPES, Case
from .inputs import images
from .measure import Budget, add_median, held_bytes, matmul, reason, time_rounds
from .network_providers import Entry, NetworkProvider, prepare
from .network_verify import check_network, expected_of_network
from .networks import count_flop, make_network
from .rows import Row, add_ratios

MATMUL = 2048  # height and width of the matrices whose product stands for the machine's rate
PEAK_CALLS = 3  # which holes of its heap the C library fills is chance; the least growth is closest to what is in use


def measure_network(case: Case, providers: Iterable[NetworkProvider], budget: Budget, device: str = "cpu") -> list[Row]:
    """A row for each provider that takes part in the case: checked, and if right then timed, on photographs.

    A torch provider that fails in 16 bits also runs in fp32, in the row named "... (fp32)".
    """
    torch.compiler.reset()  # a new shape is a new compilation, and there is a limit to those of one function
    rows: list[Row] = []
    entries: dict[str, Entry] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain, fused = make_network(case, plain=True), make_network(case, plain=False)
        fused.load_state_dict(plain.state_dict())
        plain, fused = plain.to(device), fused.to(device)
        x = images(case.shape[0], case.shape[2]).to(device)
        labels = torch.randint(1000, case.shape[:1]).to(device)
        flop = count_flop(case, plain)
        expected = expected_of_network(case, plain, x, labels)

        def take_part(provider: NetworkProvider, name: str, case: Case, row_case: Case) -> None:
            row = Row(**asdict(row_case), provider=name, flop=flop)
            rows.append(row)
            try:
                before = resident_bytes(device)
                entry = prepare(provider, case, deepcopy(fused if provider.fused else plain), x, labels)
                row.error, row.tolerance = check_network(case, entry.check(), expected)
                entry.call()  # the warm-up
                after = resident_bytes(device)
                row.resident_bytes = None if before is None or after is None else after - before
                if entry.forward is not None:
                    assert entry.network is not None
                    row.saved_bytes = held_bytes(entry.forward, entry.network.parameters())
                row.peak_bytes = peak_bytes(entry.call) if device == "cpu" else gpu_peak_bytes(entry.call, device)
            except Exception as error:
                row.failure = reason(error)
            else:
                entries[name] = entry

        for provider in providers:
            if not provider.takes_part(case):
                continue
            take_part(provider, provider.name, case, case)
            failed = provider.name.startswith("torch.") and rows[-1].failure is not None
            if failed and case.dtype != "fp32":
                take_part(provider, f"{provider.name} (fp32)", replace(case, dtype="fp32"), case)
        if entries:
            _add_times(case, rows, entries, budget, device)
    return rows


def _add_times(case: Case, rows: list[Row], entries: dict[str, Entry], budget: Budget, device: str) -> None:
    product, product_flop = matmul(MATMUL if device == "cpu" else 4 * MATMUL, DTYPES[case.dtype], device)
    for entry in entries.values():
        if entry.laps is not None:
            entry.laps.clear()
    calls = {name: entry.call for name, entry in entries.items()}
    times = time_rounds({**calls, "matmul": product}, budget, device)
    rate = product_flop / statistics.median(times["matmul"]) / 1e9
    for row in rows:
        row.matmul_gflop_per_s = rate
        if row.provider not in entries:
            continue
        median_ms = add_median(row, times[row.provider])
        assert row.flop is not None
        row.images_per_s, row.gflop_per_s = 1e3 * case.shape[0] / median_ms, row.flop / median_ms / 1e6
        laps = entries[row.provider].laps
        if laps is not None:
            row.forward_ms, row.backward_ms, row.update_ms = (
                1e3 * statistics.median(part) for part in (laps.forward, laps.backward, laps.update)
            )
    add_ratios(rows)


def resident_bytes(device: str = "cpu") -> int | None:
    """What the process holds in memory, or PyTorch's tensors on a GPU, without what is free; None if unknown.

    On the CPU only Linux tells.
    """
    gc.collect()
    if device != "cpu":
        return torch.cuda.memory_allocated(device)
    try:
        return _without_free_memory()
    except (OSError, AttributeError):
        return None


def peak_bytes(run: Callable[[], object]) -> int | None:
    """By how much the process's memory grows at most during a call, beyond what it holds before; None if unknown.

    What a runtime keeps for itself from call to call is therefore not in it. Only Linux tells.
    """

    def growth() -> int:
        before = _without_free_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        run()
        return max(_status("VmHWM") - before, 0)

    try:
        return min(growth() for _ in range(PEAK_CALLS))
    except (OSError, AttributeError):
        return None


def gpu_peak_bytes(run: Callable[[], object], device: str) -> int:
    """By how much PyTorch's memory on a GPU grows at most during a call."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _without_free_memory() -> int:
    """The process's memory after what was freed and not given back, in which growth would hide, has been."""
    backends.release_memory()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field}")
