"""The convolution behind conv2d_relu and inference that needs fewer products: fastcnn/ops/cpu/winograd.py."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from promises import assert_bitwise, gradients, ident, leaf, randn
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fastcnn
import fastcnn.functional as FF
from fastcnn.memory_format import is_channels_last
from fastcnn.ops import stage
from fastcnn.ops.cpu import winograd as _winograd
from fastcnn.ops.cpu.convolution import Convolution
from fastcnn.params import ConvParams

pytestmark = pytest.mark.skipif("cpu" not in fastcnn.backends.available(), reason="needs the C++ library")
NAN, INF = float("nan"), float("inf")


def arguments(
    n: int, c: int, k: int, h: int, w: int, groups: int = 1, window: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    x = randn(n, c, h, w, format=torch.channels_last)
    weight = randn(k, c // groups, window, window, seed=1) * (2 * groups / c) ** 0.5 / window
    return x, weight, randn(k, seed=2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], groups: int, **options):
    """The output, and its largest magnitude."""
    outputs = weight.shape[1] * groups if options.get("turned") else weight.shape[0]
    size = [
        (x.shape[2 + i] + 2 * padding[i] + 1 - weight.shape[2]) // (2 if options.get("pool") else 1) for i in (0, 1)
    ]
    y = torch.empty(x.shape[0], outputs, *size).to(memory_format=torch.channels_last)
    return y, _winograd.convolve(x, weight, bias, y, list(padding), groups, **options)


def error(y: Tensor, exact: Tensor) -> float:
    assert y.shape == exact.shape
    return ((y.double() - exact).norm() / exact.norm()).item()


def same(window: int) -> tuple[int, int]:
    """The padding with which a map keeps its size."""
    return window // 2, window // 2


# images, channels, outputs, height, width
SHAPES = [
    (1, 16, 16, 1, 1),
    (1, 16, 16, 2, 3),
    (2, 32, 48, 7, 7),
    (3, 16, 80, 6, 9),
    (1, 144, 208, 5, 4),
    (2, 272, 64, 9, 8),
]


PADDINGS = [(1, 1), (0, 0), (2, 1), (0, 3), (2, 2)]
# and windows: all that leave an output
SIZES = [
    (s, p, window)
    for window in (3, 5)
    for s in SHAPES
    for p in PADDINGS
    if min(s[3] + 2 * p[0], s[4] + 2 * p[1]) >= window
]
of_every_size = pytest.mark.parametrize(("shape", "padding", "window"), SIZES)
of_both_windows = pytest.mark.parametrize("window", [3, 5])


@of_every_size
@pytest.mark.parametrize("groups", [1, 2])
def test_every_size(kernel, groups, shape, padding, window):
    n, c, k, h, w = shape
    x, weight, bias = arguments(n, c * groups, k * groups, h, w, groups, window)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding, groups=groups)
    for strided in (weight, weight.to(memory_format=torch.channels_last), weight.transpose(2, 3).clone().mT):
        y, largest = convolve(x, strided, bias, padding, groups)
        assert error(y, exact) <= 1e-6
        assert largest == y.abs().max().item()
    y, _ = convolve(x, weight, None, padding, groups, relu=True)
    exact = F.conv2d(x.double(), weight.double(), padding=padding, groups=groups).relu()
    assert error(y, exact) <= 1e-6


@of_both_windows
@pytest.mark.parametrize(
    "shape", [(2, 16, 32, 28, 28), (1, 64, 64, 30, 31), (3, 144, 48, 13, 13), (2, 512, 64, 14, 14)]
)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("positive", [False, True])
def test_error_is_at_most_twice_that_of_torch(kernel, positive, groups, shape, window):
    n, c, k, h, w = shape
    x, weight, bias = arguments(n, c * groups, k * groups, h, w, groups, window=window)
    if positive:
        x.relu_()
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=window // 2, groups=groups)
    y, _ = convolve(x, weight, bias, same(window), groups)
    assert error(y, exact) <= 2 * error(F.conv2d(x, weight, bias, padding=window // 2, groups=groups), exact)


@of_both_windows
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("relu", [False, True])
def test_pooled(kernel, relu, shape, window):
    x, weight, bias = arguments(*shape, window=window)
    whole, of_whole = convolve(x, weight, bias, same(window), 1, relu=relu)
    pooled, largest = convolve(x, weight, bias, same(window), 1, relu=relu, pool=True)
    assert_bitwise(pooled, F.max_pool2d(whole, 2))
    assert largest == of_whole


@of_both_windows
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_masks(kernel, groups, shape, window):
    n, c, k, h, w = shape
    x, weight, bias = arguments(n, c * groups, k * groups, h, w, groups, window=window)
    mask = torch.empty(n * k * groups * h * w // 8, dtype=torch.uint8)
    y, _ = convolve(x, weight, bias, same(window), groups, relu=True, out_mask=mask)
    expected = torch.empty_like(mask)
    torch.ops.fastcnn_cpu.relu_mask(y, expected)
    assert_bitwise(mask, expected)
    # what the mask turns off is zero, also NaN
    dy = randn(*y.shape, seed=3, format=torch.channels_last)
    dz = dy * (y > 0)
    dx, _ = convolve(dz, weight, None, same(window), groups, turned=True)
    masked, largest = convolve(
        torch.where(y > 0, dy, NAN), weight, None, same(window), groups, turned=True, x_mask=mask
    )
    assert largest is not None
    assert_bitwise(masked, dx)
    assert error(dx, F.conv_transpose2d(dz.double(), weight.double(), padding=window // 2, groups=groups)) <= 1e-6


@of_both_windows
def test_the_same_bits_whatever_the_threads_and_the_batch(threads: Callable[[int], None], window):
    x, weight, bias = arguments(5, 48, 96, 23, 21, window=window)
    threads(1)
    y, _ = convolve(x, weight, bias, same(window), 1)
    for number in (2, 3, 7):
        threads(number)
        assert_bitwise(convolve(x, weight, bias, same(window), 1)[0], y)
    assert_bitwise(convolve(x[2:4], weight, bias, same(window), 1)[0], y[2:4])


# -- the weight's gradient --------------------------------------------------------------------------------------------


def weight_gradients(x: Tensor, dy: Tensor, weight: Tensor, padding: tuple[int, int], groups: int) -> list[Tensor]:
    """Those of weight and bias, by torch."""
    args = [len(weight)], [1, 1], padding, [1, 1], False, [0, 0], groups, [False, True, True]
    return list(torch.ops.aten.convolution_backward(dy, x, weight, *args)[1:])


def of_output(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    size = [x.shape[2 + i] + 2 * padding[i] + 1 - weight.shape[2] for i in (0, 1)]
    return randn(len(x), len(weight), *size, seed=4, format=torch.channels_last)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps are cut into parts as large ones are."""
    monkeypatch.setattr(_winograd, "_TILES_OF_A_PART", 5)


