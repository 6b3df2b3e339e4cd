"""Which implementations are here, and which one runs.

``cpu`` are the C++ kernels, ``triton`` and ``cuda`` the GPU ones, ``reference`` is plain PyTorch and always there.
The environment variable ``FASTCNN_BACKEND`` or :class:`use` forces one; otherwise the fastest that can run is chosen,
inside each op, on real tensors. Convolutions also have ``cudnn``, which runs on GPUs where no backend is forced.
"""

import functools
import importlib
import importlib.util
import json
import math
import os
import warnings
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .memory_format import is_channels_last

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


_C_cuda: ModuleType | None = None
_why_no_cuda_library = ""
if torch.version.cuda is not None:
    try:
        _C_cuda = importlib.import_module("fastcnn._C_cuda")  # registers torch.ops.fastcnn_cuda
    except ImportError as error:
        _why_no_cuda_library = (
            f"the CUDA library is not built or does not load ({error}); with nvcc, "
            "`pip install --no-build-isolation -e .` in the source tree builds it"
        )

_FASTER = Path(__file__).with_name("faster.json")
_SMALL = 2**20  # elements of a tensor below which the host's time counts, and C++ launches sooner than Python


def cpu_capability() -> str:
    """Which C++ kernels run: baseline, avx2 or avx512. Nothing where they are not here."""
    return "" if _C is None else _C.cpu_capability()


def release_memory() -> None:
    """Give the memory of large outputs and gradients on CPU, which is kept for the next ones (at most 512 MB), back to
    the system."""
    if _C is not None:
        _C.release_memory()


@functools.lru_cache(maxsize=1024)
def _faster(op: str, dtype: torch.dtype, channels_last: bool, elements: int) -> tuple[str, ...]:
    """Triton or CUDA C++ first: as ``faster.json``, made by ``make roofline``, has it for a tensor of about this size.

    Where it says nothing, CUDA C++.
    """
    sizes = _sizes().get((op, str(dtype).removeprefix("torch."), channels_last))
    if not sizes or sizes[min(sizes, key=lambda size: abs(math.log(size / elements)))] == "cuda":
        return ("cuda", "triton")
    return ("triton", "cuda")


@functools.cache
def _sizes() -> dict[tuple[str, str, bool], dict[int, str]]:
    """Operator, dtype and whether channels are last -> elements -> the faster backend."""
    sizes: dict[tuple[str, str, bool], dict[int, str]] = {}
    for op, dtype, channels_last, elements, backend, _ in json.loads(_FASTER.read_text())["rows"]:
        sizes.setdefault((op, dtype, channels_last), {})[elements] = backend
    return sizes


def _preferred(op: str, tensor: Tensor) -> tuple[str, ...]:
    """The backends that are made for tensors like this one, the fastest first."""
    device = tensor.device.type
    if device != "cuda":
        return ("cpu",) if device == "cpu" else ()
    if op.startswith("conv2d_relu"):
        return ("cudnn", "triton", "cuda")
    if tensor.numel() < _SMALL:
        return ("cuda", "triton")
    return _faster(op, tensor.dtype, is_channels_last(tensor), tensor.numel())


# Triton reads it when the kernels are imported; one of its own words for yes.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

_HOW_TO_INTERPRET = (
    "with TRITON_INTERPRET=1 in the environment, CPU tensors run its kernels in Triton's interpreter (slowly)"
)


def why_not(name: str, device: torch.device) -> str:
    """Why the backend cannot run on tensors of this device, or an empty string if it can."""
    if name == "reference":
        return ""
    if name == "cpu":
        return _why_no_cpu if device.type == "cpu" else "it is for CPU tensors"
    if name == "cudnn":
        return "" if device.type == "cuda" else "it is for tensors on a GPU"
    if name == "triton":
        return _why_no_triton(device.type, device.index)
    return _why_no_cuda(device.type, device.index)


