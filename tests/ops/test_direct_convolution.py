"""Direct convolution, of small maps in inference: csrc/cpu/direct_convolution.cpp, and the weights that it takes."""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from promises import assert_bitwise, embedded, integers, randn
from torch import Tensor

import fastcnn
from fastcnn.optimize.inference import pack_panels

pytestmark = pytest.mark.skipif("cpu" not in fastcnn.backends.available(), reason="needs the C++ library")
NAN, INF = float("nan"), float("inf")


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    relu: bool = False,
    before: int = 0,
    after: int = 0,
) -> Tensor:
    """All channels of ``out``, of which those ``before`` and ``after`` are not to be written: they are 7."""
    outputs, _, *window = weight.shape
    size = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (window[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    y = torch.full((len(x), before + outputs + after, *size), 7.0).to(memory_format=torch.channels_last)
    y[:, before : before + outputs] = NAN
    packed = pack_panels(weight, groups)
    torch.ops.fastcnn_cpu.direct_convolution(
        x, packed, bias, addend, y, before, outputs, window, stride, padding, dilation, groups, relu
    )
    return y


def torch_s(x, weight, bias=None, addend=None, *, relu=False, **where):
    y = F.conv2d(x, weight, bias, **where)
    y = y if addend is None else y + addend
    return y.relu() if relu else y


def error(y: Tensor, exact: Tensor) -> float:
    assert y.shape == exact.shape
    return (y.double() - exact).norm().item()


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def drawn(seed: int) -> tuple[list[Tensor | None], dict]:
    """Tensors and options; no window is larger than its padded map."""
    draw = random.Random(seed)
    groups = draw.choice([1, 1, 2, 3])
    c, k = (groups * draw.choice(sizes) for sizes in ([1, 3, 16, 37], [1, 5, 16, 31, 70, 130]))
    window, stride, dilation = (
        [draw.choice(sizes) for _ in range(2)] for sizes in ([1, 2, 3, 5], [1, 1, 2, 3], [1, 2])
    )
    padding = [draw.randint(0, 2) for _ in range(2)]
    size = [max(1, dilation[i] * (window[i] - 1) + 1 - 2 * padding[i]) + draw.choice([0, 1, 6, 31]) for i in (0, 1)]
    x = channels_last(randn(draw.randint(1, 3), c, *size, seed=seed))
    weight, bias = randn(k, c // groups, *window, seed=seed + 1), randn(k, seed=seed + 2)
    where = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    addend = channels_last(randn(*F.conv2d(x, weight, **where).shape, seed=seed + 3))
    tensors = [x, weight, draw.choice([bias, None]), draw.choice([addend, None])]
    return tensors, {**where, "relu": draw.random() < 0.5}


@pytest.mark.parametrize("seed", range(40))
def test_error_is_at_most_twice_that_of_torch(kernel, seed):
    tensors, options = drawn(seed)
    exact = torch_s(*doubled(*tensors), **options)
    of_torch = error(torch_s(*tensors, **options), exact)
    before, after = random.Random(seed).choice([(0, 0), (3, 0), (0, 5), (16, 17)])
    y = run(*tensors, **options, before=before, after=after)
    assert error(y[:, before : before + exact.shape[1]], exact) <= 2 * of_torch + 1e-6 * exact.norm()
    assert (y[:, :before] == 7).all()
    assert (y[:, before + exact.shape[1] :] == 7).all()


# images, channels, outputs, height, width
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 16, 64, 1, 1),
    (2, 5, 7, 1, 9),
    (1, 64, 200, 7, 7),
    (5, 33, 65, 2, 3),
    (1, 3, 129, 4, 30),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [(1, 1), (3, 3), (1, 7), (7, 1)])
def test_exact_with_small_integers(kernel, window, shape):
    """Every sum is exact, so each product must be there, once."""
    n, c, k, h, w = shape
    x, weight, bias = channels_last(integers(n, c, h, w)), integers(k, c, *window, seed=1), integers(k, seed=2)
    padding = window[0] // 2, window[1] // 2
    addend = channels_last(integers(n, k, h, w, seed=3))
    expected = torch_s(*doubled(x, weight, bias, addend), padding=padding).float()
    assert_bitwise(run(x, weight, bias, addend, padding=padding) + 0, expected + 0)
    assert_bitwise(run(x, weight, bias, addend, padding=padding, relu=True), expected.relu())


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 64, 65, 128, 144, 200])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_number_of_panels(kernel, groups, outputs):
    x, weight = channels_last(integers(2, 4 * groups, 3, 5)), integers(outputs * groups, 4, 3, 3, seed=1)
    bias = integers(outputs * groups, seed=2)
    expected = torch_s(*doubled(x, weight, bias), padding=1, groups=groups).float()
    assert_bitwise(run(x, weight, bias, padding=(1, 1), groups=groups) + 0, expected + 0)


