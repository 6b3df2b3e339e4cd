"""Every promise that conv2d_relu makes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from promises import (
    DTYPES,
    FORMATS,
    NARROW,
    assert_bitwise,
    embedded,
    expected_strides,
    gradients,
    ident,
    in_format,
    inputs,
    integers,
    leaf,
    randn,
    recorded_calls,
)
from torch._dynamo.testing import CompileCounterWithBackend

import fastcnn
import fastcnn.functional as FF
from fastcnn.ops import packed
from fastcnn.params import ConvParams

OP, BACKWARD = torch.ops.fastcnn.conv2d_relu.default, torch.ops.fastcnn.conv2d_relu_backward.default
PLAIN = [1, 1], [0, 0], [1, 1], 1
NAN, INF = float("nan"), float("inf")

# input, weight, arguments
CASES = {
    "alexnet_conv1": ((2, 3, 35, 35), (16, 3, 11, 11), {"stride": 4, "padding": 2}),
    "alexnet_conv2": ((2, 8, 9, 9), (12, 4, 5, 5), {"padding": 2, "groups": 2}),
    "vgg_conv1_1": ((2, 3, 14, 14), (16, 3, 3, 3), {"padding": 1}),
    "same": ((2, 5, 8, 9), (7, 5, 3, 5), {"padding": "same"}),
    "same_uneven": ((2, 5, 8, 9), (7, 5, 2, 4), {"padding": "same", "dilation": (3, 1)}),
    "valid": ((2, 5, 8, 9), (7, 5, 3, 2), {"padding": "valid", "stride": (2, 3)}),
    "pairs": ((2, 4, 9, 11), (6, 2, 3, 2), {"stride": (1, 2), "padding": (2, 0), "dilation": (1, 2), "groups": 2}),
    "dilation": ((1, 3, 12, 13), (5, 3, 3, 3), {"padding": 2, "dilation": 2}),
    "depthwise": ((2, 6, 7, 7), (12, 1, 3, 3), {"padding": 1, "groups": 6}),
    "1x1": ((2, 6, 5, 7), (3, 6, 1, 1), {}),
    "winograd": ((2, 32, 13, 17), (48, 16, 3, 3), {"padding": 1, "groups": 2}),
    "winograd_uneven": ((1, 16, 14, 15), (80, 16, 3, 3), {"padding": (0, 2)}),
    "one_channel": ((2, 1, 7, 8), (1, 1, 3, 3), {"padding": (1,)}),
}
SMALL = ["alexnet_conv2", "same_uneven", "pairs"]


def case(name, dtype=torch.float32, format=torch.contiguous_format, with_bias=True, seed=0):
    """Input, weight and bias (or None), scaled as in a trained network, and the arguments."""
    shape, weight, kwargs = CASES[name]
    x, w = randn(*shape, dtype=dtype, format=format, seed=seed), randn(*weight, dtype=torch.float64, seed=seed + 1)
    w = (w / (w[0].numel() / 2) ** 0.5).to(dtype).contiguous(memory_format=format)
    return (x, w, randn(weight[0], dtype=dtype, seed=seed + 2).div(4) if with_bias else None), kwargs


def op_args(tensors, kwargs):
    """Of the registered op, without its last."""
    of_conv2d = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return ConvParams.of(*tensors, *{**of_conv2d, **kwargs}.values())[0].op_args()


def torch_conv_relu(*args, **kwargs):
    return F.relu(F.conv2d(*args, **kwargs))


def present(tensors):
    return [t for t in tensors if t is not None]


def errors(run, tensors, kwargs):
    """Of the output and each gradient, relative to float64; which elements ReLU passes is taken from the output."""
    narrow, wide = [leaf(t) for t in tensors], [leaf(t, torch.float64) for t in tensors]
    y, z = run(*narrow, **kwargs), F.conv2d(*wide, **kwargs)
    dy = 2 + randn(*y.shape, dtype=y.dtype, seed=9).to(y)
    ours, exact = gradients(y, narrow, dy), gradients(z, wide, dy.double() * ~(y.detach() <= 0))
    pairs = zip(present([y.detach(), *ours]), present([F.relu(z).detach(), *exact]), strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


def assert_keeps_same_answer(tensors, kwargs):
    """Each error at most twice that of torch, or that of rounding once where torch happens to be exact."""
    dtype = tensors[0].dtype
    floor = torch.finfo(dtype).eps / 2
    ours, theirs = errors(FF.conv2d_relu, tensors, kwargs), errors(torch_conv_relu, tensors, kwargs)
    for name, a, b in zip(["output", "input", "weight", "bias"], ours, theirs, strict=False):
        assert a <= max(2 * b, floor), f"{name}: error {a:.3g}, torch's {b:.3g}"


def assert_close_to_torch(x, w, b, **kwargs):
    """Output, its strides and all gradients."""
    ours, theirs = [leaf(t) for t in (x, w, b)], [leaf(t) for t in (x, w, b)]
    y, expected = FF.conv2d_relu(*ours, **kwargs), torch_conv_relu(*theirs, **kwargs)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if x.dtype in NARROW else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y, expected, equal_nan=True, **tolerance)
    assert y.stride() == expected_strides(x, y.shape)
    # of small integers, so that no gradient is large
    dy = integers(*y.shape, dtype=y.dtype, seed=5) * (expected.detach().abs() > 1e-3)
    for a, b in zip(gradients(y, ours, dy), gradients(expected, theirs, dy), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance)


# -- same answer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_error_is_at_most_twice_that_of_torch(each_backend, dtype, format, with_bias, name):
    tensors, kwargs = case(name, dtype, format, with_bias)
    assert_keeps_same_answer(tensors, kwargs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_single_image(each_backend, dtype, name):
    (x, w, b), kwargs = case(name, dtype)
    assert_keeps_same_answer((x[0], w, b), kwargs)
    assert FF.conv2d_relu(x[0], w, b, **kwargs).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 4, 7, 7), (0, 4, 3, 5)], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("frozen", [False, True])
def test_empty_batch(each_backend, frozen, format, shape):
    x, w, b = leaf(randn(*shape, format=format)), randn(6, 2, 3, 3), randn(6)
    if not frozen:
        w, b = leaf(w), leaf(b)
    y = FF.conv2d_relu(x, w, b, padding=1, groups=2)
    assert y.shape == (0, 6, *shape[2:])
    wanted = (x,) if frozen else (x, w, b)
    dx, *others = gradients(y, wanted, torch.ones_like(y))
    assert dx.shape == x.shape
    for g, t in zip(others, wanted[1:], strict=True):
        assert_bitwise(g, torch.zeros_like(t))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("name", ["alexnet_conv1", *SMALL])
def test_non_finite_values_propagate_as_in_torch(each_backend, name, dtype, format, value):
    for i in range(3):  # in input, weight and bias
        tensors, kwargs = case(name, dtype, format)
        if i == 1 and each_backend == "triton":  # whether weights meet the zeros of the padding differs also in torch
            kwargs = {**kwargs, "padding": 0}
        tensors[i][(0,) * tensors[i].dim()] = value
        y, expected = FF.conv2d_relu(*tensors, **kwargs), torch_conv_relu(*tensors, **kwargs)
        assert_bitwise(y.isnan(), expected.isnan())
        assert_bitwise(y.isinf(), expected.isinf())


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_relu_passes_the_gradient_of_all_but_values_up_to_zero(each_backend, dtype, format, frozen):
    """Also that of NaN, and not that of zeros of either sign, as torch."""
    values = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 2.0], dtype=dtype).repeat(2, 3, 2, 1)
    w = torch.ones(3, 1, 1, 1, dtype=dtype)  # each channel by itself
    x, b = leaf(in_format(values, format)), torch.zeros(3, dtype=dtype)
    y = FF.conv2d_relu(x, w if frozen else leaf(w), b, groups=3)
    (dx,) = gradients(y, (x,), torch.ones_like(y))
    assert_bitwise(dx, (~(y.detach() <= 0)).to(dtype))
    assert_bitwise(dx, torch.tensor([1, 1, 0, 0, 0, 1, 0, 1], dtype=dtype).expand_as(dx))
    assert_bitwise(y.detach(), F.relu(values))


# -- frozen weights, which are kept packed ----------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("name", [*CASES, "wide_padding"])
def test_gradient_of_frozen_weights_is_as_near_as_that_of_torch(best_backend, monkeypatch, name, dtype, format):
    monkeypatch.setitem(CASES, "wide_padding", ((2, 4, 5, 6), (6, 2, 3, 2), {"padding": (3, 1), "groups": 2}))
    (x, w, b), kwargs = case(name, dtype, format)

    def error(run):
        x_ = leaf(x)
        y = run(x_, w, b, **kwargs)
        dy = 2 + randn(*y.shape, dtype=dtype, seed=9)
        wide = leaf(x, torch.float64)
        z = F.conv2d(wide, w.double(), b.double(), **kwargs)
        (exact,) = gradients(z, (wide,), dy.double() * ~(y.detach() <= 0))
        (dx,) = gradients(y, (x_,), dy)
        return ((dx.double() - exact).norm() / exact.norm()).item()

    rounding = torch.finfo(dtype).eps / 2
    for _ in range(2):  # also when they are met again
        assert error(FF.conv2d_relu) <= max(2 * error(torch_conv_relu), rounding)


@pytest.mark.parametrize("change", ["in place", "data", "new data", "loaded", "nan"])
def test_frozen_weights_may_change_in_any_way(each_backend, change):
    (x, w, b), kwargs = case("alexnet_conv2", format=torch.channels_last)
    layer = torch.nn.Conv2d(8, 12, 5, padding=2, groups=2).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(w)
    x = leaf(x)
    for _ in range(2):
        gradients(FF.conv2d_relu(x, layer.weight, b, **kwargs).sum(), (x,), None)
    if change == "in place":
        layer.weight.mul_(-1)
    elif change == "data":
        layer.weight.data.mul_(-1)
    elif change == "new data":
        layer.weight.data = layer.weight.data.flip(0)
    elif change == "loaded":
        layer.load_state_dict({"weight": layer.weight.roll(1, 3), "bias": layer.bias})
    else:
        layer.weight.data[3, 1, 2, 2] = NAN
    results = []
    for run in (FF.conv2d_relu, torch_conv_relu):
        y = run(x, layer.weight, b, **kwargs)
        results.append((y.detach(), *gradients(y, (x,), torch.ones_like(y))))
    torch.testing.assert_close(*results, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_packed_weights_go_when_the_weight_goes(best_backend):
    (x, w, b), kwargs = case("vgg_conv1_1", format=torch.channels_last)
    before = len(packed._frozen)
    FF.conv2d_relu(x, w, b, **kwargs)
    layer = fastcnn.nn.ConvReLU2d(3, 16, 3, padding=1).requires_grad_(False)
    layer(x)
    assert len(packed._frozen) == before + (2 if best_backend == "cpu" else 0)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), layer(x))
    del w, layer
    assert len(packed._frozen) == before


def test_trained_weights_are_not_packed(best_backend):
    (x, w, b), kwargs = case("vgg_conv1_1", format=torch.channels_last)
    before = len(packed._frozen)
    for _ in range(2):
        FF.conv2d_relu(x, leaf(w), b, **kwargs).sum().backward()
    assert len(packed._frozen) == before


@pytest.mark.parametrize("elements", [1, 7, 64, 1000, 20_000, 100_003])
def test_fingerprint_sees_every_change(best_backend, elements):
    if best_backend != "cpu":
        pytest.skip("the C++ library is not built")
    fingerprint = torch.ops.fastcnn_cpu.fingerprint
    x = randn(elements)
    assert fingerprint(x) == fingerprint(x.clone())
    seen = {fingerprint(x), fingerprint(-x)}
    places = range(0, elements, max(1, elements // 50))
    for i in places:
        changed = x.clone()
        changed[i] = -changed[i]
        seen.add(fingerprint(changed))
    assert len(seen) == len(places) + min(elements, 2)
    with pytest.raises(RuntimeError, match="contiguous"):
        fingerprint(randn(4, 4).t())


# -- memory formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (3, 2, 1, 0), (1, 0, 2, 3), (0, 2, 3, 1)], ids=ident)
@pytest.mark.parametrize("steps", [(1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 2)], ids=ident)
def test_any_strides(each_backend, order, steps):
    (x, w, b), kwargs = case("pairs")
    x, w, b = embedded(x, order, steps, offset=1), embedded(w, order, steps), embedded(b, steps=(2,))
    assert_close_to_torch(x, w, b, **kwargs)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0)], ids=ident)
def test_any_strides_of_a_single_image(each_backend, order):
    (x, w, b), kwargs = case("pairs")
    assert_close_to_torch(embedded(x[0], order), w, b, **kwargs)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_gradient_in_any_memory_format(each_backend, format, frozen):
    (x, w, b), kwargs = case("pairs", format=format)
    wanted = [leaf(x)] if frozen else [leaf(x), leaf(w), leaf(b)]
    y = FF.conv2d_relu(*[*wanted, w, b][:3], **kwargs)
    dy = randn(*y.shape, seed=5)
    expected = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    others = in_format(dy, torch.channels_last), embedded(dy, (3, 0, 2, 1)), embedded(dy, steps=(1, 1, 1, 2))
    for other in others:
        ours = torch.autograd.grad(y, wanted, other, retain_graph=True)
        torch.testing.assert_close(ours, expected)
        assert ours[0].stride() == expected_strides(x, x.shape)
    summed = torch.autograd.grad(y.sum(), wanted, retain_graph=True)  # the gradient of a sum is an expanded scalar
    torch.testing.assert_close(summed, torch.autograd.grad(y, wanted, torch.ones_like(y)))


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (2, 4, 3, 3), (0, 4, 5, 6), (2, 1, 5, 6)], ids=ident)
@pytest.mark.parametrize("outputs", [1, 5])
def test_output_strides_are_channels_last_only_for_channels_last(each_backend, outputs, shape):
    plain, w = randn(*shape), randn(outputs, shape[1], 3, 3)
    for x in (plain, in_format(plain, torch.channels_last), embedded(plain, [3, 2, 1, 0])):
        for weight in (w, in_format(w, torch.channels_last)):
            y = FF.conv2d_relu(leaf(x), weight)
            assert y.stride() == expected_strides(x, y.shape)


def test_meta_tensors():
    x = torch.empty(2, 4, 9, 9, device="meta").to(memory_format=torch.channels_last)
    y = FF.conv2d_relu(x, torch.empty(6, 2, 3, 3, device="meta"), None, 2, 1, 1, 2)
    assert y.device.type == "meta"
    assert y.shape == (2, 6, 5, 5)
    assert y.is_contiguous(memory_format=torch.channels_last)


# -- little memory, deterministic -------------------------------------------------------------------------------------


def kept_tensors(*args, **kwargs):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = FF.conv2d_relu(*args, **kwargs)
    return y, kept


@pytest.mark.parametrize("single", [False, True], ids=["batch", "single"])
@pytest.mark.parametrize("name", ["alexnet_conv1", "alexnet_conv2", "one_channel"])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_frozen_weights_keep_a_bit_an_output_and_the_weight(each_backend, dtype, format, name, single):
    (x, w, b), kwargs = case(name, dtype, format)
    x = x[0].contiguous() if single else x
    y, kept = kept_tensors(leaf(x), w, b, **kwargs)
    mask, weight = kept
    assert (mask.dtype, mask.untyped_storage().nbytes()) == (torch.uint8, (y.numel() + 7) // 8)
    assert weight.data_ptr() == w.data_ptr()


def test_trained_weights_keep_input_weight_and_output(each_backend):
    (x, w, b), kwargs = case("alexnet_conv1")
    x, w = leaf(x), leaf(w)
    y, kept = kept_tensors(x, w, leaf(b), **kwargs)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, w, y)}


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=ident)
def test_any_subset_of_gradients(each_backend, wanted):
    (x, w, b), kwargs = case("pairs")
    ours, theirs = ([leaf(t) if i in wanted else t for i, t in enumerate((x, w, b))] for _ in range(2))
    y, expected = FF.conv2d_relu(*ours, **kwargs), torch_conv_relu(*theirs, **kwargs)
    dy = randn(*y.shape, seed=5)
    ours, theirs = ([t for t in tensors if t.requires_grad] for tensors in (ours, theirs))
    torch.testing.assert_close(gradients(y, ours, dy), gradients(expected, theirs, dy), rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_without_gradient(each_backend):
    (x, w, b), kwargs = case("pairs")
    for args, mode in [((x, w, b), torch.enable_grad()), ((leaf(x), w, b), torch.no_grad())]:
        with mode, recorded_calls() as calls:
            y, kept = kept_tensors(*args, **kwargs)
        assert not kept
        assert not y.requires_grad
        ((name, (_, mask)),) = calls
        assert name == "fastcnn.conv2d_relu.default"
        assert mask.numel() == 0


def test_weights_frozen_at_first_can_be_trained_later(each_backend):
    (x, _, _), _ = case("vgg_conv1_1")
    layer, x = fastcnn.nn.ConvReLU2d(3, 16, 3, padding=1).requires_grad_(False), leaf(x)
    y = layer(x)
    dy = randn(*y.shape, seed=5)
    layer.requires_grad_()  # between forward and backward: what was recorded counts
    (frozen,) = gradients(y, (x,), dy)
    assert layer.weight.grad is None
    trained = gradients(layer(x), (x, layer.weight, layer.bias), dy)
    expected = gradients(F.relu(torch.nn.Conv2d.forward(layer, x)), (x, layer.weight, layer.bias), dy)
    assert_bitwise(frozen, trained[0])
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changed", [0, 1], ids=["input", "weight"])
def test_tensors_changed_in_place_before_backward_are_an_error(each_backend, changed):
    (x, w, b), kwargs = case("pairs")
    args = [leaf(x) * 1, leaf(w) * 1, leaf(b)]
    y = FF.conv2d_relu(*args, **kwargs)
    args[changed].mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_same_bits_in_every_run(each_backend, format, frozen):
    (x, w, b), kwargs = case("alexnet_conv2", format=format)
    x = leaf(x)
    wanted = [x] if frozen else [x, leaf(w), leaf(b)]
    dy, results = randn(2, 12, 9, 9, seed=5), []
    for _ in range(3):
        y = FF.conv2d_relu(*[*wanted, w, b][:3], **kwargs)
        results.append([y.detach(), *gradients(y, wanted, dy)])
    for result in results[1:]:
        for again, first in zip(result, results[0], strict=True):
            assert_bitwise(again, first)


# -- composes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "with_mask", "with_bias"),
    [(FORMATS[0], False, True), (FORMATS[1], False, False), (FORMATS[0], True, False), (FORMATS[1], True, True)],
    ids=["output-bias", "output-channels_last", "mask", "mask-channels_last-bias"],
)
def test_opcheck(each_backend, format, with_mask, with_bias):
    x, w, b = randn(2, 4, 5, 6, format=format), randn(6, 2, 3, 3, seed=1), randn(6, seed=2) if with_bias else None
    conv = [1, 2], [1, 0], [1, 1], 2
    y, mask = OP(x, w, b, *conv, with_mask)
    w, b = (w, b) if with_mask else (leaf(w), leaf(b))
    torch.library.opcheck(OP, (leaf(x), w, b, *conv, with_mask))
    y, w = y.detach(), w.detach()
    dy, channels_last = randn(*y.shape, seed=3), format == torch.channels_last
    saved, needs = ((mask, None), [True, False, False]) if with_mask else ((y, x), [True, True, with_bias])
    tail = list(x.shape), channels_last, *conv, needs
    torch.library.opcheck(BACKWARD, (leaf(dy), saved[0], leaf(saved[1]), leaf(w), *tail))


@pytest.mark.parametrize("dtype", NARROW, ids=ident)
def test_opcheck_of_narrow_dtypes(each_backend, dtype):
    x, w, b = randn(1, 2, 4, 5, dtype=dtype), randn(3, 2, 3, 3, dtype=dtype, seed=1), randn(3, dtype=dtype, seed=2)
    torch.library.opcheck(OP, (leaf(x), w, b, *PLAIN, True), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("wanted", [(0,), (0, 1), (0, 1, 2)], ids=["frozen", "no_bias_gradient", "all"])
def test_gradcheck_and_gradgradcheck(each_backend, wanted):
    tensors = [
        randn(1, 4, 3, 3, dtype=torch.float64),
        randn(4, 2, 2, 3, dtype=torch.float64, seed=1),
        randn(4, dtype=torch.float64, seed=2),
    ]

    def run(*varied):
        return FF.conv2d_relu(*varied, *tensors[len(varied) :], padding=(0, 1), groups=2)

    varied = [leaf(tensors[i]) for i in wanted]
    assert run(*varied).ne(0).float().mean() not in (0, 1)
    torch.autograd.gradcheck(run, varied, check_batched_grad=True)
    torch.autograd.gradgradcheck(run, varied, check_batched_grad=True)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("dynamic", "padding"), [(False, 1), (True, "same")])
def test_compile_without_graph_break(each_backend, dynamic, padding, frozen):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = fastcnn.nn.ConvReLU2d(4, 6, (3, 2), padding=padding, groups=2).requires_grad_(not frozen)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    compilations = []
    for batch, width in [(2, 5), (3, 7), (4, 9)]:
        x = leaf(randn(batch, 4, 8, width, format=torch.channels_last))
        y, expected = compiled(x), layer(x)
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        dy = randn(*expected.shape, seed=2)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(gradients(y, wanted, dy), gradients(expected, wanted, dy))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected)
        compilations.append(counter.frame_count)
    if dynamic:
        assert compilations[0] == compilations[-1]  # other sizes run what was compiled for the first


@pytest.mark.parametrize("asked", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export_with_gradients(each_backend, strict, frozen, asked):
    """Also where other gradients were asked for when the program was exported: the mask is not enough for all."""
    layer = fastcnn.nn.ConvReLU2d(4, 6, 3, padding=1, groups=2).requires_grad_(not frozen)
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    example = randn(2, 4, 5, 6).requires_grad_(asked)
    exported = torch.export.export(layer, (example,), dynamic_shapes=batch, strict=strict).module()
    for module in (layer, exported):
        module.requires_grad_()
    for n in (2, 3):
        x = leaf(randn(n, 4, 5, 6, seed=2))
        y, expected = exported(x), layer(x)
        dy = randn(*expected.shape, seed=1)
        torch.testing.assert_close(y, expected)
        ours = gradients(y, [x, exported.weight, exported.bias], dy)
        torch.testing.assert_close(ours, gradients(expected, [x, layer.weight, layer.bias], dy))


@pytest.mark.parametrize("asked", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export_of_frozen_weights(each_backend, strict, asked):
    layer = fastcnn.nn.ConvReLU2d(3, 6, 3).requires_grad_(False)
    exported = torch.export.export(layer, (randn(2, 3, 5, 6).requires_grad_(asked),), strict=strict).module()
    x = leaf(randn(2, 3, 5, 6, seed=2))
    y, expected = exported(x), layer(x)
    dy = randn(*expected.shape, seed=1)
    torch.testing.assert_close(gradients(y, [x], dy), gradients(expected, [x], dy))


IN_DIMS = [(0, None, None), (1, None, None), (None, 0, None), (None, None, 0), (0, 0, None), (0, 0, 0), (-1, 1, 1)]


def cubed(run):
    return lambda x, w, b: (run(x, w, b, padding=1, groups=2) ** 3).sum()


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=ident)
def test_vmap(each_backend, in_dims):
    shapes = (2, 4, 4, 5), (6, 2, 3, 3), (6,)
    args = [
        randn(*shape, seed=i) if d is None else randn(3, *shape, seed=i).movedim(0, d)
        for i, (shape, d) in enumerate(zip(shapes, in_dims, strict=True))
    ]
    func = torch.func

    def of(run):
        grad = func.grad(cubed(run), (0, 1, 2))
        return [func.vmap(lambda *a: run(*a, padding=1, groups=2), in_dims)(*args), *func.vmap(grad, in_dims)(*args)]

    torch.testing.assert_close(of(FF.conv2d_relu), of(torch_conv_relu), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_over_an_input_that_asks_for_its_gradient_beside_frozen_weights(each_backend, in_dim):
    x, w, b = randn(3, 2, 4, 4, 5).movedim(0, in_dim), randn(6, 2, 3, 3, seed=1), randn(6, seed=2)

    def of(run):
        inner = leaf(x)
        y = torch.func.vmap(lambda x: run(x, w, b, padding=1, groups=2), in_dim)(inner)
        return [y, *gradients(y, [inner], randn(*y.shape, seed=3))]

    torch.testing.assert_close(of(FF.conv2d_relu), of(torch_conv_relu), rtol=1e-4, atol=1e-4)


def test_func_transforms(each_backend):
    x, w, b = (randn(*s, dtype=torch.float64, seed=i) for i, s in enumerate([(1, 4, 3, 3), (4, 2, 2, 2), (4,)]))
    func = torch.func

    def of(run):
        grad = func.grad(cubed(run))
        return [
            grad(x, w, b),
            func.jacrev(lambda w: run(x, w, b, groups=2))(w),
            func.grad(lambda x, w: grad(x, w, b).pow(2).sum(), (0, 1))(x, w),
            func.vmap(func.vmap(lambda x: run(x, w, b, groups=2)))(x.expand(2, 3, *x.shape)),
            func.functional_call(fastcnn.nn.ConvReLU2d(4, 4, 2, groups=2).double(), {"weight": w, "bias": b}, x),
        ]

    torch.testing.assert_close(of(FF.conv2d_relu), of(torch_conv_relu))


@pytest.mark.parametrize("dtype", NARROW, ids=ident)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_autocast_casts_as_for_the_convolution_of_torch(each_backend, frozen, dtype):
    (x, w, b), kwargs = case("alexnet_conv2")

    def of(run):
        args = leaf(x), *(t if frozen else leaf(t) for t in (w, b))
        with torch.autocast("cpu", dtype):
            y = run(*args, **kwargs)
        wanted = [t for t in args if t.requires_grad]
        return [y, *gradients(y, wanted, torch.ones_like(y))]

    ours, theirs = of(FF.conv2d_relu), of(torch_conv_relu)
    assert ours[0].dtype == dtype
    assert all(g.dtype == torch.float32 for g in ours[1:])
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-1)


def test_autocast_leaves_float64_and_what_is_narrow_already(each_backend):
    for dtype, expected in [(torch.float64, torch.float64), (torch.float16, torch.bfloat16)]:
        (x, w, b), kwargs = case("pairs", dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y, theirs = FF.conv2d_relu(x, w, b, **kwargs), torch_conv_relu(x, w, b, **kwargs)
        assert y.dtype == theirs.dtype == expected
    (x, w, b), kwargs = case("pairs")
    with torch.autocast("cpu", torch.bfloat16):  # of different dtypes: all are cast to one
        assert FF.conv2d_relu(x.bfloat16(), w, b.half(), **kwargs).dtype == torch.bfloat16


def test_retained_graph_and_checkpointing(each_backend):
    (x, w, b), kwargs = case("pairs")
    wanted = [leaf(x), leaf(w), leaf(b)]
    y = FF.conv2d_relu(*wanted, **kwargs)
    first = torch.autograd.grad(y, wanted, y.detach(), retain_graph=True)
    again = torch.utils.checkpoint.checkpoint(lambda *a: FF.conv2d_relu(*a, **kwargs), *wanted, use_reentrant=False)
    for second in (torch.autograd.grad(y, wanted, y.detach()), torch.autograd.grad(again, wanted, y.detach())):
        for a, c in zip(second, first, strict=True):
            assert_bitwise(a, c)


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "bias": False, "groups": 2},
        {"kernel_size": (3, 2), "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 2},
        {"kernel_size": (2, 3), "padding": "same", "padding_mode": "replicate"},
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
@pytest.mark.parametrize("shape", [(2, 4, 7, 8), (4, 7, 8)], ids=ident)
def test_layer_is_that_of_torch(each_backend, shape, kwargs):
    ours, theirs = fastcnn.nn.ConvReLU2d(4, 6, **kwargs), torch.nn.Conv2d(4, 6, **kwargs)
    assert isinstance(ours, torch.nn.Conv2d)
    assert repr(ours) == repr(theirs).replace("Conv2d", "ConvReLU2d")
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = leaf(randn(*shape))
    expected = F.relu(theirs(x))
    for layer in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(layer(x), expected)
    dy = randn(*expected.shape, seed=1)
    expected_gradients = gradients(expected, [x, *theirs.parameters()], dy)
    torch.testing.assert_close(gradients(ours(x), [x, *ours.parameters()], dy), expected_gradients)

    other = torch.nn.Conv2d(4, 6, **kwargs)  # new weights after the first call count
    ours.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), F.relu(other(x)))


# -- properties -------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    groups = draw(st.integers(1, 3))
    channels, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, dilation = [draw(st.integers(1, 3)) for _ in "hw"], [draw(st.integers(1, 2)) for _ in "hw"]
    size = [d * (k - 1) + draw(st.integers(1, 6)) for k, d in zip(kernel, dilation, strict=True)]
    kwargs = {
        "stride": tuple(draw(st.integers(1, 3)) for _ in "hw"),
        "padding": tuple(draw(st.integers(0, 2)) for _ in "hw"),
        "dilation": tuple(dilation),
        "groups": groups,
    }
    shape = [draw(st.integers(1, 3)), channels, *size]
    x = draw(inputs(shape[draw(st.integers(0, 1)) :]))
    return x, (outputs, channels // groups, *kernel), draw(st.booleans()), kwargs


@settings(max_examples=30)
@given(cases())
def test_any_input_agrees_with_torch(each_backend, drawn):
    described, weight, with_bias, kwargs = drawn
    x = described.tensor().mul(2).round()  # of small integers: both are exact
    w = integers(*weight, dtype=x.dtype, seed=1)
    b = integers(weight[0], dtype=x.dtype, seed=2) if with_bias else None
    ours, theirs = ([leaf(t) for t in (x, w, b)] for _ in range(2))
    y, expected = FF.conv2d_relu(*ours, **kwargs), torch_conv_relu(*theirs, **kwargs)
    assert_bitwise(y.detach(), expected.detach())
    assert y.stride() == expected_strides(x, y.shape)
    dy = integers(*y.shape, dtype=y.dtype, seed=3)
    for a, c in zip(gradients(y, ours, dy), gradients(expected, theirs, dy), strict=True):
        assert (a is None) == (c is None)
        if a is not None:
            torch.testing.assert_close(a, c)


# -- bad input --------------------------------------------------------------------------------------------------------

X, W = torch.zeros(1, 4, 9, 9), torch.zeros(6, 4, 3, 3)


def refused(match, *args, **kwargs):
    """With exactly the type of exception that torch raises, and a message of ours."""
    with pytest.raises((TypeError, ValueError, RuntimeError)) as theirs:
        F.conv2d(*args, **kwargs)
    with pytest.raises(theirs.type, match=match) as ours:
        FF.conv2d_relu(*args, **kwargs)
    assert ours.type is theirs.type


@pytest.mark.parametrize("shape", [(), (4,), (9, 9), (1, 4, 9, 9, 9)], ids=ident)
def test_input_of_wrong_rank_raises_as_torch(each_backend, shape):
    refused(r"conv2d_relu\(\): expected 3D .*4D", torch.zeros(shape), W)


@pytest.mark.parametrize("shape", [(), (6,), (6, 4, 3), (6, 4, 3, 3, 3)], ids=ident)
def test_weight_of_wrong_rank_raises_as_torch(each_backend, shape):
    refused("expected a 4D weight", X, torch.zeros(shape))


@pytest.mark.parametrize(
    ("weight", "groups"), [((6, 3, 3, 3), 1), ((6, 4, 3, 3), 2), ((5, 2, 3, 3), 2), ((6, 0, 3, 3), 1)], ids=ident
)
def test_channels_that_do_not_fit_raise_as_torch(each_backend, weight, groups):
    refused(f"groups={groups}", X, torch.zeros(weight), groups=groups)


@pytest.mark.parametrize("groups", [0, -1])
def test_groups_out_of_range_raise_as_torch(each_backend, groups):
    refused(f"groups={groups}", X, W, groups=groups)


@pytest.mark.parametrize("bias", [(), (1,), (4,), (0,), (6, 1), (1, 6)], ids=ident)
def test_bias_of_another_shape_raises_as_torch(each_backend, bias):
    refused("bias to be 1-dimensional with 6 elements", X, W, torch.zeros(bias))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("stride", "dilation") for value in (0, -1, (1, 0), (-3, 2))]
    + [("padding", value) for value in (-1, (0, -1), "full", "")],
    ids=ident,
)
def test_values_out_of_range_raise_as_torch(each_backend, name, value):
    refused(name, X, W, **{name: value})


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [(1, 1, 1), (), 1.5, (1.5, 1), (1, "1"), None], ids=repr)
def test_values_of_another_kind_raise_as_torch(each_backend, name, value):
    refused(name, X, W, **{name: value})


@pytest.mark.parametrize("value", [1.5, "1", None, (1,)], ids=repr)
def test_groups_of_another_kind_raise_as_torch(each_backend, value):
    refused("groups", X, W, groups=value)


def test_same_padding_with_a_stride_raises_as_torch(each_backend):
    refused("'same' needs stride 1", X, W, padding="same", stride=(1, 2))


@pytest.mark.parametrize("shape", [(1, 4, 2, 9), (1, 4, 9, 2), (0, 4, 2, 2), (4, 2, 9)], ids=ident)
def test_kernel_greater_than_the_input_raises_as_torch(each_backend, shape):
    refused("kernel can't be greater than the padded input", torch.zeros(shape), W)


def test_dilated_kernel_greater_than_the_input_raises_as_torch(each_backend):
    refused("kernel can't be greater than the padded input", X, W, dilation=5)
    refused("kernel can't be greater than the padded input", X, W, dilation=6, padding=1)


@pytest.mark.parametrize("shape", [(1, 4, 0, 9), (1, 4, 9, 0)], ids=ident)
def test_empty_maps_raise_as_torch(each_backend, shape):
    refused("kernel can't be greater than the padded input", torch.zeros(shape), W)


@pytest.mark.parametrize("weight", [(6, 4, 0, 3), (6, 4, 3, 0), (0, 4, 3, 3)], ids=ident)
def test_empty_weight_raises_as_torch(each_backend, weight):
    refused("weight of size", X, torch.zeros(weight))


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float64, None),
        (torch.bfloat16, torch.float32, None),
        (torch.float32, torch.float32, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.bfloat16),
        (torch.float32, torch.int64, None),
    ],
    ids=ident,
)
def test_different_dtypes_raise_as_torch(each_backend, dtypes):
    x, w, b = dtypes
    bias = None if b is None else torch.zeros(6, dtype=b)
    refused("should be the same", X.to(x), W.to(w), bias)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn], ids=ident)
def test_other_dtypes_raise_as_torch(each_backend, dtype):
    refused("not implemented for input of dtype", X.to(dtype), W.to(dtype))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=ident)
def test_dtypes_that_only_the_convolution_of_torch_has_raise(each_backend, dtype):
    with pytest.raises(NotImplementedError, match=f"input of dtype {dtype}; allowed are float16"):
        FF.conv2d_relu(X.to(dtype), W.to(dtype))


def test_another_device_raises(each_backend):
    with pytest.raises(RuntimeError, match=r"on cpu.*on meta"):
        FF.conv2d_relu(X, W.to("meta"))
    with pytest.raises(RuntimeError, match="input on cpu and bias on meta"):
        FF.conv2d_relu(X, W, torch.zeros(6, device="meta"))


def test_sparse_input_raises(each_backend):
    with pytest.raises(NotImplementedError, match=r"layout torch\.strided, got torch\.sparse_coo"):
        FF.conv2d_relu(X.to_sparse(), W)


@pytest.mark.parametrize("value", [[1.0], 3.0], ids=ident)
def test_what_is_no_tensor_raises_as_torch(each_backend, value):
    kind = type(value).__name__
    refused(f"argument 'input' must be Tensor, not {kind}", value, W)
    refused(f"argument 'weight' must be Tensor, not {kind}", X, value)
    refused(f"argument 'bias' must be Tensor or None, not {kind}", X, W, value)


def test_missing_tensors_raise_as_torch(each_backend):
    refused("argument 'input' must be Tensor, not NoneType", None, W)
    refused("argument 'weight' must be Tensor, not NoneType", X, None)
