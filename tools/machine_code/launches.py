"""What the memory-bound operators launch on a GPU, in Triton and in CUDA C++, for AlexNet and VGG-16: without one.

The Triton launchers say it themselves, called with tensors on the meta device. Those of the CUDA operators are compiled
by nvcc as they are and linked with ``recorder.cpp``, a CUDA runtime that has no device and only notes what is launched.
"""

import fcntl
import functools
import importlib
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import ninja
import numpy as np
import pybind11
import torch
from torch import Tensor

from fastcnn.params import AugmentParams, BatchNormParams, TailParams

from . import compiled_cuda
from .compiled import Kernel, compiling
from .execute import PARAMETERS, Launch, Memory, execute
from .sass import instructions
from .workloads import Augmented, Tail, Workload

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "u32": 4, "fp32": 4, "i64": 8}
_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Of the operators' tasks, in the order in which ``recorder.cpp`` takes their addresses.
_BUFFERS = "x", "bias", "dy", "out", "argmax", "partials", "dbias", "terms"
_AUGMENT_BUFFERS = "x", "offsets", "mirror", "mean", "sizes", "out"
_NORM_BUFFERS = (
    *("x", "mean", "var", "weight", "bias", "dy", "out", "argmax"),
    *("dweight", "dbias", "sums", "terms"),
)
_TILE = 1 << 20  # bytes of a buffer that stands for a tensor


@dataclass(frozen=True)
class Launched:
    """A launch, and what its kernel takes of a multiprocessor.

    Args:
        kernel: name of its function.
        launch: what is executed.
        memory: in which.
        registers: of a thread.
        shared: bytes of a block.
    """

    kernel: str
    launch: Launch
    memory: Memory = field(repr=False)
    registers: int
    shared: int


