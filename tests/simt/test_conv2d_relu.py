"""The CUDA convolution, its tensor cores emulated, under the sanitizers."""

import pytest
import torch
import torch.nn.functional as F
from promises import FORMATS, NARROW, assert_bitwise, ident, integers, randn

LAYERS = {  # small maps of the layers that the kernel is made for
    "AlexNet conv1": {"x": (2, 3, 23, 27), "w": (96, 3, 11, 11), "stride": (4, 4)},
    "VGG conv1_1": {"x": (1, 3, 9, 15), "w": (64, 3, 3, 3), "padding": (1, 1)},
    "AlexNet conv2": {"x": (1, 16, 7, 7), "w": (24, 8, 5, 5), "padding": (2, 2), "groups": 2},
    "AlexNet conv4": {"x": (2, 48, 6, 5), "w": (144, 24, 3, 3), "padding": (1, 1), "groups": 2},
}
AWKWARD = {
    "one of everything": {"x": (1, 1, 1, 1), "w": (1, 1, 1, 1)},
    "odd channels": {"x": (2, 7, 9, 6), "w": (13, 7, 2, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (3, 2)},
    "groups of odd size": {"x": (1, 9, 5, 7), "w": (15, 3, 3, 1), "groups": 3, "padding": (2, 0)},
    "depthwise": {"x": (1, 12, 6, 6), "w": (12, 1, 3, 3), "groups": 12},
    "groups that fold the grid": {"x": (1, 10, 5, 5), "w": (5, 2, 3, 3), "groups": 5},
    "more outputs than a block": {"x": (1, 8, 3, 3), "w": (130, 8, 1, 1)},
    "padding beyond the map": {"x": (1, 8, 2, 2), "w": (8, 8, 3, 3), "padding": (4, 4)},
    "long windows": {"x": (1, 72, 3, 3), "w": (8, 72, 3, 3)},
}
DTYPES = (torch.float32, *NARROW)


@pytest.fixture(params=FORMATS, ids=ident)
def format(request):
    return request.param


def assert_convolves(emulator, format, dtype, x, w, **conv):
    """Sums of products of small integers are exact, whatever their order, and so is their ReLU."""
    x = integers(*x, dtype=dtype).contiguous(memory_format=format)
    weight, bias = integers(*w, dtype=dtype, seed=1), integers(w[0], dtype=dtype, seed=2)
    offset = conv.pop("offset", 0)
    exact = F.conv2d(x.double(), weight.double(), None, **conv)
    assert_bitwise(emulator.conv2d_relu(x, weight, **conv, offset=offset), exact.relu().to(dtype))
    with_bias = (exact + bias.double().view(-1, 1, 1)).relu().to(dtype)
    assert_bitwise(emulator.conv2d_relu(x, weight, bias, **conv, offset=offset), with_bias)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_layers_it_is_made_for(address, format, dtype, layer):
    assert_convolves(address, format, dtype, **LAYERS[layer])


@pytest.mark.parametrize("shape", AWKWARD)
def test_awkward_shapes(address, format, shape):
    for dtype in (torch.float32, torch.bfloat16):
        assert_convolves(address, format, dtype, **AWKWARD[shape])


def test_misaligned_tensors(address, format):
    assert_convolves(address, format, torch.float16, **LAYERS["AlexNet conv4"], offset=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_error_is_at_most_twice_that_of_torch(address, format, dtype):
    """Of TF32, which torch's CPU convolution does not have: at most that of rounding the factors to it."""
    x = randn(1, 40, 6, 7, dtype=dtype, format=format)
    weight, bias = randn(16, 20, 3, 3, dtype=dtype, seed=1), randn(16, dtype=dtype, seed=2)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), groups=2).relu()
    error = (address.conv2d_relu(x, weight, bias, groups=2).double() - exact).norm()
    torchs = (F.conv2d(x, weight, bias, groups=2).relu().double() - exact).norm()
    assert error <= (exact.norm() * 2**-10 if dtype == torch.float32 else 2 * torchs)


def test_nan_and_inf_like_torch(address, format):
    x, weight = integers(1, 8, 5, 5).contiguous(memory_format=format), integers(8, 8, 3, 3, seed=1)
    x[0, 3, 2, 2], x[0, 5, 0, 0] = float("nan"), float("inf")
    expected = F.conv2d(x.double(), weight.double()).relu().float()
    assert expected.isnan().any()
    assert_bitwise(address.conv2d_relu(x, weight), expected)


def test_empty_batch(address, format):
    assert address.conv2d_relu(torch.empty(0, 3, 5, 5), torch.empty(4, 3, 3, 3)).shape == (0, 4, 3, 3)


@pytest.mark.parametrize(
    ("shape", "outputs", "groups"), [((2**31, 8, 16, 16), 8, 1), ((1, 10**6, 1, 1), 10**6, 10**6)], ids=["x", "z"]
)
def test_a_grid_that_no_device_has_raises(address, format, shape, outputs, groups):
    last = format == torch.channels_last
    task = (0, list(shape), last, groups, outputs, 8, [(1, 1), (1, 1), (0, 0), (1, 1)], list(shape[2:]))
    with pytest.raises(RuntimeError, match=r"a CUDA grid cannot have \d+ x \d+ blocks"):
        address.call("conv2d_relu", task, (b"", 0), (b"", 0), None, (0, 0))


def test_float64_is_refused(address):
    with pytest.raises(RuntimeError, match="no float64"):
        address.conv2d_relu(randn(1, 1, 3, 3, dtype=torch.float64), randn(1, 1, 3, 3, dtype=torch.float64))


@pytest.mark.parametrize("layer", ["VGG conv1_1", "AlexNet conv4"])
def test_no_barrier_is_missing(thread, format, layer):
    assert_convolves(thread, format, torch.bfloat16, **LAYERS[layer])
