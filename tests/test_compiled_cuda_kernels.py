"""The CUDA kernels in machine code, as they were built, for GPUs that need not be here: no spills, wide accesses."""

import re
import shutil
from pathlib import Path

import pytest

import fastcnn

pytest.importorskip("triton")  # brings cuobjdump
if not shutil.which("nvcc"):
    pytest.skip("there is no nvcc", allow_module_level=True)

from tools.machine_code.compiled_cuda import SOURCES, kernels

# Which write nothing but a row of sums a block.
WRITE_SUMS = "general::batch_norm_statistics", "general::batch_norm_sums"


@pytest.fixture(scope="module")
def built():
    """The kernels of the library that is installed, of the first architecture it was built for."""
    library = Path(fastcnn.__file__).with_name("_C_cuda.abi3.so")
    found = next(filter(None, (kernels(library, arch) for arch in (90, 80, 100, 120, 75))))
    assert found
    return found


def test_every_kernel_is_there(built):
    functions = {kernel.parts[0] for kernel in built}
    kernel = re.compile(r"^__global__ void (?:__launch_bounds__\([^;{]*?\)\s+)?(\w+)\(const", re.MULTILINE)
    defined = set()
    for file in (*SOURCES.rglob("*.cu"), *SOURCES.rglob("*.cuh")):
        where = "" if file.parent == SOURCES else f"{file.parent.name}::"
        defined |= {where + name for name in kernel.findall(file.read_text())}
    assert functions == defined


def test_no_kernel_spills_registers(built):
    assert not [(kernel.name, kernel.stack) for kernel in built if kernel.spills or kernel.stack]


def test_channels_last_is_read_and_written_16_bytes_at_a_time(built):
    for kernel in built:
        function, _, format, _ = kernel.parts
        if format == "channels_last" and function != "augment_rows":  # crops begin at any byte
            assert 16 in kernel.loads, kernel.name  # cp.async included
            if function not in WRITE_SUMS:
                assert 16 in kernel.stores, kernel.name


def test_convolutions_run_on_tensor_cores(built):
    instructions = {"fp16": "HMMA.16816.F32", "bf16": "HMMA.16816.F32.BF16", "fp32": "HMMA.1688.F32.TF32"}
    for kernel in built:
        tensor_cores = (instructions[kernel.parts[1]],) if kernel.parts[0] == "conv2d_relu_kernel" else ()
        assert kernel.tensor_cores == tensor_cores, kernel.name


def test_nothing_is_added_up_by_atomics(built):
    assert not [kernel.name for kernel in built if re.search(r"\b(ATOM|ATOMG|RED|REDG)\.", kernel.sass)]
