"""What training and packing have in common: the processes of torch's DataLoader, numbers that are given to them."""

from __future__ import annotations

import multiprocessing
import operator
import os
import signal
from typing import TypeVar

_T = TypeVar("_T")


def cpus() -> int:
    """How many CPUs this process may use; under torchrun, its part of those of all ranks on this machine."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, here // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def integer(name: str, value: object) -> int:
    """An argument that must be an integer, of Python, numpy or torch.

    Raises:
        TypeError: it is none, or a bool.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    return operator.index(value)


_parent: int | None = None  # of a worker, when it began


def watch_parent(process: int, worker: int) -> None:
    """The ``worker_init_fn`` of processes that ``process`` starts: one that has lost it already ends, as torch's do
    later. Ctrl-C, of which a terminal tells them too, is for it to act on."""
    global _parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _parent = os.getppid()
    if multiprocessing.get_start_method() == "fork" and _parent != process:
        os._exit(1)


def end_if_orphaned() -> None:
    """End a worker whose parent was killed."""
    if _parent is not None and os.getppid() != _parent:
        os._exit(1)


def same(value: _T) -> _T:
    """A ``collate_fn`` for what is a batch already."""
    return value
