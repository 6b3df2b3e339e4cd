"""What the figures were taken on: versions, processor, threads."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__, backends


def environment() -> dict[str, str | int | None]:
    """Versions, the processor, and how many threads are in use; None where something is not there."""
    return {
        "fastcnn": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": backends._C.cpu_capability() if backends._C is not None else None,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
