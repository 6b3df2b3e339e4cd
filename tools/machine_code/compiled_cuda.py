"""What nvcc makes of the CUDA kernels: registers, spills, access widths, tensor-core instructions. No GPU is needed.

The kernels know nothing of shapes: one is compiled for each dtype, memory format and kind of window; those of
``csrc/cuda/fast`` only for the usual ones.
"""

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .compiled import _TOOLS, Kernel

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr")

_DTYPES = {"__half": "fp16", "__nv_bfloat16": "bf16", "float": "fp32", "double": "fp64"}
_NAME = re.compile(r"(?:void )?fastcnn::cuda::(fast::|general::)?(?:\(anonymous namespace\)::)?(\w+)<(\w+)(.*?)>\(")
# What a kernel's template arguments are, after the dtype.
_ARGUMENTS = {
    "general::relu_lrn": ("channels_last", "LRN"),
    "general::lrn_terms": ("channels_last", "pool"),
    "general::tail_backward": ("channels_last", "LRN", "pool"),
    "general::pool": ("channels_last", "LRN"),
    "general::tail": ("channels_last",),
    "general::batch_norm_statistics": ("channels_last",),
    "general::batch_norm_mean": (),
    "general::batch_norm": ("channels_last", "pool"),
    "general::batch_norm_sums": ("channels_last", "pool"),
    "general::batch_norm_terms": (),
    "general::batch_norm_backward": ("channels_last", "pool"),
    "fast::lrn": ("channels_last", "", "beta", "bias or ReLU"),
    "fast::lrn_backward": ("channels_last", "", "beta", "bias or ReLU"),
    "fast::pool_vectors": ("window", "bias or ReLU"),
    "fast::pool_planes": ("window", "", "bias or ReLU", "clipped windows"),
    "fast::pool_backward": ("channels_last", "", "window", "beta", "bias or ReLU"),
    "fast::tail_vectors": ("window", "beta"),
    "fast::tail_planes": ("window", "beta"),
    "fast::tail_backward_planes": ("window", "beta"),
    "augment_rows": ("channels_last", "resizes"),
    "conv2d_relu_kernel": ("channels_last", "windows in vectors"),
    "sum_partials": (),
}
_BETAS = {"0": "no LRN", "1": "LRN of five, beta 1/2", "2": "LRN of five, beta 3/4"}


@dataclass(frozen=True)
class CudaKernel(Kernel):
    """One kernel of a ``.cu`` file; ``name`` is its C++ name, template arguments included, ``symbol`` the linker's."""

    symbol: str = ""

    @functools.cached_property
    def sass(self) -> str:
        return self.assembly["sass"]

    @functools.cached_property
    def _resources(self) -> str:
        return self.assembly["resources"]

    @property
    def constants(self) -> int:
        """Bytes of constant bank 0, where the arguments are last."""
        return int(self._usage(r"CONSTANT\[0\]"))

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """Function, dtype, memory format, and what else it is compiled for."""
        found = _NAME.match(self.name)
        assert found, self.name
        where, function, dtype, rest = found.groups()
        function = (where or "") + function
        values = [value.strip().removeprefix("(fastcnn::cuda::fast::Beta)") for value in rest.split(",")[1:]]
        arguments = dict(zip(_ARGUMENTS[function], values, strict=True))
        in_vectors = arguments.pop("channels_last", {"planes": "false", "vectors": "true"}.get(function.split("_")[-1]))
        format = {"true": "channels_last", "false": "NCHW", None: ""}[in_vectors]
        kind = [_described(*argument) for argument in arguments.items() if argument[0]]
        return function, _DTYPES[dtype], format, ", ".join(filter(None, kind))


def _described(argument: str, value: str) -> str:
    if argument == "window":
        return f"{value} x {value}"
    return _BETAS[value] if argument == "beta" else argument if value == "true" else ""


def kernels(file: Path, arch: int) -> list[CudaKernel]:
    """Those compiled for ``sm_<arch>`` in a library or a cubin."""
    sass = _split(_tool("-sass", f"-arch=sm_{arch}", file), r"^\t+Function : (\S+)$")
    resources = _split(_tool("-res-usage", f"-arch=sm_{arch}", file), r"^ Function (\S+):$")
    demangled = subprocess.run(["c++filt", *sass], check=True, text=True, capture_output=True).stdout.splitlines()
    return [
        CudaKernel(
            name,
            arch,
            0,
            None,
            b"",
            _shared(resources[symbol]),
            (),
            {"sass": code, "resources": resources[symbol]},
            symbol,
        )
        for name, (symbol, code) in zip(demangled, sass.items(), strict=True)
    ]


def _shared(resources: str) -> int:
    found = re.search(r"SHARED:(\d+)", resources)
    assert found
    return int(found[1])


def _tool(*args: str | Path) -> str:
    return subprocess.run([_TOOLS / "cuobjdump", *args], check=True, text=True, capture_output=True).stdout


def _split(text: str, head: str) -> dict[str, str]:
    """Heading -> what follows it."""
    pieces = re.split(head, text, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def compiled(source: Path, arch: int) -> list[CudaKernel]:
    """The kernels of a ``.cu`` file, compiled for ``sm_<arch>``."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernels.cubin")
        subprocess.run(["nvcc", *FLAGS, f"-arch=sm_{arch}", "-cubin", source, "-o", cubin], check=True)
        return kernels(cubin, arch)


def all_kernels(architectures: tuple[int, ...]) -> Iterator[tuple[Path, CudaKernel]]:
    """Every kernel and the file it is in, compiled for each architecture; none where there is no nvcc."""
    for source in sorted(SOURCES.glob("*.cu")) if shutil.which("nvcc") else []:
        for arch in architectures:
            for kernel in compiled(source, arch):
                yield source, kernel
