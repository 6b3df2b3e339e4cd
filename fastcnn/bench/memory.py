"""Memory that a call takes, keeps for backward, or leaves behind."""

import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .. import backends

PEAK_CALLS = 3  # which holes of its heap the C library fills is chance; the least growth is closest to what is in use


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Memory that autograd holds for the backward of what ``forward`` returns, each storage once, without parameters'.

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
        output = forward()
    del output
    return sum(storage.nbytes() for storage in storages.values())


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


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int | None:
    """By how much memory grows at most during a call, beyond what is held before; None if unknown.

    On a GPU it is PyTorch's; on a CPU the process's, in which what a runtime keeps for itself from call to call is not
    counted, and only Linux tells.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before

    def growth() -> int:
        before = _without_free_memory()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        run()
        return max(_status("VmHWM") - before, 0)

    try:
        return min(growth() for _ in range(PEAK_CALLS))
    except (OSError, AttributeError):
        return None


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