@pytest.mark.parametrize("window", [(1, 1), (3, 3)])
@pytest.mark.parametrize("strided", ["channels_last", "spaced", "transposed"])
def test_weights_of_any_strides(strided, window):
    x, weight = channels_last(integers(1, 6, 5, 5)), integers(20, 6, *window, seed=1)
    expected = F.conv2d(x.double(), weight.double()).float()
    if strided == "channels_last":
        weight = weight.to(memory_format=torch.channels_last)
    else:
        weight = embedded(weight, *([None, [1, 2, 1, 2]] if strided == "spaced" else [[1, 0, 3, 2]]))
    assert_bitwise(run(x, weight) + 0, expected + 0)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x", "bias", "addend"])
@pytest.mark.parametrize("window", [(1, 1), (3, 3)])
@pytest.mark.parametrize("relu", [False, True])
def test_what_is_not_finite_comes_out_as_of_torch(kernel, relu, window, where, value):
    padding = window[0] // 2, window[1] // 2
    tensors = {"x": channels_last(integers(2, 5, 6, 9)), "bias": integers(20, seed=2)}
    tensors["addend"] = channels_last(integers(2, 20, 6, 9, seed=3))
    tensors[where][(1, 3, 2, 8)[: tensors[where].dim()]] = value
    weight = integers(20, 5, *window, seed=1)
    x, bias, addend = tensors.values()
    expected = torch_s(*doubled(x, weight, bias, addend), padding=padding, relu=relu).float()
    assert not expected.isfinite().all() or (relu and value == -INF)
    assert_bitwise(run(x, weight, bias, addend, padding=padding, relu=relu) + 0, expected + 0)


def test_infinities_of_both_signs_make_nan(kernel):
    x, weight = channels_last(integers(1, 4, 3, 3)), integers(8, 4, 1, 1, low=1, high=2, seed=1)
    addend = torch.full((1, 8, 3, 3), INF).to(memory_format=torch.channels_last)
    x[0, 0, 1, 1] = -INF
    y = run(x, weight, None, addend, relu=True)
    assert y[..., 1, 1].isnan().all()
    assert y.isnan().sum() == 8


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("window", [(1, 1), (3, 3)])
def test_the_same_bits_whatever_the_threads_and_the_batch(threads: Callable[[int], None], window, groups):
    x, weight, bias = channels_last(randn(3, 32, 17, 15)), randn(96, 32 // groups, *window, seed=1), randn(96, seed=2)
    options = {"padding": (1, 1), "groups": groups}
    threads(1)
    y = run(x, weight, bias, **options)
    for number in (2, 3):
        threads(number)
        assert_bitwise(run(x, weight, bias, **options), y)
    assert_bitwise(run(x[1:2], weight, bias, **options), y[1:2])


def test_the_addend_may_be_written():
    """``out`` in its place: each output is read before it is written."""
    x, weight, addend = (
        channels_last(integers(2, 6, 5, 5)),
        integers(20, 6, 3, 3, seed=1),
        integers(2, 20, 3, 3, seed=3),
    )
    addend = channels_last(addend)
    expected = F.conv2d(x, weight) + addend
    args = [3, 3], [1, 1], [0, 0], [1, 1], 1, False
    torch.ops.fastcnn_cpu.direct_convolution(x, pack_panels(weight, 1), None, addend, addend, 0, 20, *args)
    assert_bitwise(addend + 0, expected + 0)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)])
