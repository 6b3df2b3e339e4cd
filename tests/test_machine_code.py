"""Machine code for a GPU that is not here, executed: the kernels' own is right, and what it costs is counted right."""

from __future__ import annotations

import shutil
import struct
from itertools import product

import numpy as np
import pytest
import torch
from promises import FORMATS, assert_bitwise, ident, randn

from fastcnn import LRNParams, PoolParams, backends
from fastcnn.ops.register import IMPLEMENTATIONS
from fastcnn.params import AugmentParams, BatchNormParams, TailParams

pytest.importorskip("triton")
if backends.INTERPRETING:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
import triton.language as tl

from tools.machine_code import launch_cost, launches
from tools.machine_code.compiled import compiling
from tools.machine_code.compiled_cuda import compiled
from tools.machine_code.execute import Counts, Launch, Memory, execute
from tools.machine_code.sass import instructions

ALEXNET = LRNParams(5, 1e-4, 0.75, 2.0), PoolParams(3, 2)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
formats = pytest.mark.parametrize("format", FORMATS, ids=ident)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=ident)
resized = pytest.mark.parametrize("resizes", [False, True], ids=["same size", "resized"])


@pytest.fixture(scope="module")
def cuda():
    if not shutil.which("nvcc"):
        pytest.skip("there is no nvcc")
    return launches.Cuda()


def by_triton(name, *args):
    def run(kernel):
        assert kernel.spills == 0
        launches.run(kernel)

    with compiling(90, run):
        return IMPLEMENTATIONS[name]["triton"](*args)


def by_reference(name, *args):
    return IMPLEMENTATIONS[name]["reference"](*args)


def assert_right(got, expected, dtype):
    """In 16 bits the last may differ, where a sum was in another order."""
    assert got.dtype == expected.dtype
    assert got.stride() == expected.stride()
    tolerance = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-6}
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else tolerance
    torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)