@functools.cache
def _tile(dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """Contents that repeat: places in a window of up to nine elements, or numbers."""
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        return torch.randint(0, 9, (_TILE,), generator=generator, dtype=dtype).numpy()
    values = torch.randn(_TILE // dtype.itemsize, generator=generator).to(dtype)
    return values.view(torch.uint8).numpy()


def _add(memory: Memory, t: Tensor) -> int:
    """The address of a tensor, or of a tile in its place where it is on the meta device."""
    if t.device.type == "meta":
        return memory.add(_tile(t.dtype), max(t.nbytes, 1))
    return memory.add(_raw(t))


# -- Triton -----------------------------------------------------------------------------------------------------------


def parameters(kernel: Kernel, address: Callable[[str, Tensor], int]) -> bytes:
    """What a Triton kernel finds in constant memory; ``address`` says where a tensor is, also given its name."""
    packed = b""
    for argument in kernel.arguments:
        pointer = argument.type.startswith("*")
        size = 8 if pointer else _SIZES[argument.type]
        value = address(argument.name, argument.value) if pointer else int(argument.value)
        packed += bytes(-len(packed) % size) + value.to_bytes(size, "little", signed=True)
    return packed + bytes(-len(packed) % 8) + bytes(16)  # two pointers to Triton's own memory, which no kernel uses


def triton(work: Workload, arch: int = 90, **options: Any) -> list[Launched]:
    """``options`` are the launcher's, such as ``config``."""
    with compiling(arch) as kernels:
        work.launch(**options)
    return [_launched(kernel, work.tensors) for kernel in kernels]


def _launched(kernel: Kernel, tensors: dict[str, Tensor]) -> Launched:
    memory, known = Memory(), {}

    def address(name: str, t: Tensor) -> int:
        if id(t) not in known:
            known[id(t)] = _add(memory, tensors.get(name, t))
        return known[id(t)]

    launch = _launch(kernel, parameters(kernel, address))
    return Launched(kernel.name, launch, memory, kernel.registers, kernel.shared)


def _launch(kernel: Kernel, packed: bytes) -> Launch:
    grid, block = (kernel.grid[0], 1, 1), (32 * kernel.num_warps, 1, 1)
    return Launch(instructions(kernel.sass), grid, block, packed, kernel.shared)


def run(kernel: Kernel) -> None:
    """Execute a launch on CPU tensors, whose elements are then what a GPU would have made of them."""
    memory, known = Memory(), {}

    def address(name: str, t: Tensor) -> int:
        start = t.untyped_storage().data_ptr()
        if start not in known:
            known[start] = memory.add(_raw(t)), t
        return int(known[start][0] + t.storage_offset() * t.element_size())

    launch = _launch(kernel, parameters(kernel, address))
    execute(launch, memory, range(launch.blocks))
    for at, tensor in known.values():
        _raw(tensor)[:] = memory.contents(at)


def _raw(t: Tensor) -> np.ndarray[Any, Any]:
    """The bytes of all of its storage."""
    elements = t.untyped_storage().nbytes() // t.element_size()
    return t.as_strided((elements,), (1,), 0).view(torch.uint8).numpy()


# -- CUDA -------------------------------------------------------------------------------------------------------------


class Cuda:
    """The CUDA operators, compiled for ``sm_<arch>``."""

    def __init__(self, arch: int = 90, multiprocessors: int = 132) -> None:
        library = build(arch)
        self._module = _load(library)
        self._kernels = {kernel.symbol: kernel for kernel in compiled_cuda.kernels(library, arch)}
        self._code = functools.cache(lambda symbol: instructions(self._kernels[symbol].sass))
        self._sizes = {symbol: kernel.constants - PARAMETERS for symbol, kernel in self._kernels.items()}
        self._multiprocessors = multiprocessors

    def launches(self, work: Workload) -> list[Launched]:
        memory, task, buffers = self._call(work)
        return [
            self._launched(memory, *launch)
            for launch in self._module.record(work.name, task, buffers, self._sizes, self._multiprocessors)
        ]

    def nanoseconds(self, work: Workload, calls: int) -> float:
        """That the operator's own code takes on this machine for one of so many calls."""
        _, task, buffers = self._call(work)
        return float(self._module.nanoseconds(work.name, task, buffers, self._multiprocessors, calls))

    def _call(self, work: Workload) -> tuple[Memory, Any, list[int]]:
        """Memory, the operator's task, and the addresses of its buffers."""
        memory = Memory()
        if isinstance(work, Augmented):
            tensors = {**work.tensors, "out": work.tensors["y"]}
            task = self._augment_task(tensors["x"], work.parameters)
            return memory, task, [_add(memory, tensors[n]) if n in tensors else 0 for n in _AUGMENT_BUFFERS]
        assert isinstance(work, Tail)
        t = work.tensors

        def add(dtype: torch.dtype, size: int) -> int:
            return memory.add(_tile(dtype), size)

        task = self._task(t["x"], work.channels_last, work.parameters)
        where = {name: _add(memory, tensor) for name, tensor in t.items()}
        if work.is_tail:
            where["bias"] = add(torch.float32, 4 * work.shape[1])  # the operator makes it that
        out = where["y"] if work.mode == "forward" else add(t["x"].dtype, t["x"].nbytes)
        dy = partials = dbias = 0
        if work.mode == "backward":
            dy = where["y"] if work.pool is not None else add(t["y"].dtype, t["y"].nbytes)
            if work.is_tail:
                rows = self._module.bias_partials(task, self._multiprocessors)
                partials = add(torch.float32, 4 * rows * work.shape[1])
                dbias = add(torch.float32, 4 * work.shape[1])
        reads_x = not (work.op == "max_pool2d" and work.mode == "backward")
        buffers = [
            where["x"] if reads_x else 0,
            *(where.get("bias", 0), dy, out, where.get("argmax", 0), partials, dbias, 0),
        ]
        return memory, task, buffers

    def _task(self, x: Tensor, channels_last: bool, tail: TailParams) -> Any:
        relu, *lrn, kernel, stride, padding, dilation, ceil_mode = tail.op_args()
        shape = _DTYPES.index(x.dtype), list(x.shape), channels_last
        return self._module.Task(*shape, relu, tuple(lrn), kernel, stride, padding, dilation, ceil_mode)

    def _augment_task(self, x: Tensor, params: AugmentParams) -> Any:
        crop, scale, dtype, channels_last = params.op_args()
        return self._module.AugmentTask(_DTYPES.index(dtype), list(x.shape), crop, channels_last, scale)

    def run(self, op: str, channels_last: bool, tail: TailParams, **tensors: Tensor) -> None:
        """Execute an operator on CPU tensors; their names are those of ``TailTask``.

        ``x`` may be on the meta device where the operator does not read it.
        """
        x = tensors["x"]
        task = self._task(x, channels_last, tail)
        if "dbias" in tensors:
            rows = self._module.bias_partials(task, self._multiprocessors)
            tensors["partials"] = torch.empty(rows, x.shape[1])
        tensors["terms"] = torch.empty(max(1, self._module.lrn_terms(task)))
        self._run(op, task, _BUFFERS, tensors)

    def augment(self, params: AugmentParams, **tensors: Tensor) -> None:
        """Execute it on CPU tensors; their names are those of ``AugmentTask``."""
        self._run("augment", self._augment_task(tensors["x"], params), _AUGMENT_BUFFERS, tensors)

    def batch_norm(self, op: str, channels_last: bool, norm: BatchNormParams, **tensors: Tensor) -> None:
        """Execute one of its private ops on CPU tensors; their names are those of ``BatchNormTask``."""
        x = tensors["x"]
        task = self._module.BatchNormTask(_DTYPES.index(x.dtype), list(x.shape), channels_last, *norm.op_args())
        sums = self._module.batch_norm_sums(task, self._multiprocessors)
        tensors["sums"], tensors["terms"] = torch.empty(max(1, sums)).double(), torch.empty(2 * x.shape[1])
        self._run(op, task, _NORM_BUFFERS, tensors)

    def _run(self, op: str, task: Any, buffers: Sequence[str], tensors: dict[str, Tensor]) -> None:
        memory = Memory()
        at = {name: memory.add(_raw(t)) for name, t in tensors.items() if t.device.type != "meta"}
        addresses = [at.get(name, 0) for name in buffers]
        for launch in self._module.record(op, task, addresses, self._sizes, self._multiprocessors):
            launched = self._launched(memory, *launch)
            execute(launched.launch, memory, range(launched.launch.blocks))
        for name, address in at.items():
            _raw(tensors[name])[:] = memory.contents(address)

    def _launched(
        self,
        memory: Memory,
        symbol: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        packed: bytes,
        dynamic: int,
    ) -> Launched:
        kernel = self._kernels[symbol]
        launch = Launch(self._code(symbol), grid, block, packed, kernel.shared + dynamic)
        return Launched(kernel.name, launch, memory, kernel.registers, kernel.shared + dynamic)


def build(arch: int) -> Path:
    """Compile what changed, one process at a time, and return the module's path."""
    directory = ROOT / "build" / "machine_code" / f"sm_{arch}"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(arch, directory)


def _build(arch: int, directory: Path) -> Path:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    includes = " ".join(f"-isystem {i}" for i in (pybind11.get_include(), sysconfig.get_paths()["include"]))
    target = directory / f"cuda_launches{sysconfig.get_config_var('EXT_SUFFIX')}"
    operators = "augment", "batch_norm_relu_max_pool2d", "lrn", "max_pool2d", "relu_lrn_max_pool2d"
    sources = [*(ROOT / "csrc" / "cuda" / f"{op}.cu" for op in operators), HERE / "recorder.cpp"]
    objects = {source: directory / f"{source.stem}.o" for source in sources}
    options = f"{' '.join(compiled_cuda.FLAGS)} -arch=sm_{arch} -Xcompiler=-fPIC,-fvisibility=hidden {includes}"
    lines = [
        f"rule nvcc\n  command = {nvcc} -MD -MF $out.d {options} -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = g++ -shared -Wl,-z,lazy $in -o $out",  # what is never called is nowhere
        *(f"build {made}: nvcc {source}" for source, made in objects.items()),
        f"build {target}: link {' '.join(map(str, objects.values()))}",
    ]
    (directory / "build.ninja").write_text("\n".join(lines) + "\n")
    run = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", directory], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stdout + run.stderr)
    return target


def _load(library: Path) -> ModuleType:
    flags = sys.getdlopenflags()
    sys.setdlopenflags(1)  # RTLD_LAZY
    try:
        loader = importlib.machinery.ExtensionFileLoader("cuda_launches", str(library))
        spec = importlib.util.spec_from_file_location("cuda_launches", library, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module
    finally:
        sys.setdlopenflags(flags)
