"""What compilers make of every kernel at the shapes of AlexNet and VGG-16: ``make kernels``.

Kernels and configurations come from the launchers themselves, called with tensors on the meta device; nothing runs.
"""

import functools
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcnn.bench.cases import FORMATS
from fastcnn.bench.environment import convolution_precision
from fastcnn.bench.operators import CONVOLUTIONS, Convolution
from fastcnn.ops.cudnn import conv2d_relu as cudnn
from fastcnn.ops.triton import conv2d_relu
from fastcnn.params import ConvBackwardParams, ConvParams

from .compiled import ARCHITECTURES, Kernel, compiling
from .compiled_cuda import all_kernels
from .workloads import BATCH, BESIDE_CUDNN, Workload, workloads

# "tf32" and "fp32" are the two ways to multiply float32.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A call of launchers whose kernels are compiled.

    Args:
        op: the file in ``kernels/``.
        layer: whose shape it is.
        dtype: a key of ``DTYPES``.
        format: a key of ``FORMATS``.
        launch: the call.
    """

    op: str
    layer: str
    dtype: str
    format: str
    launch: Callable[[], object]

    def __str__(self) -> str:
        return f"{self.op}, {self.layer}, {self.dtype}, {self.format}"

    def compile(self, arch: int) -> list[Kernel]:
        with convolution_precision("ieee" if self.dtype == "fp32" else "tf32"), compiling(arch) as kernels:
            self.launch()
        return kernels


def cases() -> Iterator[Case]:
    """All of the Triton kernels."""
    return chain(_convolutions(), _memory_bound())


def _case(launch: Callable[..., object], op: str, layer: str, dtype: str, format: str, *args: Any) -> Case:
    return Case(op, layer, dtype, format, functools.partial(launch, dtype, format, *args))


def meta(dtype: str, format: str, *shape: int) -> Tensor:
    """A tensor that has no memory; ``dtype`` and ``format`` are keys of ``DTYPES`` and ``FORMATS``."""
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta", memory_format=FORMATS[format])


def _convolutions() -> Iterator[Case]:
    for (layer, conv), dtype, format in product(CONVOLUTIONS.items(), DTYPES, FORMATS):
        yield _case(_convolve, "conv2d_relu", layer, dtype, format, conv)
    for dtype, format in product(("bf16", "fp32"), FORMATS):
        yield _case(_mask, "conv2d_relu", "AlexNet conv1", dtype, format, 96, 55)


def _convolve(dtype: str, format: str, conv: Convolution) -> None:
    x = meta(dtype, format, BATCH, conv.channels, conv.size, conv.size)
    weight = meta(dtype, format, conv.outputs, conv.channels // conv.groups, conv.window, conv.window)
    config = conv2d_relu.configurations(x, weight, conv.groups)[0]
    conv2d_relu.forward(x, weight, x.new_empty(conv.outputs), conv.params, False, config=config)


def _mask(dtype: str, format: str, c: int, size: int) -> None:
    """What runs beside cuDNN's convolution, which here is a 1x1: forward with a mask, backward with and without it."""
    x, weight = meta(dtype, format, BATCH, c, size, size), meta(dtype, format, c, c, 1, 1)
    conv = ConvParams([1, 1], [0, 0], [1, 1], 1)
    y, mask = cudnn.forward(x, weight, x.new_empty(c), conv, True)
    form = list(x.shape), format == "channels_last", conv
    cudnn.backward(y, y, x, weight, ConvBackwardParams(*form, [True, True, True]))
    cudnn.backward(y, mask, None, weight, ConvBackwardParams(*form, [True, False, False]))


def _memory_bound() -> Iterator[Case]:
    for work in workloads():
        if work.mode == "forward" and work.op not in BESIDE_CUDNN:
            yield _case(_all_modes, work.op, work.layer, work.dtype, work.format, work)


def _all_modes(dtype: str, format: str, work: Workload) -> None:
    for mode in work.modes:
        replace(work, mode=mode).launch()


@dataclass(frozen=True)
class Row:
    """One compiled kernel, in whatever language it was written."""

    language: str
    kernel: str
    layer: str
    dtype: str
    format: str
    arch: str
    registers: int
    spills: int
    shared: int
    loads: str
    stores: str
    tensor_cores: str


def triton_rows() -> Iterator[Row]:
    """fp16, and convolutions in IEEE fp32, for one architecture alone."""

    def rare(case: Case) -> bool:
        return case.dtype == "fp16" or (case.op, case.dtype) == ("conv2d_relu", "fp32")

    pairs = [(case, arch) for case in cases() for arch in ARCHITECTURES if arch == 90 or not rare(case)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        for (case, arch), rows in zip(pairs, pool.map(_rows, *zip(*pairs, strict=True)), strict=True):
            print(case, arch, file=sys.stderr)
            yield from rows


def _rows(case: Case, arch: int) -> list[Row]:
    about = case.layer, case.dtype, case.format
    return [_row("Triton", f"{case.op}: {kernel.name}", *about, arch, kernel) for kernel in case.compile(arch)]


def cuda_rows() -> Iterator[Row]:
    for source, kernel in all_kernels(ARCHITECTURES):
        function, dtype, format, kind = kernel.parts
        yield _row("CUDA", f"{source.stem}: {function}", kind, dtype, format, kernel.arch, kernel)


def _row(language: str, name: str, layer: str, dtype: str, format: str, arch: int, kernel: Kernel) -> Row:
    resources = kernel.registers, kernel.spills, kernel.shared
    code = _widths(kernel.loads), _widths(kernel.stores), ", ".join(kernel.tensor_cores)
    return Row(language, name, layer, dtype, format, f"sm_{arch}", *resources, *code)


def _widths(counts: dict[int, int]) -> str:
    """Widest first: ``16 B x 12, 2 B x 1``."""
    return ", ".join(f"{width or 'bulk'}{' B' * (width > 0)} x {n}" for width, n in sorted(counts.items())[::-1])


_HEAD = f"""# Compiled kernels

Written by `make kernels`, on a machine that needs no GPU: every kernel as its launcher configures it for AlexNet and
VGG-16 at batch {BATCH}, in machine code for A100 (sm_80), H100 (sm_90) and B200 (sm_100). Registers are those of a
thread; spills are instructions that move registers to or from local memory; shared memory is in bytes; loads and
stores are instructions by the bytes that a thread asks global memory for at once. CUDA kernels are compiled for any
shape, those named fast for the usual windows; the dynamic shared memory that a launch adds is not counted.

"""


def table(rows: list[Row]) -> str:
    """As Markdown, a section for each kernel."""
    text = _HEAD
    for name in dict.fromkeys((row.language, row.kernel) for row in rows):
        members = [list(asdict(row).values())[2:] for row in rows if (row.language, row.kernel) == name]
        columns = "layer", "dtype", "format", "arch", "registers", "spills", "shared", "loads", "stores", "tensor cores"
        text += f"## {name[1]} ({name[0]})\n\n"
        text += "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (columns, ["---"] * 10, *members))
        text += "\n\n"
    return text.rstrip() + "\n"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(table([*triton_rows(), *cuda_rows()]))