@functools.cache
def _why_no_cuda(device: str, index: int | None) -> str:
    if device != "cuda" or torch.version.cuda is None:
        return "it is for tensors on an NVIDIA GPU" + ", and this torch is built without CUDA" * (
            not torch.version.cuda
        )
    if _C_cuda is None:
        return _why_no_cuda_library
    driver, needed = _C_cuda.driver_version(), _C_cuda.runtime_version()
    if driver // 1000 < needed // 1000:  # within a major version any driver will do
        return (
            f"the NVIDIA driver is made for CUDA {driver // 1000}.{driver % 1000 // 10}, and the library needs one for "
            f"{needed // 1000}.0 or later: update the driver, or build with the nvcc of an older CUDA"
        )
    capability = torch.cuda.get_device_capability(index)
    architectures = _C_cuda.build_info()["architectures"]
    if not _runs_on(architectures, capability):
        major, minor = capability
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and the library was built "
            f"for {architectures}; FASTCNN_CUDA_ARCHS={major}{minor} builds it for that"
        )
    return ""


def _runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on later devices of the same major version; the last architecture is there as PTX, for all."""
    built = [divmod(int(name.removeprefix("sm_")), 10) for name in architectures.split(", ")]
    return any(b[0] == capability[0] and b <= capability for b in built) or capability >= built[-1]


@functools.cache
def _why_no_triton(device: str, index: int | None) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` on Linux x86-64 installs it"
    if INTERPRETING:
        return "" if device == "cpu" else "TRITON_INTERPRET is set, and the interpreter runs on CPU tensors"
    if device != "cuda" or torch.version.cuda is None:
        return f"it is for tensors on an NVIDIA GPU; {_HOW_TO_INTERPRET}"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and 8.0 is needed"
    return ""


def _devices(type: str) -> list[torch.device]:
    if type == "cuda":
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [torch.device(type)]


def status() -> dict[str, str]:
    """Each backend's name -> why it cannot run here, or an empty string if it can."""
    return {name: _why_nowhere(name) for name in NAMES}


def _why_nowhere(name: str) -> str:
    reasons = [why_not(name, device) for type in ("cuda", "cpu") for device in _devices(type)]
    return "" if "" in reasons else reasons[0]


def available() -> tuple[str, ...]:
    """Names of the backends that can run here."""
    return tuple(name for name, why_not in status().items() if not why_not)


def _check(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; allowed are {', '.join(NAMES)}")
    why = _why_nowhere(name)
    if why:
        raise RuntimeError(f"backend {name!r} cannot run here: {why}. Available are {', '.join(available())}")
    return name


def forced() -> str | None:
    """The backend that all operators must run, None where each chooses."""
    return _forced


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


_warned: set[str] = set()


def runs_cpu_kernels() -> bool:
    """Whether the C++ kernels run on CPU tensors: they are there, and no other backend is forced."""
    return not _why_no_cpu if _forced is None else _forced == "cpu"


def choose(op: str, implementations: Collection[str], tensor: Tensor) -> str:
    """The backend that runs ``op``, one of ``implementations``, on a tensor like this one."""
    device = tensor.device
    if device.type == "cpu" and "cpu" in implementations and runs_cpu_kernels():
        return "cpu"
    if _forced is not None:
        if _forced not in implementations:
            why = "it has no such operator"
        else:
            why = why_not(_forced, device)
            if not why:
                return _forced
        works = [name for name in implementations if not why_not(name, device)]
        raise RuntimeError(
            f"fastcnn::{op}: the forced backend {_forced!r} cannot run on {device.type} tensors; "
            f"{' or '.join(works)} can ({why})"
        )
    reasons = []
    for name in _preferred(op, tensor):
        if name in implementations:
            why = why_not(name, device)
            if not why:
                return name
            reasons.append(why)
    if reasons and device.type not in _warned:
        _warned.add(device.type)
        where = "" if device.type == "cpu" else f" on {device.type} tensors"
        warnings.warn(f"fastcnn runs in plain PyTorch{where}: {'; '.join(reasons)}", stacklevel=2)
    return "reference"