def pictures(sizes):
    """Arguments of ``augment``: odd places, a mirrored crop, more rows than a program or a block goes through."""
    x = torch.randint(256, (2, 83, 47, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sizes = torch.tensor([[140, 31], [75, 90]]) if sizes else None  # larger, smaller
    return x, torch.tensor([[5, 1], [0, 2]]), torch.tensor([False, True]), 255 * torch.rand(2, 3), sizes


def augmentation(dtype, format):
    return AugmentParams((70, 29), (0.3, 1.0, 1 / 57.4), dtype, format)


def assert_augmented(got, expected, sizes):
    """Where pictures keep their size, these very bits; else the last digits of a pixel, up to 255, may differ."""
    if sizes is None:
        assert_bitwise(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=torch.finfo(got.dtype).eps, atol=5e-5)
    assert got.stride() == expected.stride()


def with_nan(x):
    """Several in a window, and windows of equal values."""
    x = (2 * x).round() / 2
    x[..., ::3, 1::4] = float("nan")
    return x


# -- Triton -----------------------------------------------------------------------------------------------------------


@formats
@dtypes
@pytest.mark.parametrize("channels", [24, 7], ids=["vectors", "elements"])
def test_triton_lrn(channels, dtype, format):
    x, dy = randn(2, channels, 5, 7, dtype=dtype, format=format), randn(2, channels, 5, 7, dtype=dtype, seed=1)
    dy = dy.contiguous(memory_format=format)
    lrn = ALEXNET[0]
    assert_right(by_triton("lrn", x, lrn), by_reference("lrn", x, lrn), dtype)
    assert_right(by_triton("lrn_backward", dy, x, lrn), by_reference("lrn_backward", dy, x, lrn), dtype)


@formats
@pytest.mark.parametrize(
    ("pool", "dtype"),
    [*product([ALEXNET[1]], DTYPES), (PoolParams(2), torch.bfloat16), (PoolParams(3, 2, 1), torch.float32)],
    ids=ident,
)
def test_triton_max_pool2d(pool, dtype, format):
    """NaN and equal values included: the packed maximum has a path of its own for them."""
    x = with_nan(randn(2, 16, 9, 11, dtype=dtype, format=format))
    y, argmax = by_triton("max_pool2d", x, pool, True)
    expected, places = by_reference("max_pool2d", x, pool, True)
    assert_bitwise(y, expected)
    assert torch.equal(argmax, places)
    dy = randn(*y.shape, dtype=dtype, seed=1).contiguous(memory_format=format)
    channels_last = format == torch.channels_last
    args = dy, places, [9, 11], channels_last, pool
    assert_right(by_triton("max_pool2d_backward", *args), by_reference("max_pool2d_backward", *args), dtype)


@pytest.mark.parametrize(
    ("lrn", "dtype", "format"),
    [
        (ALEXNET[0], torch.bfloat16, FORMATS[0]),
        (ALEXNET[0], torch.bfloat16, FORMATS[1]),
        (None, torch.float16, FORMATS[0]),
        (None, torch.float32, FORMATS[1]),
    ],
    ids=ident,
)
def test_triton_tail(lrn, dtype, format):
    """NaN and infinities too, also of a bias: in 16 bits ReLU comes before the bias is added."""
    x, bias = randn(2, 24, 9, 11, dtype=dtype, format=format), randn(24, seed=2, dtype=dtype)
    tail = TailParams(True, lrn, ALEXNET[1])
    places = assert_triton_forward(x, bias, tail)
    dy = randn(*places.shape, dtype=dtype, seed=1).contiguous(memory_format=format)
    args = dy, x, bias, places, tail
    dx, dbias = by_triton("relu_lrn_max_pool2d_backward", *args)
    expected, sums = by_reference("relu_lrn_max_pool2d_backward", *args)
    assert_right(dx, expected, dtype)
    torch.testing.assert_close(dbias, sums, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-5)
    x = with_nan(x)
    x[:, :, 4, 2::3] = float("inf")
    x[:, :, 6, 1::3] = float("-inf")
    bias[::5], bias[1::5], bias[2::5] = float("-inf"), float("inf"), float("nan")
    assert_triton_forward(x, bias, tail)


def assert_triton_forward(x, bias, tail):
    y, argmax = by_triton("relu_lrn_max_pool2d", x, bias, tail, True)
    expected, places = by_reference("relu_lrn_max_pool2d", x, bias, tail, True)
    assert_right(y, expected, x.dtype)
    assert torch.equal(argmax, places)
    return places


@formats
@pytest.mark.parametrize(
    "pool",
    [PoolParams(3, 2), PoolParams(3, 2, 1), PoolParams(3, 2, ceil_mode=True), PoolParams((2, 4), (1, 3))],
    ids=ident,
)
@pytest.mark.parametrize("size", [(5, 70), (11, 8)], ids=["wide", "even"])
def test_triton_tail_at_every_edge(size, pool, format):
    """Rows of more lanes than a warp has, programs that go on in the next map, and columns that the last lane lacks.

    The bias is in float32, which 16-bit kernels take too.
    """
    x, bias = randn(3, 16, *size, dtype=torch.bfloat16, format=format), randn(16, seed=2)
    assert_triton_forward(x, bias, TailParams(True, None, pool))


@formats
@dtypes
@resized
def test_triton_augment(resizes, dtype, format):
    *args, sizes = pictures(resizes)
    args = *args, sizes, augmentation(dtype, format)
    assert_augmented(by_triton("augment", *args), by_reference("augment", *args), sizes)


# -- CUDA C++ ---------------------------------------------------------------------------------------------------------


@formats
@dtypes
def test_cuda_tail(cuda, dtype, format):
    assert_cuda_tail(cuda, randn(2, 24, 9, 11, dtype=dtype, format=format), TailParams(True, *ALEXNET))


@formats
@pytest.mark.parametrize(
    ("channels", "tail"),
    [
        (20, TailParams(True, *ALEXNET)),  # not of whole vectors
        (24, TailParams(True, None, ALEXNET[1])),
        (24, TailParams(True, ALEXNET[0], None)),
        (24, TailParams(True, LRNParams(5, 1e-4, 0.5, 2.0, 3), PoolParams(2, 2))),
        (24, TailParams(False, None, PoolParams(3, 2, 0, 1, True))),
    ],
    ids=str,
)
def test_cuda_tail_of_other_parts(cuda, format, channels, tail):
    assert_cuda_tail(cuda, randn(2, channels, 10, 11, dtype=torch.bfloat16, format=format), tail)


def assert_cuda_tail(cuda, x, tail):
    channels, dtype, channels_last = x.shape[1], x.dtype, not x.is_contiguous()
    bias, format = randn(channels, seed=2), torch.channels_last if channels_last else torch.contiguous_format
    expected, places = by_reference("relu_lrn_max_pool2d", x, bias, tail, True)
    y, pooled = torch.empty_like(expected), {} if places is None else {"argmax": torch.empty_like(places)}
    cuda.run("relu_lrn_max_pool2d", channels_last, tail, x=x, bias=bias, out=y, **pooled)
    assert_right(y, expected, dtype)
    assert places is None or torch.equal(pooled["argmax"], places)
    dy, dx, dbias = randn(*y.shape, dtype=dtype, seed=1), torch.empty_like(x), torch.empty(channels)
    dy = dy.contiguous(memory_format=format)
    given = {"x": x, "bias": bias, "dy": dy, **({} if places is None else {"argmax": places})}
    cuda.run("relu_lrn_max_pool2d_backward", channels_last, tail, **given, out=dx, dbias=dbias)
    reference = by_reference("relu_lrn_max_pool2d_backward", dy, x, bias, places, tail)
    assert_right(dx, reference[0], dtype)
    torch.testing.assert_close(dbias, reference[1], rtol=1e-5, atol=1e-5)


@formats
@dtypes
def test_cuda_lrn_and_max_pool2d(cuda, dtype, format):
    x, channels_last = randn(2, 24, 9, 11, dtype=dtype, format=format), format == torch.channels_last
    lrn, pool = ALEXNET
    only_lrn, only_pool = TailParams(False, lrn, None), TailParams(False, None, pool)
    y, dy = torch.empty_like(x), randn(*x.shape, dtype=dtype, seed=1).contiguous(memory_format=format)
    cuda.run("lrn", channels_last, only_lrn, x=x, out=y)
    assert_right(y, by_reference("lrn", x, lrn), dtype)
    cuda.run("lrn_backward", channels_last, only_lrn, x=x, dy=dy, out=y)
    assert_right(y, by_reference("lrn_backward", dy, x, lrn), dtype)
    x = with_nan(x)
    expected, places = by_reference("max_pool2d", x, pool, True)
    y, argmax = torch.empty_like(expected), torch.empty_like(places)
    cuda.run("max_pool2d", channels_last, only_pool, x=x, out=y, argmax=argmax)
    assert_bitwise(y, expected)
    assert torch.equal(argmax, places)
    dy, dx = randn(*y.shape, dtype=dtype, seed=1).contiguous(memory_format=format), torch.empty_like(x)
    nothing = torch.empty(x.shape, dtype=dtype, device="meta")
    cuda.run("max_pool2d_backward", channels_last, only_pool, x=nothing, dy=dy, argmax=places, out=dx)
    assert_right(dx, by_reference("max_pool2d_backward", dy, places, [9, 11], channels_last, pool), dtype)


@formats
@dtypes
@resized
def test_cuda_augment(cuda, resizes, dtype, format):
    x, offsets, mirror, mean, sizes = pictures(resizes)
    params = augmentation(dtype, format)
    expected = by_reference("augment", x, offsets, mirror, mean, sizes, params)
    y, given = torch.empty_like(expected), {"offsets": offsets, "mirror": mirror, "mean": mean}
    cuda.augment(params, x=x, **given, **({} if sizes is None else {"sizes": sizes}), out=y)
    assert_augmented(y, expected, sizes)


@formats
@dtypes
@pytest.mark.parametrize(
    ("channels", "norm"),
    [
        (24, BatchNormParams(True, pool=ALEXNET[1])),
        (21, BatchNormParams(True, relu_first=True)),  # not of whole vectors
    ],
    ids=["pool", "relu_first"],
)
def test_cuda_batch_norm(cuda, channels, norm, dtype, format):
    name, channels_last = "batch_norm_relu_max_pool2d", format == torch.channels_last
    x, weight, bias = randn(2, channels, 9, 11, dtype=dtype, format=format), randn(channels), randn(channels, seed=1)
    expected, places, *statistics = by_reference(name, x, None, None, weight, bias, norm, True)
    mean, var = (torch.empty(channels) for _ in range(2))
    cuda.batch_norm("batch_norm_statistics", channels_last, norm, x=x, mean=mean, var=var)
    torch.testing.assert_close([mean, var], statistics, rtol=2e-6, atol=1e-6)
    given = {"x": x, "mean": mean, "var": var, "weight": weight, "bias": bias}
    y, pooled = torch.empty_like(expected), {"argmax": torch.empty_like(places)} if norm.pool else {}
    cuda.batch_norm(name, channels_last, norm, **given, out=y, **pooled)
    assert_right(y, expected, dtype)
    assert not norm.pool or torch.equal(pooled["argmax"], places)
    dy, results = randn(*y.shape, dtype=dtype, seed=2).contiguous(memory_format=format), [torch.empty_like(x)]
    results += [torch.empty(channels) for _ in range(2)]
    out = dict(zip(("out", "dweight", "dbias"), results, strict=True))
    cuda.batch_norm(f"{name}_backward", channels_last, norm, **given, dy=dy, **pooled, **out)
    exact = by_reference(f"{name}_backward", dy, x, mean, var, weight, bias, places, norm)
    assert_right(results[0], exact[0], dtype)
    torch.testing.assert_close(results[1:], list(exact[1:]), rtol=1e-5, atol=1e-5)


def test_every_operator_has_a_launch_cost(cuda):
    found = {(cost.work.name, cost.work.format): cost for cost in launch_cost.costs(cuda, calls=10, repeats=1)}
    operators = [name for name in IMPLEMENTATIONS if not name.startswith(("conv2d", "batch_norm"))]  # no workloads
    assert found.keys() == set(product(operators, ("NCHW", "channels_last")))
    assert all(cost.microseconds > 0 and cost.kernels > 0 for cost in found.values())


# -- counts, and that these tests would fail --------------------------------------------------------------------------


@triton.jit
def scale_kernel(x, y, n, factor, loops, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < n, 0.0)
    by = tl.load(factor)
    while loops > 0:
        value *= by
        loops -= 1
    tl.store(y + at, value, at < n)


def scaled(n, loops, elements=None):
    """Counts of all of the launch; x has as many ``elements``, or n."""
    x, y, factor = randn(elements or n), torch.zeros(n), torch.ones(1)
    counted: list[Counts] = []

    def count(kernel):
        memory = Memory()
        places = {id(t): memory.add(t.numpy()) for t in (x, y, factor)}
        packed = launches.parameters(kernel, lambda name, t: places[id(t)])
        launch = Launch(instructions(kernel.sass), (kernel.grid[0], 1, 1), (128, 1, 1), packed, kernel.shared)
        counted.append(execute(launch, memory, range(launch.blocks)))

    with compiling(90, count):
        scale_kernel[(triton.cdiv(n, 128),)](x, y, n, factor, loops, 128, num_warps=4)
    return counted[0]


def test_memory_traffic_is_counted():
    counts = scaled(256, 2)
    assert counts.warps == 8
    assert (counts.load_sectors, counts.store_sectors, counts.store_lines) == (
        32 + 2,
        32,
        8,
    )  # each block has the factor
    assert (counts.load_touched, counts.load_lines) == (32 + 8, 8 + 8)  # which each of its warps loads
    assert scaled(200, 2).store_lines == 7  # the last warp has no element


def test_loops_are_counted_as_often_as_they_run():
    few, more, most = (scaled(256, loops).issued["FMUL"] for loops in (16, 32, 64))
    assert (more - few, most - more) == (8 * 16, 8 * 32)  # beside those of the unrolled loop's rest


def test_an_address_outside_of_a_tensor_is_an_error():
    with pytest.raises(IndexError, match="of a buffer of"):
        scaled(256, 2, elements=255)


def assembled(*lines):
    text = "        /*{:04x}*/                   {} ;        /* 0x0000000000000000 */"
    return instructions("\n".join(text.format(16 * i, line) for i, line in enumerate(lines)))


def test_an_unknown_instruction_is_an_error():
    with pytest.raises(NotImplementedError, match=r"FOO\.BAR at 0x0"):
        execute(Launch(assembled("FOO.BAR R1, R2"), (1, 1, 1), (32, 1, 1), b"", 0), Memory(), [0])


@pytest.mark.parametrize(
    ("threads", "stride", "load", "wavefronts", "conflicts"),
    [
        (32, 4, "LDS", 1, 0),
        (32, 0, "LDS", 1, 0),
        (32, 8, "LDS", 2, 1),
        (32, 128, "LDS", 32, 31),
        (32, 2, "LDS.U16", 1, 0),
        (32, 8, "LDS.64", 2, 0),
        (32, 16, "LDS.64", 4, 2),
        (32, 16, "LDS.128", 4, 0),
        (32, 32, "LDS.128", 8, 4),
        (40, 16, "LDS.128", 5, 0),  # only a quarter of the second warp
    ],
)
def test_bank_conflicts_are_counted(threads, stride, load, wavefronts, conflicts):
    code = assembled("S2R R0, SR_TID.X", f"IMAD R0, R0, {stride:#x}, RZ", f"{load} R4, [R0]", "EXIT")
    counts = execute(Launch(code, (1, 1, 1), (threads, 1, 1), b"", 4096), Memory(), [0])
    assert (counts.shared, counts.conflicts) == (wavefronts, conflicts)


COPIES = """
__device__ void copy(uint4* to, const uint4* from, int bytes) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int groups_left>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}
__global__ void copies(const uint4* x, uint4* y, int exist, int bytes) {
  __shared__ uint4 shared[3][64];
  const int t = threadIdx.x;
  copy(&shared[0][t], x + t, 16);
  copy(&shared[1][t], x + 64 + t, t < exist ? 16 : 0);
  wait<1>();
  y[t] = shared[0][t];
  copy(&shared[2][t], x + 128 + t, bytes);
  wait<1>();
  y[64 + t] = shared[1][t];
  wait<0>();
  y[128 + t] = shared[2][t];
}
"""


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    if not shutil.which("nvcc"):
        pytest.skip("there is no nvcc")
    source = tmp_path_factory.mktemp("copies") / "copies.cu"
    source.write_text(COPIES)
    return compiled(source, 90)[0]


@pytest.mark.parametrize("bytes", [16, 0])
def test_asynchronous_copies_arrive_and_are_counted_as_loads(copies, bytes):
    memory, exist = Memory(), 40
    x, y = np.arange(1, 4 * 192 + 1, dtype=np.uint32), np.zeros(4 * 192, np.uint32)
    places = memory.add(x), memory.add(y)
    packed = struct.pack("<QQii", *places, exist, bytes)
    code = instructions(copies.sass)
    counts = execute(Launch(code, (1, 1, 1), (64, 1, 1), packed, copies.shared), memory, [0])
    expected = x.copy()
    expected[4 * (64 + exist) : 4 * 128] = 0
    if not bytes:
        expected[4 * 128 :] = 0
    np.testing.assert_array_equal(memory.contents(places[1]).view(np.uint32), expected)
    pieces = 64 + exist + 4 * bytes
    assert (counts.load_sectors, counts.load_touched, counts.load_lines) == (pieces // 2, pieces // 2, pieces // 8)
    opcodes = {opcode: n for opcode, n in counts.issued.items() if opcode.startswith("LDGSTS")}
    assert opcodes == {"LDGSTS.E.BYPASS.128": 2 * 2, "LDGSTS.E.BYPASS.128.ZFILL": 2}
    assert (counts.shared, counts.conflicts) == (2 * 3 * 64 // 8, 0)  # copied there and read
    # The second copy arrives while the first is waited for; one of nothing but zeros is never under way.
    assert counts.waits == (4 if bytes else 2)
