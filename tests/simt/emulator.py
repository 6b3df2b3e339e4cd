"""The CUDA kernels of csrc/cuda, compiled as C++ with a sanitizer and run on the CPU by tests/simt/emulator.h."""

from __future__ import annotations

import fcntl
import os
import pickle
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ninja
import pybind11
import torch
import torch.nn.functional as F
from operators import Case
from places import Place, Results
from promises import assert_bitwise
from torch import Tensor

from fastcnn import LRNParams, PoolParams
from fastcnn.memory_format import as_new, format_of
from fastcnn.ops.cpu import batch_norm_relu_max_pool2d as batch_norm
from fastcnn.params import AugmentParams, BatchNormParams, opmath

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
}


def why_not() -> str:
    """Why the emulator cannot be built here; empty if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the emulator's sanitizers are those of Linux on x86-64"
    return "" if shutil.which("g++") and "/" in _library("libasan.so") else "there is no g++ with sanitizers"


def _library(name: str) -> str:
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def build(sanitizer: str) -> Path:
    """Compile what changed, one process at a time, and return the module's path."""
    directory = ROOT / "build" / "simt" / sanitizer
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(sanitizer, directory)


def _build(sanitizer: str, directory: Path) -> Path:
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"], str(HERE)]
    flags = [f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all", *(f"-isystem {i}" for i in includes)]
    flags += ["-std=c++20", "-Og", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += ["-Wno-tsan", "-DFASTCNN_SIMT_EMULATOR", f"-DFASTCNN_MODULE=simt_{sanitizer}"]
    kernels = [source for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) if source.stem != "device"]
    sources = [HERE / "emulator.cpp", HERE / "module.cpp", HERE / "planted.cu", *kernels]
    target = directory / f"simt_{sanitizer}.so"
    with open(directory / "build.ninja", "w") as file:
        n = ninja.ninja_syntax.Writer(file, width=120)
        n.rule("cxx", f"g++ -MMD -MF $out.d {' '.join(flags)} -x c++ -c $in -o $out", depfile="$out.d", deps="gcc")
        n.rule("link", f"g++ -shared -fsanitize={SANITIZERS[sanitizer]} $in -o $out")
        objects = [str(directory / f"{source.stem}.o") for source in sources]
        for source, target_object in zip(sources, objects, strict=True):
            n.build(target_object, "cxx", str(source))
        n.build(str(target), "link", objects)
    run = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", directory], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return target


class SanitizerError(Exception):
    """A sanitizer ended the emulator; the message is its report."""


class Emulator:
    """The operators under one sanitizer, in a process that starts when first needed and again after an error."""

    def __init__(self, sanitizer: str) -> None:
        self._sanitizer = sanitizer
        self._path = build(sanitizer)
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None
        self._stderr.close()

    def _start(self) -> subprocess.Popen[bytes]:
        # The sanitizer's runtime before any other, and C++'s with it: it looks up __cxa_throw when it starts.
        preload = f"{_library(f'lib{self._sanitizer[0]}san.so')} {_library('libstdc++.so.6')}"
        # ThreadSanitizer cannot do with more random bits in addresses than kernels used to have.
        bits = Path("/proc/sys/vm/mmap_rnd_bits")
        fixed = ["setarch", "-R"] if bits.exists() and int(bits.read_text()) > 28 else []
        environment = {**os.environ, **_OPTIONS}
        command = [
            *fixed,
            "env",
            f"LD_PRELOAD={preload}",
            sys.executable,
            "-S",
            str(HERE / "worker.py"),
            self._path.stem,
            str(self._path),
        ]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._stderr, env=environment)

    def call(self, function: str, task: tuple[Any, ...] | None, *buffers: Any) -> list[bytes]:
        """Run ``function`` and return the bytes of its outputs, the buffers given by their size.

        Args:
            function: of tests/simt/module.cpp; without a ``task``, the name of a kernel in planted.cu.
            buffers: None, ``(bytes, offset)`` of an input, or ``(size, offset)`` of an output; offsets are from an
                address divisible by 16.

        Raises:
            SanitizerError: the sanitizer found an error.
            RuntimeError: the emulator did, or the operator.
        """
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((function, task, buffers), process.stdin)
            process.stdin.flush()
            reply = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            process.wait()
            self._process = None
            self._stderr.seek(0)
            report = self._stderr.read().decode(errors="replace")
            self._stderr.seek(0)
            self._stderr.truncate()
            raise SanitizerError(report) from None
        if isinstance(reply, str):
            raise RuntimeError(reply)
        return reply

    # -- the operators, as fastcnn/ops calls them ---------------------------------------------------------------------

    def forward(
        self,
        name: str,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        relu: bool = False,
        lrn: LRNParams | None = None,
        pool: PoolParams | None = None,
        with_argmax: bool = True,
        offset: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """y, and the argmax where there is a pool; ``offset`` bytes misalign every tensor."""
        shape = [*x.shape[:2], *(pool.output_size(x.shape[2], x.shape[3]) if pool else x.shape[2:])]
        channels_last = _channels_last(x)
        y = torch.empty(shape, dtype=x.dtype)
        argmax = torch.empty(shape, dtype=_argmax_dtype(pool)) if pool and with_argmax else None
        task = _task(x.dtype, x.shape, channels_last, relu, lrn, pool)
        results = self.call(name, task, _in(x, offset), _in(bias, 0), _out(y, offset), _out(argmax, offset))
        outputs = [_tensor(r, t, channels_last) for r, t in zip(results, (y, argmax), strict=False) if t is not None]
        return outputs[0], outputs[1] if argmax is not None else None

    def backward(
        self,
        name: str,
        dy: Tensor,
        x: Tensor,
        bias: Tensor | None = None,
        argmax: Tensor | None = None,
        *,
        relu: bool = False,
        lrn: LRNParams | None = None,
        pool: PoolParams | None = None,
        offset: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """dx, and the bias gradient where there is a bias; x itself is not handed over where no part reads it."""
        channels_last = _channels_last(x)
        task = _task(x.dtype, x.shape, channels_last, relu, lrn, pool)
        read = _in(x, offset) if relu or lrn else None
        buffers = (
            _in(_like(dy, x), offset),
            read,
            _in(bias, 0),
            None if argmax is None else _in(_like(argmax, x), offset),
        )
        results = self.call(name, task, *buffers, _out(x, offset), _out(bias, 0))
        dx = _tensor(results[0], x, channels_last)
        return dx, None if bias is None else _tensor(results[1], bias, False)

    def conv2d_relu(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        offset: int = 0,
    ) -> Tensor:
        y = torch.empty(F.conv2d(x.to("meta"), weight.to("meta"), None, stride, padding, dilation, groups).shape)
        channels_last = _channels_last(x)
        rows = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
        rows = F.pad(rows, (0, -rows.shape[1] % 8))
        window = [tuple(weight.shape[2:]), stride, padding, dilation]
        task = (
            *(_DTYPES.index(x.dtype), list(x.shape), channels_last, groups, weight.shape[0], rows.shape[1]),
            *(window, list(y.shape[2:])),
        )
        y = y.to(x.dtype)
        (result,) = self.call("conv2d_relu", task, _in(x, offset), _in(rows, 0), _in(bias, 0), _out(y, offset))
        return _tensor(result, y, channels_last)

    def augment(self, *tensors: Tensor | None, offset: int = 0, **kwargs: Any) -> Tensor:
        """``offset`` bytes misalign pictures and crops."""
        crop, scale, dtype, channels_last = AugmentParams(**kwargs).op_args()
        pictures, offsets, mirror, mean, sizes = tensors
        assert pictures is not None
        assert mean is not None
        y = torch.empty(len(pictures), 3, *crop, dtype=dtype)
        task = _DTYPES.index(dtype), list(pictures.shape), tuple(crop), channels_last, scale
        choices = (_in(t, 0) for t in (offsets, mirror, mean.to(opmath(dtype)), sizes))
        (result,) = self.call("augment", task, _in(pictures, offset), *choices, _out(y, offset))
        return as_new(_tensor(result, y, channels_last), format_of(channels_last))


@dataclass(frozen=True)
class BatchNorm:
    """The private ops of batch norm, as ``torch.ops.fastcnn_cuda`` has them, for what calls these.

    Args:
        offset: bytes that misalign maps.
    """

    emulator: Emulator
    offset: int = 0

    def batch_norm_statistics(
        self, x: Tensor, mean: Tensor, var: Tensor, channels_last: bool, relu_first: bool
    ) -> None:
        task = self._task(x, channels_last, True, 0.0, True, relu_first, [], [], [], [], False)
        self._call("batch_norm_statistics", task, [x], [mean, var])

    def batch_norm_relu_max_pool2d(self, *arguments: Any) -> None:
        *inputs, y, argmax, channels_last = arguments[:8]
        task = self._task(inputs[0], channels_last, *arguments[8:])
        self._call("batch_norm_relu_max_pool2d", task, inputs, [y, argmax])

    def batch_norm_relu_max_pool2d_backward(self, *arguments: Any) -> None:
        *inputs, dx, dweight, dbias, channels_last = arguments[:11]
        task = self._task(inputs[1], channels_last, *arguments[11:])
        self._call("batch_norm_relu_max_pool2d_backward", task, inputs, [dx, dweight, dbias])

    def _task(self, x: Tensor, channels_last: bool, *params: Any) -> tuple[Any, ...]:
        return _DTYPES.index(x.dtype), list(x.shape), channels_last, *params

    def _call(
        self, function: str, task: tuple[Any, ...], inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]
    ) -> None:
        def offset(t: Tensor | None) -> int:
            return self.offset if t is not None and t.dim() == 4 else 0

        buffers = [_in(t, offset(t)) for t in inputs] + [_out(t, offset(t)) for t in outputs]
        written = [t for t in outputs if t is not None]
        for t, result in zip(written, self.emulator.call(function, task, *buffers), strict=True):
            t.copy_(_tensor(result, t, t.dim() == 4 and _channels_last(t)))


@dataclass(frozen=True)
class Emulated(Place):
    """The CUDA kernels of the memory-bound operators, under the sanitizer of this name.

    Args:
        offset: bytes that misalign every tensor.
    """

    emulator: Emulator | None = None
    offset: int = 0
    has_autograd = False

    def run(self, case: Case, tensors: Sequence[Tensor | None], dy: Tensor | None = None) -> Results:
        assert self.emulator is not None
        if not case.op.differentiable:
            return Results(self.emulator.augment(*tensors, offset=self.offset, **case.kwargs), None, None, [])
        if case.op.name == "batch_norm_relu_max_pool2d":
            return self._batch_norm(case, tensors, dy)
        (x, given), name, tail = (*tensors, None)[:2], case.op.name, case.op.tail(case.kwargs)
        assert x is not None
        bias = None if given is None else given.to(opmath(x.dtype))  # as the glue does, and back
        y, argmax = self.emulator.forward(name, x, bias, **tail, offset=self.offset)
        if case.pool:
            alone, _ = self.emulator.forward(name, x, bias, **tail, with_argmax=False, offset=self.offset)
            assert_bitwise(alone, y)
        dy = case.op.draw_gradient(y) if dy is None else dy
        dx, dbias = self.emulator.backward(f"{name}_backward", dy, x, bias, argmax, **tail, offset=self.offset)
        dbias = None if dbias is None or given is None else dbias.to(given.dtype)
        return Results(y, argmax, dy, [dx, dbias][: len(tensors)])

    def _batch_norm(self, case: Case, tensors: Sequence[Tensor | None], dy: Tensor | None) -> Results:
        assert self.emulator is not None
        library, norm = BatchNorm(self.emulator, self.offset), BatchNormParams.from_op(*case.op.params(case))
        x, *running_and_affine = case.op.forward_args(case, tensors)[:5]
        y, argmax, mean, var = batch_norm.forward(x, *running_and_affine, norm, True, library)
        assert_bitwise(batch_norm.forward(x, *running_and_affine, norm, False, library)[0], y)
        dy = case.op.draw_gradient(y) if dy is None else dy
        weight, bias = running_and_affine[2:]
        dx, *gradients = batch_norm.backward(dy, x, mean, var, weight, bias, argmax, norm, library)
        of_affine = [None if t is None else g for t, g in zip((weight, bias), gradients, strict=True)]
        return Results(y, argmax if case.pool else None, dy, [dx, *of_affine])


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last if _channels_last(x) else torch.contiguous_format)


