"""What the launchers of Triton kernels share. Triton is imported by the first of them: fastcnn works without it."""

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...memory_format import is_channels_last
from .parameters import Layout

_NOTHING = contextlib.nullcontext()
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@functools.cache
def kernels(op: str) -> Any:
    """The module ``fastcnn.kernels.<op>``."""
    return importlib.import_module(f"fastcnn.kernels.{op}")


def launch(kernel: Any, programs: int, *tensors: Tensor | None, num_warps: int, **parameters: Any) -> None:
    """Run ``programs`` of ``kernel``, on the device of its first tensor and that device's current stream.

    Raises:
        torch.OutOfMemoryError: there is no memory for it.
        RuntimeError: it cannot be compiled, loaded or launched. The message names the kernel.
    """
    if programs == 0:
        return
    x = tensors[0]
    assert x is not None
    with _on_device_of(x):
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        try:
            with _relaxed_capture() if capturing else _NOTHING:
                # Versions of Triton differ in the default of enable_fp_fusion; a fused multiply-add only rounds less.
                kernel[(programs,)](*tensors, **parameters, num_warps=num_warps, enable_fp_fusion=True)
        except Exception as error:
            kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else RuntimeError
            name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
            raise kind(f"Triton kernel {name} ({programs} programs of {num_warps} warps): {error}") from error


@contextlib.contextmanager
def _relaxed_capture() -> Iterator[None]:
    """Lets this thread load machine code, as a kernel's first launch does, while a CUDA graph is captured."""
    before = _exchange_capture_mode(_RELAXED)
    try:
        yield
    finally:
        _exchange_capture_mode(before)


def _exchange_capture_mode(mode: int) -> int:
    """Sets the thread's capture mode, and returns the one it had."""
    exchanged = ctypes.c_int(mode)
    error = _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(exchanged))
    if error:
        raise RuntimeError(f"cuThreadExchangeStreamCaptureMode failed with CUDA error {error}")
    return exchanged.value


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _on_device_of(x: Tensor) -> torch.cuda.device:
    return torch.cuda.device(x.device.index if x.is_cuda else -1)  # -1: stay where we are


@functools.cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors; those of an H100 in the interpreter, so that it runs what a GPU would."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of the GPU of ``x``; without one, of that which is compiled for, in the interpreter 9.0."""
    if x.is_cuda:
        return torch.cuda.get_device_capability(x.device)
    if backends.INTERPRETING:
        return 9, 0
    driver = importlib.import_module("triton.runtime").driver
    major, minor = divmod(driver.active.get_current_target().arch, 10)
    return major, minor


def sizes(x: Tensor, y: Tensor) -> dict[str, int]:
    """Height and width of the maps of an operator's input and output, by the names that kernels have for them."""
    return dict(zip(("H", "W", "OH", "OW"), (*x.shape[2:], *y.shape[2:]), strict=True))


def layout(x: Tensor, channels: int, share: tuple[int, int], block: int, lanes: int) -> Layout:
    """How ``lanes`` lanes, ``block`` of them a program, share out a tensor like ``x``.

    Args:
        channels: of a group.
        share: how many of them a lane owns, and how many it loads at once.
    """
    last, acc = is_channels_last(x), acc_dtype(x.dtype)
    return Layout(x.shape[1], channels, *share, x.shape[1] if last else 1, last, block, index_dtype(lanes), acc)


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def acc_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of the dtype in which tensors of ``dtype`` are computed."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def index_dtype(items: int) -> Any:
    """Triton's name of the dtype in which so many items, and a block beyond them, can be counted."""
    import triton.language as tl

    return tl.int32 if items < 2**31 - 2**16 else tl.int64


def vector(channels: int, x: Tensor) -> int:
    """How many of so many channels_last channels to load at once: a divisor, of at most 16 bytes."""
    return min(channels & -channels, 16 // x.element_size())
