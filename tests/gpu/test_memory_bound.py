"""lrn, max_pool2d and the tail on a GPU keep the operators' promises, by Triton in every configuration."""

import pytest
import torch
from ops.test_lrn import LRN, LRN_BACKWARD, STRONG
from ops.test_max_pool2d import BACKWARD as POOL_BACKWARD
from ops.test_max_pool2d import OP as POOL_FORWARD
from ops.test_max_pool2d import POOLS
from ops.test_relu_lrn_max_pool2d import PARTS, STAGE, TAIL, TAIL_BACKWARD, parts_id
from promises import (
    DTYPES,
    FORMATS,
    NARROW,
    assert_bitwise,
    assert_same_answer,
    at_offsets,
    gradients,
    ident,
    in_format,
    integers,
    leaf,
    randn,
    tail_args,
)

import fastcnn
import fastcnn.functional as FF
from fastcnn import LRNParams, PoolParams, backends, reference
from fastcnn.ops import lrn, max_pool2d, relu_lrn_max_pool2d

pytestmark = pytest.mark.gpu
formats = pytest.mark.parametrize("format", FORMATS, ids=ident)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=ident)
SHAPES = [(3, 96, 13, 17), (2, 17, 9, 31), (1, 256, 27, 27), (5, 3, 55, 55)]
POOL = PoolParams(3, 2)


@pytest.fixture(autouse=True)
def triton():
    if "triton" not in backends.available():
        pytest.skip(backends.status()["triton"])
    with backends.use("triton"):
        yield


def assert_lrn(x, dy, y, dx, *args):
    x64 = leaf(x.cpu(), torch.float64)
    y64 = reference.local_response_norm(x64, *args[:4], groups=args[4])
    assert_same_answer(y.cpu(), y64.detach())
    assert_same_answer(dx.cpu(), gradients(y64, (x64,), dy.cpu().double())[0], backward=True)


def assert_tail(x, bias, y, argmax, dy, dx, dbias, relu, lrn, pool):
    """Against the reference in float64 on the CPU; gradients are those of the elements that the argmax points at."""
    x64, bias64 = leaf(x.cpu(), torch.float64), leaf(None if bias is None else bias.cpu(), torch.float64)
    y64 = reference.relu_lrn_max_pool2d(x64, bias64, relu=relu, lrn=lrn)
    pooled = reference.relu_lrn_max_pool2d(x64, bias64, relu=relu, lrn=lrn, pool=pool)
    if pool is not None:
        y64 = at_offsets(y64, argmax.cpu(), pool)
    assert_same_answer(y.cpu(), pooled.detach())
    expected, expected_bias = gradients(y64, (x64, bias64), dy.cpu().double())
    assert_same_answer(dx.cpu(), expected, backward=True)
    if bias is not None:
        assert_same_answer(dbias.cpu(), expected_bias, backward=True)


# -- same answer ------------------------------------------------------------------------------------------------------


@dtypes
@formats
@pytest.mark.parametrize("shape", SHAPES, ids=ident)
@pytest.mark.parametrize("args", [(*STRONG, 1), (2, 0.5, 0.6, 2.0, 1), (40, 9.0, 0.5, 1.0, 1)], ids=ident)
def test_lrn_same_answer(args, shape, format, dtype):
    x, dy = (randn(*shape, dtype=dtype, format=format, seed=s).cuda() for s in (0, 1))
    assert_lrn(x, dy, LRN(x, *args), LRN_BACKWARD(dy, x, *args), *args)


@formats
@pytest.mark.parametrize("i", range(len(lrn.FORWARD_CONFIGS)))
def test_lrn_every_configuration(i, format):
    x, dy = (randn(3, 96, 13, 17, dtype=torch.bfloat16, format=format, seed=s).cuda() for s in (0, 1))
    args = (*STRONG, 2)
    y = lrn.triton(x, *args, config=lrn.FORWARD_CONFIGS[i])
    assert_lrn(x, dy, y, lrn.triton_backward(dy, x, *args, config=lrn.BACKWARD_CONFIGS[i]), *args)


@dtypes
@formats
@pytest.mark.parametrize("pool", POOLS, ids=ident)
def test_pool_is_that_of_torch(pool, format, dtype):
    """Values, places and gradients, bit for bit, for every configuration."""
    x = in_format(integers(2, 24, 27, 21, dtype=dtype), format)
    expected, places = reference.window_offsets(x, pool)
    dy = integers(*expected.shape, dtype=dtype, seed=1)
    expected_dx = reference.max_pool2d_backward(dy.double(), places, (27, 21), pool).to(dtype)
    last = format == torch.channels_last
    for forward, backward in zip(max_pool2d.FORWARD_CONFIGS, max_pool2d.BACKWARD_CONFIGS, strict=True):
        y, argmax = max_pool2d.triton(x.cuda(), *pool.op_args(), True, config=forward)
        dx = max_pool2d.triton_backward(dy.cuda(), argmax, [27, 21], last, *pool.op_args(), config=backward)
        for ours, theirs in ((y, expected), (argmax.long(), places), (dx, expected_dx)):
            assert_bitwise(ours.cpu(), theirs)


