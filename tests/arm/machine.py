"""An ARM machine: csrc/cpu compiled for aarch64, in a process of qemu's emulator, where the ops of fastcnn_cpu run."""

from __future__ import annotations

import fcntl
import os
import platform
import runpy
import shutil
import struct
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import ninja
import setuptools
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PACKAGES = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}  # of Debian
_SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
# As torch numbers them.
_DTYPES = {
    torch.uint8: 0,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}
# The others are memory_op.cpp, which allocates for torch, and module.cpp, which is for Python.
_LEFT_OUT = "memory_op.o", "module.o"
OPS = (
    "augment",
    "batch_norm_relu_max_pool2d",
    "batch_norm_relu_max_pool2d_backward",
    "batch_norm_statistics",
    "change_format",
    "direct_convolution",
    "fingerprint",
    "linear",
    "linear_forward",
    "linear_input_gradient",
    "linear_weight_gradient",
    "lrn",
    "lrn_backward",
    "max_pool2d",
    "max_pool2d_backward",
    "relu_lrn_max_pool2d",
    "relu_lrn_max_pool2d_backward",
    "relu_mask",
    "relu_mask_backward",
    "winograd",
    "winograd_gradient",
    "winograd_weight",
)


def why_not() -> str:
    """Why there can be no such machine here; empty if there can."""
    missing = [program for program in PACKAGES if not shutil.which(program)]
    packages = " ".join(PACKAGES[program] for program in missing)
    return f"tests/arm needs {' and '.join(missing)}; on Debian: apt-get install {packages}" if missing else ""


def build(sanitized: bool) -> Path:
    """Compile what changed, and return the program's path."""
    directory = ROOT / "build" / "arm" / ("sanitized" if sanitized else "plain")
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(sanitized, directory)


def _build(sanitized: bool, directory: Path) -> Path:
    """By the ninja file that setup.py would write on such a machine, so with its flags."""
    on_arm = mock.patch.object(platform, "machine", return_value="aarch64")
    environment = {"CXX": COMPILER, "FASTCNN_BUILD_CPP": "1", "FASTCNN_BUILD_CUDA": "0"}
    with on_arm, mock.patch.object(setuptools, "setup"), mock.patch.dict(os.environ, environment):
        setup = runpy.run_path(str(ROOT / "setup.py"))

    class Writer(setup["Writer"]):  # type: ignore[misc]
        """Of a program, in which worker.cpp is in torch's place, instead of a library."""

        def link(self, target: Path, flags: list[str]) -> None:
            self.compile([HERE / "worker.cpp"], [*self.common, *self.library_flags])
            objects = [name for name in self.objects if name not in _LEFT_OUT]
            self.n.rule("link", f"{COMPILER} {' '.join(self.common)} $in -o $out", "link $out")
            self.n.build(str(target), "link", objects)

    target = directory / "worker"
    with open(directory / "build.ninja", "w") as file:
        writer = Writer(ninja.ninja_syntax.Writer(file, width=120))
        writer.common += _SANITIZE if sanitized else []
        writer.cpp_library(target)
    command = [Path(ninja.BIN_DIR) / "ninja", f"-j{os.cpu_count()}", "-C", directory, target]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return target


class MachineError(Exception):
    """The emulated process ended; the message is what it said, as of a sanitizer."""


class Machine:
    """The ops, in a process that starts when first needed and again after an error."""

    def __init__(self, sanitized: bool) -> None:
        self.program = build(sanitized)
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this
        self._lock = threading.Lock()

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
        self._stderr.close()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Here run all calls of the ops, whoever calls them."""
        library = torch.library.Library("fastcnn_cpu", "IMPL", "CPU")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they are overridden
            for name in OPS:
                library.impl(name, partial(self.call, getattr(torch.ops.fastcnn_cpu, name).default))
        try:
            yield
        finally:
            library._destroy()

    def call(self, op: torch._ops.OpOverload, *args: Any) -> Any:
        """The op on copies of the tensors, byte for byte; those that it may write are copied back.

        Its units are shared out in more ranges than torch has threads.

        Raises:
            RuntimeError: the op did.
            MachineError: its process ended.
        """
        parameters, returns = op._schema.arguments, op._schema.returns
        numbers = map(_number, [torch.get_num_threads() + 2, len(returns), len(args)])
        arguments = [_argument(p, value) for p, value in zip(parameters, args, strict=True)]
        tensors = [(p, t) for p, t in zip(parameters, args, strict=True) if isinstance(t, Tensor)]
        request = b"".join([_text(op._opname.encode()), *numbers, *arguments])
        with self._lock:
            try:
                result, memories = self._exchange(request, len(tensors))
            except (EOFError, BrokenPipeError):
                raise MachineError(self._last_words()) from None
        for (parameter, t), memory in zip(tensors, memories, strict=True):
            if parameter.alias_info is not None and memory:
                _memory(t).copy_(torch.frombuffer(bytearray(memory), dtype=torch.uint8))
        return struct.unpack("<d" if str(returns[0].type) == "float" else "<q", result)[0] if returns else None

    def _exchange(self, request: bytes, tensors: int) -> tuple[bytes, list[bytes]]:
        """The bytes of the result, and those of each tensor's memory."""
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        self._process.stdin.write(request)
        self._process.stdin.flush()
        if self._read(1) == b"E":
            raise RuntimeError(self._read_text().decode())
        return self._read(8), [self._read_text() for _ in range(tensors)]

    def _start(self) -> subprocess.Popen[bytes]:
        pipe, environment = subprocess.PIPE, {**os.environ, **_OPTIONS}
        command = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", self.program]
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._stderr, env=environment)

    def _read(self, size: int) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def _read_text(self) -> bytes:
        return self._read(struct.unpack("<q", self._read(8))[0])

    def _last_words(self) -> str:
        assert self._process is not None
        self._process.wait()
        self._process = None
        self._stderr.seek(0)
        words = self._stderr.read().decode(errors="replace")
        self._stderr.seek(0)
        self._stderr.truncate()
        return words


# -- as worker.cpp reads it -------------------------------------------------------------------------------------------


def _argument(parameter: torch._C.Argument, value: Any) -> bytes:
    """A scalar by the type of the schema, in which only tensors are optional."""
    if value is None:
        return b"?N"
    if isinstance(value, Tensor):
        optional = b"?" if isinstance(parameter.type, torch.OptionalType) else b""
        offset = value.data_ptr() % 64  # so that it is as misaligned as here
        numbers = [_number(_DTYPES[value.dtype]), _numbers(value.shape), _numbers(value.stride()), _number(offset)]
        return b"".join([optional, b"T", *numbers, _text(_memory(value).numpy().tobytes())])
    if isinstance(value, list | tuple):
        return b"L" + _numbers(value)
    if str(parameter.type) == "float":
        return b"F" + struct.pack("<d", value)
    return (b"B" if isinstance(value, bool) else b"I") + _number(value)


def _memory(t: Tensor) -> Tensor:
    """The bytes from its first to its last element."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.detach().as_strided([last + 1 if t.numel() else 0], [1]).view(torch.uint8)


def _number(value: int) -> bytes:
    return struct.pack("<q", value)


def _numbers(values: Sequence[int]) -> bytes:
    return b"".join(map(_number, [len(values), *values]))


def _text(data: bytes) -> bytes:
    return _number(len(data)) + data