@of_every_size
@pytest.mark.parametrize("groups", [1, 2])
def test_weight_gradient_of_every_size(kernel, in_parts, groups, shape, padding, window):
    n, c, k, h, w = shape
    x, weight, _ = arguments(n, c * groups, k * groups, h, w, groups, window)
    dy = of_output(x, weight, padding)
    exact = weight_gradients(x.double(), dy.double(), weight.double(), padding, groups)
    for strided in (weight, weight.to(memory_format=torch.channels_last), weight.transpose(2, 3).clone().mT):
        dw, db = _winograd.weight_gradient(x, dy, strided, list(padding), groups, with_bias=True)
        assert dw.stride() == torch.empty_like(strided).stride()
        assert error(dw, exact[0]) <= 1e-6
        assert error(db, exact[1]) <= 1e-6
        alone, no_bias = _winograd.weight_gradient(x, dy, strided, list(padding), groups)
        assert no_bias is None
        assert_bitwise(alone, dw)


@of_both_windows
@pytest.mark.parametrize(
    "shape", [(2, 16, 32, 28, 28), (1, 64, 64, 30, 31), (3, 144, 48, 13, 13), (2, 64, 64, 97, 98), (16, 64, 16, 3, 4)]
)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("positive", ["nothing", "input", "both"])
def test_error_of_the_weight_gradient_is_at_most_twice_that_of_torch(kernel, positive, groups, shape, window):
    n, c, k, h, w = shape
    x, weight, _ = arguments(n, c * groups, k * groups, h, w, groups, window=window)
    dy = of_output(x, weight, same(window))
    if positive != "nothing":
        x.relu_()
    if positive == "both":
        dy.relu_()
    exact = weight_gradients(x.double(), dy.double(), weight.double(), same(window), groups)
    theirs = weight_gradients(x, dy, weight, same(window), groups)
    ours = _winograd.weight_gradient(x, dy, weight, list(same(window)), groups, with_bias=True)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert error(a, e) <= 2 * error(b, e)