@dtypes
@formats
@pytest.mark.parametrize("tail", PARTS, ids=parts_id)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=ident)
def test_tail_same_answer_with_any_part_absent(shape, tail, format, dtype):
    x = randn(*shape, dtype=dtype, format=format).cuda()
    bias = randn(shape[1], dtype=torch.float32 if dtype in NARROW else dtype, seed=1).cuda()
    y, argmax = TAIL(x, bias, *tail_args(**tail), tail["pool"] is not None)
    dy = 2 + randn(*y.shape, dtype=dtype, seed=2).cuda()
    dx, dbias = TAIL_BACKWARD(dy, x, bias, argmax, *tail_args(**tail))
    assert_tail(x, bias, y, argmax, dy, dx, dbias, **tail)


@formats
@pytest.mark.parametrize("forward", relu_lrn_max_pool2d.FORWARD_CONFIGS, ids=ident)
@pytest.mark.parametrize("backward", relu_lrn_max_pool2d.BACKWARD_CONFIGS[1:], ids=ident)
def test_tail_every_configuration(forward, backward, format):
    x, args = randn(3, 96, 13, 17, format=format).cuda(), tail_args(**STAGE)
    y, argmax = relu_lrn_max_pool2d.triton(x, None, *args, True, config=forward)
    dy = 2 + randn(*y.shape, seed=2).cuda()
    dx, dbias = relu_lrn_max_pool2d.triton_backward(dy, x, None, argmax, *args, config=backward)
    assert_tail(x, None, y, argmax, dy, dx, dbias, **STAGE)


@pytest.mark.parametrize("tail", [STAGE, {"relu": True, "lrn": LRNParams(5), "pool": None}], ids=parts_id)
@formats
def test_same_bits_in_every_run(format, tail):
    x, bias = randn(16, 96, 55, 55, format=format).cuda(), randn(96, seed=1).cuda()

    def run():
        y, argmax = TAIL(x, bias, *tail_args(**tail), tail["pool"] is not None)
        return [y, argmax, *TAIL_BACKWARD(y, x, bias, argmax, *tail_args(**tail))]

    for ours, first in zip(run(), run(), strict=True):
        assert_bitwise(ours, first)


# -- every size -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@formats
def test_more_than_2_to_the_31_elements(format):
    """The last images get what they get alone."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.empty(260, 96, 296, 296, dtype=torch.bfloat16, device="cuda", memory_format=format)
    assert x.numel() > 2**31
    x[-2:] = x[:2] = randn(2, 96, 296, 296, dtype=torch.bfloat16).cuda()
    ends, args, pool = x[-2:].contiguous(memory_format=format), tail_args(**STAGE), POOL.op_args()
    for op in (lambda t: LRN(t, *STRONG, 1), lambda t: LRN_BACKWARD(t, t, *STRONG, 1)):
        assert_bitwise(op(x)[-2:], op(ends))

    def pooled(t):
        y, argmax = POOL_FORWARD(t, *pool, True)
        return POOL_BACKWARD(y, argmax, [296, 296], format == torch.channels_last, *pool)

    def stage(t):
        y, argmax = TAIL(t, None, *args, True)
        return TAIL_BACKWARD(y, t, None, argmax, *args)[0]

    for op in (pooled, stage):
        assert_bitwise(op(x)[-2:], op(ends))


# -- composes ---------------------------------------------------------------------------------------------------------


@formats
def test_opcheck_and_gradcheck(format):
    x, bias = randn(2, 8, 5, 6, format=format).cuda(), randn(8, seed=1).cuda()
    y, argmax = TAIL(x, bias, *tail_args(**STAGE), True)
    torch.library.opcheck(LRN, (leaf(x), *STRONG, 1))
    torch.library.opcheck(POOL_FORWARD, (leaf(x), *POOL.op_args(), True))
    torch.library.opcheck(TAIL, (leaf(x), leaf(bias), *tail_args(**STAGE), True))
    torch.library.opcheck(TAIL_BACKWARD, (y, x, bias, argmax, *tail_args(**STAGE)))
    torch.autograd.gradcheck(lambda x: FF.local_response_norm(x, *STRONG), leaf(x[:1], torch.float64))
    torch.autograd.gradcheck(lambda x: FF.relu_lrn_max_pool2d(x, **STAGE), leaf(x[:1], torch.float64))


@formats
def test_cuda_graph_replays_forward_and_backward(format):
    x, bias = leaf(randn(4, 96, 13, 13, format=format).cuda()), leaf(randn(96, seed=1).cuda())

    def run():
        y = FF.relu_lrn_max_pool2d(FF.local_response_norm(FF.max_pool2d(x, 2, 1), 5), bias, **STAGE)
        return [y, *torch.autograd.grad(y.sum(), (x, bias))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        x.copy_(randn(4, 96, 13, 13, seed=3))
    graph.replay()
    for ours, expected in zip(captured, run(), strict=True):
        assert_bitwise(ours.detach(), expected.detach())


def test_compile_without_graph_break():
    layer = fastcnn.nn.ReLULRNMaxPool2d(lrn=LRNParams(5), pool=POOL)
    x, bias = leaf(randn(2, 16, 13, 13, format=torch.channels_last).cuda()), leaf(randn(16, seed=1).cuda())
    y, expected = torch.compile(layer, fullgraph=True)(x, bias), layer(x, bias)
    assert_bitwise(y.detach(), expected.detach())
    for ours, theirs in zip(gradients(y, (x, bias), y), gradients(expected, (x, bias), expected), strict=True):
        assert_bitwise(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_gpu_than_the_current():
    x = randn(2, 16, 13, 13)
    one, two = (FF.relu_lrn_max_pool2d(x.to(device), **STAGE) for device in ("cuda:0", "cuda:1"))
    assert two.device.index == 1
    assert_bitwise(two.cpu(), one.cpu())