def _argmax_dtype(pool: PoolParams) -> torch.dtype:
    kh, kw = pool.op_args()[0]
    return torch.int32 if kh * kw > 256 else torch.uint8


def _task(
    dtype: torch.dtype,
    shape: Sequence[int],
    channels_last: bool,
    relu: bool,
    lrn: LRNParams | None,
    pool: PoolParams | None,
) -> tuple[Any, ...]:
    lrn_args = lrn.op_args() if lrn else (0, 0.0, 0.0, 0.0, 1)
    pool_args = pool.op_args() if pool else ([], [], [], [], False)
    return (_DTYPES.index(dtype), list(shape), channels_last, relu, lrn_args, *pool_args)


def _in(t: Tensor | None, offset: int) -> tuple[bytes, int] | None:
    """The elements in the order of memory."""
    if t is None:
        return None
    t = t.detach()
    if t.dim() == 4 and _channels_last(t):
        t = t.permute(0, 2, 3, 1)
    return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), offset


def _out(t: Tensor | None, offset: int) -> tuple[int, int] | None:
    return None if t is None else (t.numel() * t.element_size(), offset)


def _tensor(data: bytes, like: Tensor, channels_last: bool) -> Tensor:
    flat = torch.tensor(bytearray(data), dtype=torch.uint8).view(like.dtype)
    if not channels_last:
        return flat.view(like.shape)
    n, c, h, w = like.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)
