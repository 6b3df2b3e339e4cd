"""The Triton kernels in machine code, for GPUs that need not be here: no spills, tensor cores, wide loads."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

from fastcnn import PoolParams, backends

pytest.importorskip("triton")
if backends.INTERPRETING:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
import triton.language as tl

from fastcnn.ops.triton import batch_norm_relu_max_pool2d
from fastcnn.params import BatchNormParams
from tools.machine_code.compiled import ARCHITECTURES, compiling
from tools.machine_code.kernels_table import Case, Row, cases, table

# How the tensor-core instructions of an architecture begin.
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTC"}
LAYERS = (
    *("AlexNet input", "AlexNet conv1", "AlexNet conv2", "AlexNet conv4"),
    *("VGG-16 input", "VGG-16 conv1_1", "VGG-16 pool1"),
)


def checked() -> list[tuple[Case, int]]:
    """sm_90: what AlexNet and VGG-16 have of different layers; the other architectures: each kernel once.

    The tail's kernels are the longest, and take a compiler half a minute: one layer, in bf16 and channels_last, for two
    architectures. What test_machine_code.py compiles must not spill either.
    """
    pairs, met = [], set()
    for case in cases():
        convolution = case.op == "conv2d_relu"
        usual = case.dtype == "bf16" or (case.dtype == "tf32" if convolution else case.format == "channels_last")
        if case.op == "relu_lrn_max_pool2d":
            usual = case.layer == "AlexNet conv1" and (case.dtype, case.format) == ("bf16", "channels_last")
        if case.layer in LAYERS and usual:
            pairs.append((case, 90))
        kind = case.op, case.launch.func
        if case.dtype == "bf16" and case.format == "channels_last" and kind not in met:
            met.add(kind)
            others = [arch for arch in ARCHITECTURES if arch != 90]
            pairs += [(case, arch) for arch in (others[-1:] if case.op == "relu_lrn_max_pool2d" else others)]
    return pairs


@pytest.fixture(scope="module")
def compilations(request):
    """Of the cases that were selected, on all processors."""
    selected = [item.callspec.params for item in request.session.items if "compilations" in item.fixturenames]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        yield {(p["case"], p["arch"]): pool.submit(p["case"].compile, p["arch"]) for p in selected}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "arch"), checked(), ids=lambda value: str(value).replace(", ", "-"))
def test_no_spills_tensor_cores_in_convolutions_and_wide_loads(compilations, case, arch):
    kernels = compilations[case, arch].result()
    assert kernels
    for kernel in kernels:
        assert kernel.spills == 0, f"{kernel.name} moves registers to memory {kernel.spills} times"
        if kernel.name == "conv2d_relu_kernel":
            assert kernel.tensor_cores
            assert all(op.startswith(TENSOR_CORES[arch]) for op in kernel.tensor_cores)
            # tensor cores would truncate
            assert (case.dtype == "tf32") == ("cvt.rna.tf32.f32" in kernel.assembly["ptx"])
        if case.format == "channels_last" and case.op != "augment":  # whose crops begin at any byte
            assert 16 in kernel.loads
            assert 16 in kernel.stores or kernel.name == "bias_gradient_kernel"


# -- that these tests would fail --------------------------------------------------------------------------------------


@triton.jit
def product_kernel(a, b, c, SIZE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    i, k = tl.arange(0, BLOCK), tl.arange(0, 32)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, SIZE, 32):
        left = tl.load(a + i[:, None] * SIZE + (start + k)[None, :])
        right = tl.load(b + (start + k)[:, None] * SIZE + i[None, :])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(c + i[:, None] * SIZE + i[None, :], total)


def compiled(arch=90, dtype="bfloat16", size=64, block=64, precision="tf32", **options):
    x = torch.empty(block, size, device="meta", dtype=getattr(torch, dtype))
    with compiling(arch) as kernels:
        product_kernel[(1,)](x, x, x.float(), size, block, precision, **options)
    (kernel,) = kernels
    return kernel


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_spills_are_seen(arch):
    assert compiled(arch, "float32", block=32, precision="ieee").spills == 0
    spilling = compiled(arch, "float32", block=32, precision="ieee", maxnreg=32)
    assert spilling.spills > 0
    assert spilling.stack > 0
    assert spilling.registers <= 32


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tensor_cores_are_seen(arch, dtype):
    kernel = compiled(arch, dtype)
    assert kernel.tensor_cores
    assert all(op.startswith(TENSOR_CORES[arch]) for op in kernel.tensor_cores)
    if dtype == "float32":
        assert not compiled(arch, dtype, precision="ieee").tensor_cores


def test_widths_of_loads_and_stores_are_seen():
    wide, narrow = compiled(), compiled(size=33)
    assert set(wide.loads) == set(wide.stores) == {16}
    assert set(narrow.loads) == {2}
    assert set(narrow.stores) == {4}


def test_architectures_are_compiled_side_by_side():
    assert len({compiled(arch).cubin for arch in ARCHITECTURES}) == len(ARCHITECTURES)


def test_table_has_a_section_for_each_kernel():
    about = "Triton", "lrn: lrn_forward_kernel", "AlexNet conv1", "bf16", "NCHW", "sm_90"
    row = Row(*about, 40, 0, 128, "16 B x 2", "2 B x 1", "")
    text = table([row, replace(row, arch="sm_80"), replace(row, language="CUDA")])
    assert text.count("\n## ") == 2
    assert text.count("| AlexNet conv1 | bf16 | NCHW | sm_90 | 40 | 0 | 128 | 16 B x 2 | 2 B x 1 |  |") == 2
    assert "## lrn: lrn_forward_kernel (CUDA)" in text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("pool", [None, PoolParams(3, 2)], ids=["norm", "norm+pool"])
def test_batch_norm_without_spills_and_with_wide_loads(dtype, format, pool):
    x = torch.empty(32, 96, 55, 55, dtype=dtype, device="meta").to(memory_format=format)
    channels, norm = torch.empty(96, device="meta"), BatchNormParams(True, pool=pool)
    with compiling(90) as kernels:
        y, argmax, mean, var = batch_norm_relu_max_pool2d.forward(x, None, None, channels, channels, norm, True)
        dy = torch.empty_like(y)
        batch_norm_relu_max_pool2d.backward(dy, x, mean, var, channels, channels, argmax, norm)
    assert len(kernels) == 6
    for kernel in kernels:
        assert kernel.spills == 0, f"{kernel.name} moves registers to memory {kernel.spills} times"
        reads_x = kernel.name not in ("batch_norm_mean_kernel", "batch_norm_gradients_kernel")
        if format == torch.channels_last and reads_x:
            assert kernel.loads[16]
