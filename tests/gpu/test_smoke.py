"""A first look: every operator in every dtype, memory format and direction, by each backend, at two shapes on a GPU.

On a GPU these are its kernels, elsewhere the C++ ones. The "smallest" shape is also what compute-sanitizer gets to see.
"""

import pytest
import torch
from operators import POOL, batch_norm_relu_max_pool2d, conv2d_relu, errors
from operators import STRONG as LRN
from places import Place
from promises import DTYPES, FORMATS, NARROW, assert_tail_answer, ident, randn, rounding, tail_args

import fastcnn
import fastcnn.functional as FF
from fastcnn.bench.environment import convolution_precision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("triton", "cuda") if DEVICE == "cuda" else ("cpu",)
SHAPES = {"smallest": (2, 14, 9, 11), "stage": (2, 96, 27, 27)}
if DEVICE == "cpu":
    del SHAPES["stage"]  # tests/ops has larger ones

# lrn and max_pool2d are tails that lack the other parts
TAILS = {
    "lrn": {"relu": False, "lrn": LRN},
    "max_pool2d": {"relu": False, "pool": POOL},
    "relu_lrn_max_pool2d": {"relu": True, "lrn": LRN, "pool": POOL},
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(fastcnn.backends.status()["triton"])
    with fastcnn.backends.use(request.param):
        yield


def run(op, x, bias, tail, backward):
    """By the registered ops of one operator: y, argmax or None, dy, and with backward dx and dbias or None."""
    ops, dx, dbias = torch.ops.fastcnn, None, None
    if op == "lrn":
        y, argmax = ops.lrn(x, *LRN.op_args()), None
    elif op == "max_pool2d":
        y, argmax = ops.max_pool2d(x, *POOL.op_args(), True)
    else:
        y, argmax = ops.relu_lrn_max_pool2d(x, bias, *tail_args(**tail), True)
    dy = 2 + randn(*y.shape, dtype=y.dtype, seed=2).to(DEVICE)
    if backward and op == "lrn":
        dx = ops.lrn_backward(dy, x, *LRN.op_args())
    elif backward and op == "max_pool2d":
        channels_last = y.is_contiguous(memory_format=torch.channels_last)
        dx = ops.max_pool2d_backward(dy, argmax, list(x.shape[2:]), channels_last, *POOL.op_args())
    elif backward:
        dx, dbias = ops.relu_lrn_max_pool2d_backward(dy, x, bias, argmax, *tail_args(**tail))
    return y, argmax, dy, dx, dbias


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", TAILS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_bound(backend, backward, format, dtype, op, shape):
    tail = TAILS[op]
    x = randn(*SHAPES[shape], dtype=dtype, format=format)
    bias = None
    if tail["relu"]:
        bias = randn(x.shape[1], dtype=torch.float32 if dtype in NARROW else dtype, seed=1)
    results = run(op, x.to(DEVICE), None if bias is None else bias.to(DEVICE), tail, backward)
    assert_tail_answer(x, bias, *(None if t is None else t.cpu() for t in results), **tail)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_batch_norm(backend, format, dtype, shape):
    for pool in (None, POOL):
        norm = {"training": True, "pool": pool}
        case = batch_norm_relu_max_pool2d.norm_case(SHAPES[shape], norm, float32_bias=True)
        place = Place(fastcnn.backends.forced(), DEVICE)
        batch_norm_relu_max_pool2d.check(place, case, case.tensors(dtype, format))


# weight, arguments
CONVOLUTIONS = {
    "smallest": ((6, 7, 3, 2), {"stride": (1, 2), "padding": (2, 0), "groups": 2}),
    "stage": ((64, 48, 5, 5), {"padding": 2, "groups": 2}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_conv2d_relu(backend, backward, format, dtype, shape):
    """Each error at most twice that of torch, or that of rounding once where torch happens to be exact."""
    weight_shape, kwargs = CONVOLUTIONS[shape]
    x = randn(*SHAPES[shape], dtype=dtype, format=format)
    weight = randn(*weight_shape, dtype=dtype, format=format, seed=1) / (x[0, 0].numel() / 2) ** 0.5
    tensors = [t.to(DEVICE) for t in (x, weight, randn(weight_shape[0], dtype=dtype, seed=2))]
    parts = ["output", "input", "weight", "bias"] if backward else ["output"]
    with convolution_precision("tf32"):
        ours, theirs = (errors(f, tensors, kwargs) for f in (FF.conv2d_relu, conv2d_relu.counterpart))
    for part, a, b in zip(parts, ours, theirs, strict=False):
        assert a <= max(2 * b, rounding(dtype, tf32=True)), f"{part}: error {a:.3g}, torch's {b:.3g}"