@of_both_windows
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_weight_gradient_of_a_masked_gradient(kernel, groups, shape, window):
    n, c, k, h, w = shape
    x, weight, _ = arguments(n, c * groups, k * groups, h, w, groups, window=window)
    y, dy = (
        of_output(x, weight, same(window)).roll(1, 1),
        of_output(x, weight, same(window)),
    )
    mask = torch.empty(y.numel() // 8, dtype=torch.uint8)
    torch.ops.fastcnn_cpu.relu_mask(y, mask)
    expected = _winograd.weight_gradient(x, dy * (y > 0), weight, list(same(window)), groups, with_bias=True)
    off = torch.where(y > 0, dy, NAN)
    masked = _winograd.weight_gradient(x, off, weight, list(same(window)), groups, dy_mask=mask, with_bias=True)
    for ours, theirs in zip(masked, expected, strict=True):
        assert_bitwise(ours, theirs)


@of_both_windows
@pytest.mark.parametrize("shape", [(5, 48, 96, 23, 21), (8, 256, 144, 14, 14)])
def test_the_same_bits_of_the_weight_gradient_whatever_the_threads(threads: Callable[[int], None], shape, window):
    x, weight, _ = arguments(*shape, window=window)
    dy = of_output(x, weight, same(window))
    threads(1)
    expected = _winograd.weight_gradient(x, dy, weight, list(same(window)), 1, with_bias=True)
    for number in (1, 2, 3, 7):
        threads(number)
        for ours, theirs in zip(
            _winograd.weight_gradient(x, dy, weight, list(same(window)), 1, with_bias=True), expected, strict=True
        ):
            assert_bitwise(ours, theirs)


@of_both_windows
@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize("where", ["input", "gradient"])
@pytest.mark.parametrize("pixel", [(0, 0, 0, 0), (1, 5, 6, 6), (2, 15, 12, 11)])
def test_no_weight_gradient_of_what_is_not_finite(kernel, in_parts, pixel, where, value, window):
    """Not even if the sums of the other parts are."""
    x, weight, _ = arguments(3, 16, 32, 13, 12, window=window)
    dy = of_output(x, weight, same(window))
    (x if where == "input" else dy)[pixel] = value
    assert _winograd.weight_gradient(x, dy * 100, weight, list(same(window)), 1, with_bias=True) == (None, None)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("shape", [(2, 32, 48, 12, 14), (1, 32, 48, 12, 14)], ids=["weight too", "input alone"])
def test_every_choice_of_gradients(wanted, shape, monkeypatch):
    seen: list[Tensor] = []
    find = _winograd.weight_gradient
    monkeypatch.setattr(_winograd, "weight_gradient", lambda *args, **kw: seen.append(args[0]) or find(*args, **kw))
    tensors = [leaf(t) if i in wanted else t for i, t in enumerate(arguments(*shape))]
    y, expected = FF.conv2d_relu(*tensors, padding=1), F.relu(F.conv2d(*tensors, padding=1))
    dy = randn(*y.shape, seed=4, format=torch.channels_last)
    ours, theirs = (gradients(out, [tensors[i] for i in wanted], dy) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(seen) == (1 in wanted and shape[0] == 2 and fastcnn.backends.cpu_capability() != "baseline")


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (0, 1), (0, 1, 2)], ids=str)
@of_both_windows
def test_in_nchw_input_and_output_are_converted(wanted, window, monkeypatch):
    seen: list[Tensor] = []
    convolve = _winograd.convolve
    monkeypatch.setattr(_winograd, "convolve", lambda x, *args, **kw: seen.append(x) or convolve(x, *args, **kw))
    found: list[Tensor] = []
    find = _winograd.weight_gradient
    monkeypatch.setattr(_winograd, "weight_gradient", lambda *args, **kw: found.append(args[0]) or find(*args, **kw))
    x, weight, bias = arguments(2, 48, 64, 14, 13, window=window)
    tensors = [leaf(t) if i in wanted else t for i, t in enumerate((x.contiguous(), weight, bias))]
    padding = window // 2
    y, expected = FF.conv2d_relu(*tensors, padding=padding), F.relu(F.conv2d(*tensors, padding=padding))
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    if wanted:
        dy = randn(*y.shape, seed=4)
        ours, theirs = (gradients(out, [tensors[i] for i in wanted], dy) for out in (y, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert all(gradient.is_contiguous() for gradient in ours)
    runs = fastcnn.backends.cpu_capability() != "baseline"
    assert [is_channels_last(x) for x in seen] == [True] * runs * (1 + (0 in wanted))
    assert [is_channels_last(x) for x in found] == [True] * runs * (1 in wanted)


@pytest.mark.parametrize(("channels", "outputs"), [(48, 64), (16, 32)], ids=["faster", "slower"])
def test_a_stage_in_nchw_is_trained_so_where_converting_pays(channels, outputs, monkeypatch):
    seen: list[Tensor] = []
    convolve = _winograd.convolve
    monkeypatch.setattr(_winograd, "convolve", lambda x, *args, **kw: seen.append(x) or convolve(x, *args, **kw))
    for limit in ("_TRAINED", "_PLAIN"):
        monkeypatch.setattr(stage, limit, 0)
    x, weight, bias = (leaf(t.contiguous()) for t in arguments(2, channels, outputs, 20, 21))
    y, expected = stage.run_stage(x, weight, bias, 1, 1, 1, 1), F.relu(F.conv2d(x, weight, bias, 1, 1))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert y.is_contiguous()
    assert bool(seen) == (channels == 48 and fastcnn.backends.cpu_capability() != "baseline")


@pytest.mark.parametrize("channels", [1, 16, 31, 130])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 8), (13, 21)], ids=ident)
def test_change_of_format(channels, size, kernel):
    x = randn(3, channels, *size)
    last = torch.empty_like(x, memory_format=torch.channels_last)
    back = torch.empty_like(x)
    torch.ops.fastcnn_cpu.change_format(x, last, True)
    torch.ops.fastcnn_cpu.change_format(last, back, False)
    assert torch.equal(x, last)
    assert torch.equal(x, back)


