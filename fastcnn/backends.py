"""Which implementations are here, and which one runs.

``cpu`` are the C++ kernels, ``triton`` and ``cuda`` the GPU ones, ``reference`` is plain PyTorch and always there.
The environment variable ``FASTCNN_BACKEND`` or :class:`use` forces one; otherwise the fastest that can run is chosen,
inside each op, on real tensors.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Collection
from types import ModuleType
from typing import Any

from torch import Tensor

NAMES = ("reference", "cpu", "triton", "cuda")

_C: ModuleType | None
try:
    _C = importlib.import_module("fastcnn._C")  # registers torch.ops.fastcnn_cpu
    _why_no_cpu = ""
except ImportError as error:
    _C = None
    _why_no_cpu = (
        f"the C++ library is not built or does not load ({error}); with a C++ compiler, "
        "`pip install --no-build-isolation -e .` in the source tree builds it"
    )


def status() -> dict[str, str]:
    """Each backend's name -> why it cannot run here, or an empty string if it can."""
    return {
        "reference": "",
        "cpu": _why_no_cpu,
        "triton": "this version of fastcnn has no Triton kernels yet",
        "cuda": "this version of fastcnn has no CUDA kernels yet",
    }


def available() -> tuple[str, ...]:
    """Names of the backends that can run here."""
    return tuple(name for name, why_not in status().items() if not why_not)


def _check(name: str) -> str:
    why_not = status().get(name)
    if why_not is None:
        raise ValueError(f"unknown backend {name!r}; allowed are {', '.join(NAMES)}")
    if why_not:
        raise RuntimeError(f"backend {name!r} cannot run here: {why_not}. Available are {', '.join(available())}")
    return name


_forced: str | None = None
if os.environ.get("FASTCNN_BACKEND"):
    _forced = _check(os.environ["FASTCNN_BACKEND"])


class use:
    """Force one backend for all operators, or with None let each op choose again.

    Works from the call on, or as a context manager until the block ends::

        fastcnn.backends.use("reference")
        with fastcnn.backends.use("cpu"):
            ...

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend cannot run on this machine.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None:
            _check(name)
        self._previous = _forced
        _forced = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: Any) -> None:
        global _forced
        _forced = self._previous


_warned = False


def choose(op: str, implementations: Collection[str], tensor: Tensor) -> str:
    """The backend that runs ``op``, one of ``implementations``, on a tensor like this one."""
    device = tensor.device.type
    if _forced is not None:
        runs = _forced in implementations and (_forced == "reference" or (_forced == "cpu") == (device == "cpu"))
        if not runs:
            works = [n for n in implementations if n == "reference" or (n == "cpu" and device == "cpu" and _C)]
            raise RuntimeError(
                f"fastcnn::{op}: the forced backend {_forced!r} cannot run on {device} tensors; "
                f"{' or '.join(works)} can"
            )
        return _forced
    if device == "cpu" and "cpu" in implementations:
        if _C is not None:
            return "cpu"
        global _warned
        if not _warned:
            _warned = True
            warnings.warn(f"fastcnn runs in plain PyTorch: {_why_no_cpu}", stacklevel=2)
    return "reference"
