"""What the processes of torch's DataLoader have in common, be it for training or for packing."""

from __future__ import annotations

import os
from typing import TypeVar

_T = TypeVar("_T")


def cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def same(value: _T) -> _T:
    """A ``collate_fn`` for what is a batch already."""
    return value