# -- what is not finite -----------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """What the calls of the kernel returned."""
    seen: list[float | None] = []
    convolve = _winograd.convolve
    monkeypatch.setattr(_winograd, "convolve", lambda *args, **kw: seen.append(convolve(*args, **kw)) or seen[-1])
    return seen


@of_both_windows
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["input", "weight", "bias"])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_not_finite_stays_where_torch_has_it(calls, frozen, where, value, window):
    """One NaN does not reach those outputs of its tile that do not depend on it."""
    tensors = arguments(2, 48, 32, 12, 12, window=window)
    tensors[where][(1, 5, 2, 1)[: tensors[where].dim()]] = value
    x, weight, bias = leaf(tensors[0]), *(t if frozen else leaf(t) for t in tensors[1:])
    wanted = (x,) if frozen else (x, weight, bias)
    y, expected = (
        FF.conv2d_relu(x, weight, bias, padding=window // 2),
        F.relu(F.conv2d(x, weight, bias, padding=window // 2)),
    )
    assert calls == [None]
    torch.testing.assert_close(y, expected, equal_nan=True)
    dy = randn(*y.shape, seed=4, format=torch.channels_last)
    for ours, theirs in zip(gradients(y, wanted, dy), gradients(expected, wanted, dy), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_sums_that_are_too_large_only_on_the_way(calls):
    x, weight, bias = arguments(2, 48, 32, 12, 12)
    x[1, 5, 2, 2:4] = 3e38
    weight /= 100
    y, expected = FF.conv2d_relu(x, weight, bias, padding=1), F.relu(F.conv2d(x, weight, bias, padding=1))
    assert calls == [None]
    assert expected.isfinite().all()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("value", [NAN, INF, -3e38])
def test_gradients_that_are_not_finite_too(calls, value):
    x, weight, bias = (leaf(t) for t in arguments(2, 48, 32, 12, 12))
    y, expected = FF.conv2d_relu(x, weight, bias, padding=1), F.relu(F.conv2d(x, weight, bias, padding=1))
    dy = randn(*y.shape, seed=4, format=torch.channels_last)
    dy[1, 7, 3, 4] = value
    ours, theirs = (gradients(out, (x, weight, bias), dy) for out in (y, expected))
    assert len(calls) == 2
    assert calls[0] is not None
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-4)


@of_both_windows
@pytest.mark.parametrize("frozen", [False, True])
def test_conv2d_relu_uses_it_forward_and_backward(calls, frozen, window):
    x, weight, bias = arguments(2, 32, 48, 12, 14, window=window)
    if not frozen:
        weight, bias = leaf(weight), leaf(bias)
    y = FF.conv2d_relu(leaf(x), weight, bias, padding=window // 2)
    y.sum().backward()
    assert len(calls) == 2
    assert None not in calls


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("x", lambda x: x.contiguous()),
        ("x", lambda x: x.double()),
        ("x", lambda x: x[:, :24]),
        ("x", lambda x: x[:1, :, :4, :4]),
        ("weight", lambda w: w[:40]),
        ("weight", lambda w: w[:16]),  # too few pairs of channels
        ("weight", lambda w: w[..., :2]),
        ("stride", lambda _: [2, 1]),
        ("dilation", lambda _: [1, 2]),
    ],
)
def test_what_it_does_not_do(change, value, threads):
    threads(2)
    x, weight, _ = arguments(2, 32, 48, 12, 14)
    case = {"x": x, "weight": weight, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    assert _winograd.runs(**case)
    case[change] = value(case[change])
    if change == "x":  # the weight that goes with it
        case["weight"] = weight[:, : case["x"].shape[1]].to(case["x"].dtype)
    assert not _winograd.runs(**case)


def test_a_bias_of_any_strides():
    x, weight, bias = arguments(2, 48, 32, 12, 12)
    for strided in (bias[:1].expand(32), bias.repeat_interleave(3)[::3]):
        expected, _ = convolve(x, weight, strided.clone(memory_format=torch.contiguous_format), (1, 1), 1)
        assert_bitwise(convolve(x, weight, strided, (1, 1), 1)[0], expected)


def test_the_default_dtype_does_not_matter():
    x, weight, bias = arguments(2, 48, 32, 12, 12)
    expected = FF.conv2d_relu(x, weight, bias)
    torch.set_default_dtype(torch.float64)
    try:
        assert_bitwise(FF.conv2d_relu(x, weight, bias), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_frozen_weights_that_change_are_seen():
    x, weight, bias = arguments(2, 48, 32, 12, 12)
    x = leaf(x)
    FF.conv2d_relu(x, weight, bias, padding=1).sum().backward()
    weight.data.mul_(2)
    y, expected = FF.conv2d_relu(x, weight, bias, padding=1), F.relu(F.conv2d(x, weight, bias, padding=1))
    torch.testing.assert_close(y, expected)
    dx, exact = (torch.autograd.grad(out.sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(dx, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages of memory")
@pytest.mark.parametrize("kernels", ["winograd", "change_format"])
def test_nothing_is_read_or_written_out_of_bounds(kernels):
    script = Path(__file__).parents[1] / "guard_pages.py"
    run = subprocess.run([sys.executable, str(script), kernels], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-200:] + run.stderr[-2000:]


@of_both_windows
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("relu", [False, True])
def test_addend(kernel, relu, groups, shape, window):
    n, c, k, h, w = shape
    x, weight, bias = arguments(n, c * groups, k * groups, h, w, groups, window=window)
    whole, of_whole = convolve(x, weight, bias, same(window), groups)
    addend = randn(*whole.shape, seed=5, format=torch.channels_last)
    y, largest = convolve(x, weight, bias, same(window), groups, addend=addend, relu=relu)
    assert_bitwise(y, (whole + addend).relu() if relu else whole + addend)
    assert largest == of_whole


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("relu", [False, True])
def test_an_addend_that_is_not_finite_stays_where_it_is(kernel, relu, value):
    """It is added after the largest magnitude was taken: nothing has to be computed again."""
    x, weight, bias = arguments(2, 48, 32, 7, 6)
    addend = randn(2, 32, 7, 6, seed=5, format=torch.channels_last)
    addend[1, 3, 6, 2] = value
    y, largest = convolve(x, weight, bias, (1, 1), 1, addend=addend, relu=relu)
    assert largest is not None
    whole, _ = convolve(x, weight, bias, (1, 1), 1)
    assert_bitwise(y, (whole + addend).relu() if relu else whole + addend)


@of_both_windows
@pytest.mark.parametrize("options", [{}, {"relu": True}, {"pool": True}, {"addend": True}], ids=str)
@pytest.mark.parametrize(("before", "after"), [(0, 16), (16, 0), (3, 5)])
@pytest.mark.parametrize("groups", [1, 2])
def test_only_its_channels_of_the_output_are_written(kernel, groups, before, after, options, window):
    x, weight, bias = arguments(2, 32 * groups, 80 * groups, 7, 6, groups, window=window)
    if "addend" in options:
        options = {"addend": randn(2, 80 * groups, 7, 6, seed=5, format=torch.channels_last)}
    expected, _ = convolve(x, weight, bias, same(window), groups, **options)
    outputs = expected.shape[1]
    more = torch.full((2, before + outputs + after, *expected.shape[2:]), 7.0).to(memory_format=torch.channels_last)
    _winograd.convolve(x, weight, bias, more, list(same(window)), groups, first=before, **options)
    assert_bitwise(more[:, before : before + outputs], expected)
    assert (more[:, :before] == 7).all()
    assert (more[:, before + outputs :] == 7).all()


GOOD = {
    "x": (1, 32, 8, 8),
    "u": 16 * 16 * 32,
    "bias": 16,
    "addend": None,
    "out": (1, 16, 8, 8),
    "first": 0,
    "mask": 16 * 64 // 8,
    "window": 3,
    "padding": [1, 1],
    "groups": 1,
    "pool": False,
}


def call(**changed) -> None:
    case = {**GOOD, **changed}
    x, u, bias, addend, out = (
        None if case[name] is None else torch.zeros(case[name]) for name in ("x", "u", "bias", "addend", "out")
    )
    mask = None if case["mask"] is None else torch.zeros(case["mask"], dtype=torch.uint8)
    where = case["window"], case["padding"], case["groups"]
    args = bias, addend, out, case["first"], mask, *where, True, case["pool"]
    torch.ops.fastcnn_cpu.winograd(x, None, u, *args)


@pytest.mark.parametrize(
    "changed",
    [
        {"x": (1, 24, 8, 8), "u": 16 * 16 * 24},
        {"x": (1, 0, 8, 8), "u": 0},
        {"u": 16 * 16 * 32 - 1},
        {"u": 16 * 8 * 32},
        {"bias": 15},
        {"addend": (1, 16, 8, 7)},
        {"addend": (1, 16, 4, 4), "out": (1, 16, 4, 4), "pool": True, "mask": None},
        {"out": (1, 16, 7, 8)},
        {"out": (1, 16, 8, 8), "pool": True},
        {"out": (1, 15, 8, 8), "mask": None},
        {"out": (1, 32, 8, 8)},
        {"first": 1, "mask": None},
        {"first": -1, "mask": None},
        {"first": -1, "out": (1, 17, 8, 8), "mask": None},
        {"mask": 16 * 64 // 8 - 1},
        {"window": 4},
        {"window": 5},
        {"window": 5, "u": 49 * 16 * 32},
        {"padding": [1]},
        {"groups": 0},
        {"groups": -1},
        {"groups": 4},
    ],
    ids=str,
)
def test_sizes_are_checked(changed):
    """The op can be called by itself, and must not read or write out of bounds."""
    call()
    call(addend=(1, 16, 8, 8), out=(1, 20, 8, 8), first=4, mask=None)
    with pytest.raises(RuntimeError, match=r"must|has|takes|whole"):
        call(**changed)


GOOD_GRADIENT = {
    "x": (1, 32, 8, 8),
    "dy": (1, 16, 8, 8),
    "mask": 16 * 64 // 8,
    "dw": (3, 16, 32, 3, 3),
    "db": (3, 16),
    "padding": [1, 1],
    "groups": 1,
}


def gradient_call(**changed) -> None:
    case = {**GOOD_GRADIENT, **changed}
    x, dy, dw, db = (None if case[name] is None else torch.zeros(case[name]) for name in ("x", "dy", "dw", "db"))
    mask = None if case["mask"] is None else torch.zeros(case["mask"], dtype=torch.uint8)
    torch.ops.fastcnn_cpu.winograd_gradient(x, dy, mask, dw, db, case["padding"], case["groups"])


@pytest.mark.parametrize(
    "changed",
    [
        {"x": (1, 24, 8, 8), "dw": (3, 16, 24, 3, 3)},
        {"x": (1, 0, 8, 8), "dw": (3, 16, 0, 3, 3)},
        {"dy": (1, 16, 8, 7)},
        {"dy": (1, 24, 8, 8), "dw": (3, 24, 32, 3, 3), "mask": None, "db": None},
        {"mask": 16 * 64 // 8 - 1},
        {"dw": (16, 32, 3, 3)},
        {"dw": (0, 16, 32, 3, 3), "db": None},
        {"dw": (3, 16, 32, 2, 3)},
        {"dw": (3, 16, 31, 3, 3)},
        {"db": (2, 16)},
        {"padding": [1]},
        {"groups": 0},
        {"groups": 2},
    ],
    ids=str,
)
def test_sizes_of_a_weight_gradient_are_checked(changed):
    gradient_call()
    gradient_call(mask=None, db=None)
    with pytest.raises(RuntimeError, match=r"must|has"):
        gradient_call(**changed)


# -- a convolution without ReLU that is trained -----------------------------------------------------------------------


def trained(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return Convolution.apply(x, weight, bias, ConvParams([1, 1], [1, 1], [1, 1], 1))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("shape", [(2, 32, 48, 12, 14), (1, 32, 48, 7, 9)], ids=ident)
def test_gradients_without_relu(wanted, shape):
    tensors = [leaf(t) if i in wanted else t for i, t in enumerate(arguments(*shape))]
    y, expected = trained(*tensors), F.conv2d(*tensors, padding=1)
    torch.testing.assert_close(y, expected)
    dy = randn(*y.shape, seed=4)
    ours, theirs = (gradients(out, [tensors[i] for i in wanted], dy) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients_without_relu():
    def twice(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        tensors = [leaf(t) for t in arguments(2, 48, 32, 12, 12)]
        y = run(*tensors)
        first = torch.autograd.grad(y, tensors, randn(*y.shape, seed=4), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors[:2])

    torch.testing.assert_close(twice(trained), twice(lambda *t: F.conv2d(*t, padding=1)), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", [0, 1, 3], ids=["input", "weight", "gradient"])
def test_what_is_not_finite_without_relu(where, value):
    tensors = [*arguments(2, 48, 32, 12, 12), randn(2, 32, 12, 12, seed=4, format=torch.channels_last)]
    tensors[where][1, 5, 2, 1] = value
    *tensors, dy = (*map(leaf, tensors[:3]), tensors[3])
    y, expected = trained(*tensors), F.conv2d(*tensors, padding=1)
    torch.testing.assert_close(y, expected, equal_nan=True)
    ours, theirs = (gradients(out, tensors, dy) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(fastcnn.backends.cpu_capability() == "baseline", reason="oneDNN's is faster")
@pytest.mark.parametrize(
    ("shape", "window", "is_ours"),
    [
        ((4, 64, 64, 20, 20), 3, True),
        ((4, 64, 64, 8, 8), 3, False),
        ((4, 16, 16, 20, 20), 3, False),
        ((4, 64, 64, 20, 20), 5, True),
        ((16, 64, 64, 7, 7), 3, True),
        ((16, 64, 64, 7, 7), 5, False),
    ],
    ids=ident,
)
def test_a_stage_without_relu_is_trained_by_it_where_there_is_enough_to_do(calls, shape, window, is_ours):
    tensors = [*map(leaf, arguments(*shape, window=window))]
    y, expected = stage.run_stage(*tensors, 1, window // 2, 1, 1, relu=False), F.conv2d(*tensors, padding=window // 2)
    torch.testing.assert_close(y, expected)
    dy = randn(*y.shape, seed=4, format=torch.channels_last)
    ours, theirs = (gradients(out, tensors, dy) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2 * is_ours


@pytest.mark.parametrize("way", ["grad", "jvp", "forward-mode"])
def test_a_stage_without_relu_is_transformed_as_torchs(way):
    x, weight, bias = arguments(4, 64, 64, 20, 20)

    def ours(x: Tensor) -> Tensor:
        return stage.run_stage(x, weight, bias, 1, 1, 1, 1, relu=False)

    def in_torch(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    def transformed(run: Callable[[Tensor], Tensor]) -> Tensor | tuple[Tensor, ...]:
        if way == "grad":
            return torch.func.grad(lambda x: run(x).square().sum())(x)
        if way == "jvp":
            return torch.func.jvp(run, (x,), (x,))
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(run(forward_ad.make_dual(x, x))).tangent

    torch.testing.assert_close(transformed(ours), transformed(in_torch))


def test_a_stage_without_relu_is_traced_and_counted_as_torchs():
    tensors = [*map(leaf, arguments(4, 64, 64, 20, 20))]

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return stage.run_stage(x, weight, bias, 1, 1, 1, 1, relu=False)

    counted = []
    for call in (run, lambda *tensors: F.conv2d(*tensors, padding=1)):
        with FlopCounterMode(display=False) as mode:
            call(*tensors).sum().backward()
        counted.append(mode.get_total_flops())
    assert counted[0] == counted[1] > 0
    kinds = {node.kind() for node in torch.jit.trace(run, tuple(tensors)).graph.nodes()}
    assert "aten::_convolution" in kinds
    assert "prim::PythonOp" not in kinds


def test_batches_of_gradients_of_a_stage_without_relu():
    tensors = [*map(leaf, arguments(4, 64, 64, 20, 20))]
    ours, theirs = stage.run_stage(*tensors, 1, 1, 1, 1, relu=False), F.conv2d(*tensors, padding=1)
    dy = randn(2, *ours.shape, seed=4)
    found, expected = (torch.autograd.grad(y, tensors, dy, is_grads_batched=True) for y in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
