"""What the GPU compiler makes of the Triton kernels: registers, spills, access widths, tensor-core instructions.

No GPU is needed. Within :func:`compiling` every launch of a Triton kernel is compiled for the given architecture
instead of run, with exactly the configuration that the launcher chose, so that the launchers themselves, called with
tensors on the meta device, say what is compiled::

    with compiling(90) as kernels:
        launcher(torch.empty(256, 96, 55, 55, device="meta"), ...)
    print(kernels[0].registers, kernels[0].loads)
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100)

_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_LOAD, _STORE = re.compile(r"LDG(STS)?\b"), re.compile(r"STG\b")
_BULK_LOAD, _BULK_STORE = re.compile(r"UTMALDG|UBLKCP"), re.compile(r"UTMASTG|UTMAREDG")
_SPILL = re.compile(r"(LDL|STL)\b")
_TENSOR_CORE = re.compile(r"([HDIQ]|UTC\w*?|O|[HQI]G|BG)MMA\b")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Argument:
    """What a kernel is launched with; ``type`` is Triton's name of it, such as ``*bf16``, ``i32`` or ``i64``."""

    name: str
    type: str
    value: Any


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Args:
        name: of the ``@triton.jit`` function.
        arch: compute capability, 90 for sm_90.
        num_warps: of a program.
        grid: programs of the launch; None where it depends on the configuration.
        cubin: the machine code.
        shared: bytes of shared memory a program needs.
        arguments: of the launch, but those that are compiled into the kernel.
        assembly: the stages of compilation, for a closer look.
    """

    name: str
    arch: int
    num_warps: int
    grid: Any
    cubin: bytes
    shared: int
    arguments: tuple[Argument, ...] = field(repr=False)
    assembly: dict[str, Any] = field(repr=False)

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each instruction, with its modifiers, occurs in the machine code."""
        return Counter(_OPCODE.findall(self.sass))

    @cached_property
    def sass(self) -> str:
        return _tool("cuobjdump", "-sass", self.cubin)

    @cached_property
    def registers(self) -> int:
        """Of each thread."""
        return int(self._usage("REG"))

    @cached_property
    def stack(self) -> int:
        """Bytes of local memory of each thread: its stack frame, spilled registers included."""
        return int(self._usage("STACK")) + int(self._usage("LOCAL"))

    @property
    def spills(self) -> int:
        """Instructions that move registers to or from local memory."""
        return self._count(_SPILL)

    @property
    def loads(self) -> dict[int, int]:
        """Bytes a thread asks global memory for at once -> how many such loads; 0 for the bulk copy engine's."""
        return self._widths(_LOAD, _BULK_LOAD)

    @property
    def stores(self) -> dict[int, int]:
        """As :attr:`loads`, of the stores."""
        return self._widths(_STORE, _BULK_STORE)

    @property
    def tensor_cores(self) -> tuple[str, ...]:
        """Tensor-core instructions, such as ``HMMA.16816.F32.BF16`` or ``HGMMA.64x64x16.F32``."""
        return tuple(sorted(op for op in self.opcodes if _TENSOR_CORE.match(op)))

    def _count(self, opcode: re.Pattern[str]) -> int:
        return sum(n for op, n in self.opcodes.items() if opcode.match(op))

    def _widths(self, opcode: re.Pattern[str], bulk: re.Pattern[str]) -> dict[int, int]:
        widths: Counter[int] = Counter()
        for op, n in self.opcodes.items():
            if opcode.match(op):
                widths[next((_BYTES[part] for part in op.split(".") if part in _BYTES), 4)] += n
            elif bulk.match(op):
                widths[0] += n
        return dict(sorted(widths.items()))

    @cached_property
    def _resources(self) -> str:
        return _tool("cuobjdump", "-res-usage", self.cubin)

    def _usage(self, resource: str) -> str:
        found = re.search(rf"\b{resource}:(\d+)", self._resources)
        assert found, self._resources
        return found[1]


def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [_TOOLS / name, option, file.name], check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ).stdout


def _arguments(signature: dict[str, str], values: dict[str, Any]) -> tuple[Argument, ...]:
    return tuple(Argument(name, type, values[name]) for name, type in signature.items() if type != "constexpr")


class _NoGPU:
    """In the place of Triton's driver: says which GPU to compile for. Compiled kernels are cached by device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling(arch: int, then: Callable[[Kernel], object] = lambda kernel: None) -> Iterator[list[Kernel]]:
    """Launches of Triton kernels compile for ``sm_<arch>`` and end up in the list instead of running.

    ``then`` gets each of them at the time of its launch. Not under ``TRITON_INTERPRET=1``, where there is nothing to
    compile.
    """
    kernels: list[Kernel] = []
    run = JITFunction.run

    def compile(function: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(function, *args, grid=grid, warmup=True, **options)
        metadata = compiled.metadata
        kernels.append(
            Kernel(
                function.__name__,
                arch,
                metadata.num_warps,
                None if callable(grid) else grid,
                compiled.asm["cubin"],
                metadata.shared,
                _arguments(compiled.src.signature, {**dict(zip(function.arg_names, args, strict=False)), **options}),
                dict(compiled.asm),
            )
        )
        then(kernels[-1])

    with mock.patch.object(driver, "_active", _NoGPU(arch)), mock.patch.object(JITFunction, "run", compile):
        yield kernels