def test_nothing_to_do(shape):
    assert run(channels_last(torch.ones(shape)), torch.ones(5, 4, 1, 1)).shape == (shape[0], 5, *shape[2:])
    call(window=[9, 9], packed=81 * 2 * 32, out=(1, 8, 0, 0), addend=(1, 8, 0, 0))
    nothing = torch.zeros(0)
    args = [1, 1], [1, 1], [0, 0], [1, 1], 1, True
    torch.ops.fastcnn_cpu.direct_convolution(
        torch.ones(2, 4, 3, 3), nothing, None, None, torch.ones(2, 0, 3, 3), 0, 0, *args
    )


GOOD = {
    "x": (1, 4, 5, 5),
    "packed": 9 * 2 * 32,
    "bias": 8,
    "addend": (1, 8, 3, 3),
    "out": (1, 8, 3, 3),
    "first": 0,
    "outputs": 8,
    "window": [3, 3],
    "stride": [2, 2],
    "padding": [1, 1],
    "dilation": [1, 1],
    "groups": 2,
}


def call(**changed) -> None:
    case = {**GOOD, **changed}
    tensors = [torch.zeros(case[name]) for name in ("x", "packed", "bias", "addend", "out")]
    torch.ops.fastcnn_cpu.direct_convolution(
        *tensors,
        *(case[name] for name in ("first", "outputs", "window", "stride", "padding", "dilation", "groups")),
        True,
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"x": (1, 5, 5, 5)},
        {"packed": 9 * 2 * 32 - 1},
        {"packed": 9 * 2 * 8},
        {"bias": 7},
        {"bias": 9},
        {"addend": (1, 8, 3, 2)},
        {"addend": (1, 9, 3, 3)},
        {"out": (1, 8, 3, 2)},
        {"out": (1, 7, 3, 3)},
        {"out": (2, 8, 3, 3)},
        {"first": 1},
        {"first": -1},
        {"out": (1, 9, 3, 3), "first": -1},
        {"outputs": 7, "bias": 7, "addend": (1, 7, 3, 3)},
        {"outputs": -8},
        {"groups": 3},
        {"groups": 0},
        {"groups": -2},
        {"stride": [0, 2]},
        {"stride": [2, 0]},
        {"stride": [2, -2]},
        {"stride": [2]},
        {"window": [3]},
        {"window": [0, 3]},
        {"window": [0, 0], "packed": 0, "out": (1, 8, 4, 4), "addend": (1, 8, 4, 4)},
        {"padding": []},
        {"padding": [-1, -1], "out": (1, 8, 1, 1), "addend": (1, 8, 1, 1)},
        {"dilation": [0, 1], "out": (1, 8, 4, 3), "addend": (1, 8, 4, 3)},
    ],
    ids=str,
)
def test_sizes_are_checked(changed):
    """The op can be called by itself, and must not read or write out of bounds, nor end the process."""
    call()
    with pytest.raises(RuntimeError, match=r"must|has"):
        call(**changed)


@pytest.mark.parametrize("wrong", range(5))
def test_dtypes_are_checked(wrong):
    tensors = [torch.zeros(GOOD[name]) for name in ("x", "packed", "bias", "addend", "out")]
    tensors[wrong] = tensors[wrong].double()
    with pytest.raises(RuntimeError, match="must"):
        torch.ops.fastcnn_cpu.direct_convolution(*tensors, 0, 8, [3, 3], [2, 2], [1, 1], [1, 1], 2, True)


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages of memory")
def test_nothing_is_read_or_written_out_of_bounds():
    script = Path(__file__).parents[1] / "guard_pages.py"
    done = subprocess.run([sys.executable, str(script), "direct_convolution"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]
