"""Which implementation runs a convolution on a GPU.

cuDNN runs. With ``torch.backends.cudnn.benchmark`` every new shape is tuned (``FASTCNN_TUNE=0`` in the environment
leaves it at that): candidates are cuDNN, its own fusion with ReLU, the CUDA kernel and the configurations of the Triton
kernel; only the latter where the backend "triton" is forced. One of these runs only after its output was compared with
cuDNN's, because compilers have got such loops wrong.
"""

import functools
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._version import __version__
from ..memory_format import is_channels_last
from ..params import ConvParams
from .aten import conv2d_relu as aten
from .autotune import Memory, Tuner, cache_folder, milliseconds
from .cuda import conv2d_relu as cuda
from .cudnn import conv2d_relu as cudnn
from .gpu_convolution import precision
from .triton import conv2d_relu as triton

Run = Callable[..., tuple[Tensor, Tensor]]  # of the op's arguments


def select(run: Run, x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvParams, with_mask: bool) -> Run:
    """``run``, the implementation of "cudnn" or "triton", or in its place the fastest candidate where that is tuned."""
    ours = backends.forced() == "triton"
    if not ours and backends.why_not("triton", x.device):
        return aten.forward
    if not x.is_cuda or not triton.can_run(x) or not (ours or _tunes()):
        return run
    runs = candidates(x, weight, conv)
    return runs[choose(runs, x, weight, bias, conv, with_mask)]


def select_backward(run: Callable[..., Any], dy: Tensor, *args: Any) -> Callable[..., Any]:
    """``run``, the implementation of "cudnn", where its kernels for ReLU and bias can run."""
    return aten.backward if backends.why_not("triton", dy.device) else run


def candidates(x: Tensor, weight: Tensor, conv: ConvParams) -> dict[str, Run]:
    """By name, what can run: functions of the op's arguments. cuDNN, or what torch has in its place, is the first."""
    runs: dict[str, Run] = {"cudnn": cudnn.forward}
    if x.is_cuda and torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled:
        runs["cudnn_convolution_relu"] = cudnn.fused
    if cuda.can_run(x):
        runs["cuda"] = cuda.run
    for config in triton.configurations(x, weight, conv.groups):
        runs[str(config)] = functools.partial(triton.forward, config=config)
    return runs


def choose(
    runs: dict[str, Run], x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvParams, with_mask: bool
) -> str:
    """The name of the candidate that runs on a GPU."""
    ours = [name for name in runs if name.startswith("triton")]
    tuned = _tunes()
    only_ours = backends.forced() == "triton"
    if not (tuned or only_ours):
        return "cudnn"
    key = _key(x, weight, bias, conv, with_mask) + " triton" * only_ours + " untimed" * (not tuned)
    if torch.cuda.is_current_stream_capturing():  # nothing may be timed, or waited for
        return _tuner().known(key, runs) or "cudnn"
    outputs = {name: functools.partial(_output, run, conv, with_mask) for name, run in runs.items()}
    inputs = functools.partial(_check_inputs, x, weight, bias)
    return _tuner().choose(key, outputs, inputs, tolerance(x.dtype), only=ours if only_ours else (), timed=tuned)


def _tunes() -> bool:
    return torch.backends.cudnn.benchmark and os.environ.get("FASTCNN_TUNE") != "0"


def _output(run: Run, conv: ConvParams, with_mask: bool, *tensors: Tensor | None) -> Tensor:
    return run(*tensors, conv, with_mask)[0]


@functools.cache
def _tuner() -> Tuner:
    return Tuner(Memory(lambda: cache_folder() / "conv2d_relu.json"), milliseconds)


def _key(x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvParams, with_mask: bool) -> str:
    """All that decides which candidate is the fastest and right."""
    versions = __version__, torch.__version__, _triton_version(), torch.version.cuda, torch.backends.cudnn.version()
    tensors = *x.shape, is_channels_last(x), *weight.shape, is_channels_last(weight), bias is not None
    numbers = str(x.dtype), precision(x.dtype), torch.backends.cudnn.deterministic
    return repr((torch.cuda.get_device_name(x.device), versions, tensors, numbers, conv, with_mask))


@functools.cache
def _triton_version() -> str:
    return importlib.metadata.version("triton")


def _check_inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """Random ones like those given, and the same with a weight of NaN, which ReLU must keep."""
    generator = torch.Generator(x.device).manual_seed(0)

    def normal(like: Tensor, scale: float = 1.0) -> Tensor:
        return torch.empty_like(like).normal_(0, scale, generator=generator)

    x, bias = normal(x), None if bias is None else normal(bias)
    return [(x, normal(weight, weight[0].numel() ** -0.5), bias), (x, torch.full_like(weight, float("nan")), bias)]


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference allowed between two correct results; IEEE fp32 allows for Winograd's algorithm."""
    if dtype == torch.float32:
        return 2 * 2**-10 if precision(dtype) == "tf32" else 1e-5
    return 2 * torch.finfo(dtype).eps


def engine(backend: str, device: torch.device) -> str:
    """What computes convolutions where this backend was chosen: rarely a kernel of ours."""
    if device.type == "cuda" and backend != "reference":
        return _engine_on_gpu(device)
    if backend != "cpu":
        return backend
    library = "oneDNN" if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled else "aten"
    return library if backends.cpu_capability() == "baseline" else f"{library}, 3x3 and 5x5 also Winograd"


def _engine_on_gpu(device: torch.device) -> str:
    if backends.forced() == "triton":
        return "triton"
    if backends.forced() == "cuda":  # whose kernel multiplies float32 as TF32
        return "cuda" if precision(torch.float32) == "tf32" else "cuda, in IEEE float32 cuDNN"
    ours = [name for name in ("triton", "cuda") if not backends.why_not(name, device)]
    if _tunes() and ours:
        return f"the fastest of cuDNN, {', '.join(ours)}"
    return "cuDNN"


def backward_engine(backend: str, device: torch.device) -> str:
    """:func:`engine`, of the gradients."""
    return "cuDNN" if device.type == "cuda" else engine(backend, device)
