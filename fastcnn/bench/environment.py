"""What the figures were taken on: versions, processor, threads."""

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__, backends


def environment(device: str = "cpu") -> dict[str, str | int | None]:
    """Versions, the processor, and how many threads are in use; None where something is not there."""
    return {
        **(_gpu(device) if device != "cpu" else {}),
        "fastcnn": __version__,
        "sources": sources_digest(),
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


def sources_digest() -> str | None:
    """A hash of the sources that a CPU runs, without the benchmark itself; None where there is no checkout.

    It tells whether figures are those of the sources that stand beside them.
    """
    package = Path(__file__).parents[1]
    root = package.parent
    if not (root / "csrc").is_dir():
        return None
    files = [*(root / "csrc").rglob("*"), *package.rglob("*.py"), root / "setup.py"]
    elsewhere = [
        root / "csrc/cuda",
        package / "bench",
        *(package / "ops" / name for name in ("cuda", "cudnn", "triton")),
    ]
    digest = hashlib.sha256()
    for file in sorted(files):
        if file.is_file() and not any(file.is_relative_to(folder) for folder in [*elsewhere, package / "kernels"]):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def convolution_precision(name: str) -> Iterator[None]:
    """How cuDNN, and our kernels with it, multiply float32 in convolutions: "tf32" or "ieee"."""
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, conv.fp32_precision = conv.fp32_precision, name
    try:
        yield
    finally:
        conv.fp32_precision = before


def _gpu(device: str) -> dict[str, str | int | None]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_memory": properties.total_memory,
        "gpu_processors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "convolution_precision": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
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
