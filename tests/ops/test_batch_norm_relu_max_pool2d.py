"""What is special to batch norm; what it promises as every operator does is in test_promises.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from operators import NORMS, POOL, torch_norm
from promises import FORMATS, assert_bitwise, gradients, ident, in_format, leaf, randn
from torch import nn

import fastcnn
import fastcnn.functional as FF
from fastcnn import PoolParams, reference

NORM, NORM_BACKWARD = (
    torch.ops.fastcnn.batch_norm_relu_max_pool2d.default,
    torch.ops.fastcnn.batch_norm_relu_max_pool2d_backward.default,
)
TAILS = [{}, {"relu": False}, {"relu_first": True}, {"pool": POOL}, {"relu_first": True, "pool": PoolParams(2)}]
formats = pytest.mark.parametrize("format", FORMATS, ids=ident)
tails = pytest.mark.parametrize("tail", TAILS, ids=str)


def of_torch(layer: nn.BatchNorm2d, relu=True, relu_first=False, pool=None):
    """The layers that do what ``layer`` does."""
    parts = [layer, nn.ReLU()][:: -1 if relu_first else 1] if relu else [layer]
    return nn.Sequential(*parts, *([] if pool is None else [nn.MaxPool2d(*pool.op_args()[:4])]))


def pair(channels, tail, **options):
    """A layer and torch's, with the same parameters."""
    ours = fastcnn.nn.BatchNormReLUMaxPool2d(channels, **options, **tail)
    theirs = nn.BatchNorm2d(channels, **options)
    with torch.no_grad():
        for i, p in enumerate(ours.parameters()):
            p.copy_(randn(channels, seed=20 + i))
    theirs.load_state_dict(ours.state_dict())
    return ours, of_torch(theirs, **tail), theirs


# -- running statistics -----------------------------------------------------------------------------------------------


@formats
@tails
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None], ids=str)
def test_trains_and_evaluates_as_torch(backend, format, tail, affine, momentum):
    ours, theirs, norm = pair(6, tail, affine=affine, momentum=momentum)
    for step in range(3):
        x = leaf(in_format(3 + 2 * randn(4, 6, 9, 8, seed=step), format))
        y, expected = ours(x), theirs(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(ours.state_dict(), norm.state_dict())
        dy = randn(*y.shape, seed=9)
        found = gradients(y, [x, *ours.parameters()], dy)
        torch.testing.assert_close(found, gradients(expected, [x, *norm.parameters()], dy), rtol=1e-4, atol=1e-4)
    assert ours.num_batches_tracked == 3
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), norm.state_dict())


@tails
def test_without_running_statistics_evaluation_is_by_the_batch(backend, tail):
    ours, theirs, _ = pair(5, tail, track_running_stats=False)
    x = randn(3, 5, 7, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert not list(ours.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ident)
@pytest.mark.parametrize("narrow", [True, False])
def test_running_statistics_beside_narrow_input(backend, dtype, narrow):
    x, of = (2 + randn(4, 6, 5, 7)).to(dtype), dtype if narrow else torch.float32
    ours, theirs = ([torch.zeros(6, dtype=of), torch.ones(6, dtype=of)] for _ in range(2))
    FF.batch_norm_relu_max_pool2d(x, *ours, training=True)
    F.batch_norm(x, *theirs, training=True)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == of
        torch.testing.assert_close(a, b, rtol=1e-2 if narrow else 1e-4, atol=1e-3)


def test_nothing_is_tracked_of_an_empty_batch(backend):
    layer = fastcnn.nn.BatchNormReLUMaxPool2d(5)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.zeros(0, 5, 3, 3))
    for name in ("running_mean", "running_var"):
        assert_bitwise(layer.state_dict()[name], before[name])


@tails
def test_statistics_that_move_meanwhile_do_not_disturb_backward(backend, tail):
    """Neither ours, which keeps its own, nor torch's on the same statistics, as two calls of a discriminator."""
    ours, theirs, norm = pair(6, tail)
    for train in (True, False):
        x = leaf(randn(4, 6, 9, 8, seed=5))
        expected = gradients(y := theirs.train(train)(x), [x], torch.ones_like(y))
        norm.load_state_dict(ours.state_dict())
        ours.train(train)
        y, of_torch = ours(x), F.batch_norm(x, ours.running_mean, ours.running_var, training=train)
        norm.load_state_dict(ours.state_dict())
        ours.train()(randn(4, 6, 9, 8, seed=6))
        torch.testing.assert_close(gradients(y, [x], torch.ones_like(y)), expected, rtol=1e-3, atol=1e-5)
        of_torch.sum().backward()
        norm.load_state_dict(ours.state_dict())


def test_state_dict_is_that_of_torch_both_ways():
    ours, theirs = fastcnn.nn.BatchNormReLUMaxPool2d(5, pool=POOL), nn.BatchNorm2d(5)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_compiled_layer_moves_its_statistics(each_backend):
    torch._dynamo.reset()
    ours, x = fastcnn.nn.BatchNormReLUMaxPool2d(6, pool=POOL), leaf(randn(4, 6, 9, 8))
    twin = copy.deepcopy(ours)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        y, expected = compiled(x), ours(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(twin.state_dict(), ours.state_dict())
        torch.testing.assert_close(gradients(y, [x], y), gradients(expected, [x], expected))


# -- accuracy ---------------------------------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("mean", [1e2, 1e4, -1e5])
@pytest.mark.parametrize("shape", [(4, 5, 33, 37), (8, 64, 14, 14), (3, 20, 1, 5)], ids=ident)
def test_mean_far_from_zero_costs_no_accuracy(backend, format, mean, shape):
    """Of the numbers as float32 has them: about as near as torch or nearer, and not by what a sum of squares loses."""
    x = in_format(mean + randn(*shape), format)
    exact = F.batch_norm(x.double(), None, None, training=True)
    running = [torch.zeros(shape[1]), torch.zeros(shape[1])]
    y = FF.batch_norm_relu_max_pool2d(x, *running, training=True, momentum=1.0, relu=False)
    rounding = abs(mean) * torch.finfo(x.dtype).eps
    assert (y - exact).abs().max() <= 2 * rounding
    theirs = F.batch_norm(x, None, None, training=True)
    assert (y - exact).norm() <= 1.5 * (theirs - exact).norm()
    torch.testing.assert_close(running[1].double(), x.double().var((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(running[0].double(), x.double().mean((0, 2, 3)), rtol=1.3e-7, atol=0)


@formats
def test_variance_beside_an_outlier(backend, format):
    """The first number of all, which a naive shift would take for the mean, is far from the others."""
    x = randn(2, 3, 40, 41)
    x[0, :, 0, 0] = 1e4
    running = [torch.zeros(3), torch.zeros(3)]
    FF.batch_norm_relu_max_pool2d(in_format(x, format), *running, training=True, momentum=1.0)
    torch.testing.assert_close(running[1].double(), x.double().var((0, 2, 3)), rtol=1e-6, atol=0)


@formats
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_what_is_not_finite_spoils_its_channel_alone_as_in_torch(backend, format, value, norm):
    x = in_format(randn(2, 5, 9, 8), format)
    x[1, 3, 4, 4] = value
    running = () if norm["training"] else (torch.zeros(5), torch.ones(5))
    running = running or (None, None)
    y, expected = FF.batch_norm_relu_max_pool2d(x, *running, **norm), torch_norm(x, *running, **norm)
    torch.testing.assert_close(y, expected, equal_nan=True)


# -- every rank -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "tail"),
    [((4, 5), {}), ((4, 5, 6), {"relu_first": True}), ((2, 5, 3, 4, 3), {"relu": False}), ((4, 5, 6), {"pool": POOL})],
    ids=str,
)
def test_other_ranks_run_torch_s_operators(backend, shape, tail):
    x = leaf(randn(*shape))
    y, expected = (
        FF.batch_norm_relu_max_pool2d(x, None, None, training=True, **tail),
        torch_norm(x, None, None, training=True, **tail),
    )
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, [x], y), gradients(expected, [x], expected))


# -- bad input --------------------------------------------------------------------------------------------------------


def refused(error, match, x, *args, **kwargs):
    """As by torch, if not for the pool, or a weight of two dimensions."""
    if "pool" not in kwargs and not any(t is not None and t.dim() > 1 for t in args[2:]):
        with pytest.raises(error):
            F.batch_norm(x, *args, **kwargs)
    with pytest.raises(error, match=match) as ours:
        FF.batch_norm_relu_max_pool2d(x, *args, **kwargs)
    assert ours.type is error


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (1, 5)], ids=ident)
def test_one_value_per_channel_raises_as_torch(each_backend, shape):
    x = torch.zeros(shape)
    refused(ValueError, "Expected more than 1 value per channel when training", x, None, None, training=True)
    FF.batch_norm_relu_max_pool2d(x, torch.zeros(5), torch.ones(5))


@pytest.mark.parametrize("training", [True, False])
def test_statistics_that_are_missing_raise_as_torch(each_backend, training):
    x, error = torch.zeros(2, 5, 3, 3), ValueError if training else RuntimeError
    with pytest.raises(error):
        F.batch_norm(x, None, torch.ones(5), training=training)
    with pytest.raises((ValueError, RuntimeError), match="running_mean and running_var must"):
        FF.batch_norm_relu_max_pool2d(x, None, torch.ones(5), training=training)
    refused(RuntimeError, "must be defined in evaluation mode", x, None, None)


@pytest.mark.parametrize(("eps", "training"), [(0.0, True), (-1.0, False), (-1.0, True)])
def test_eps_that_is_not_positive_raises_as_torch(each_backend, eps, training):
    running = torch.zeros(5), torch.ones(5)
    refused(ValueError, "batch_norm eps must be", torch.zeros(2, 5, 3, 3), *running, training=training, eps=eps)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (torch.zeros(4), r"to be 1-dimensional with 5 elements \(one a channel\), but got \w+ of size \[4\]"),
        (torch.zeros(1, 5), "to be 1-dimensional with 5 elements"),
        (torch.zeros(5, dtype=torch.float64), "should be the same"),
    ],
    ids=["channels", "rank", "dtype"],
)
def test_what_does_not_match_the_input_raises_as_torch(each_backend, which, wrong, match):
    tensors = [torch.zeros(5) for _ in range(4)]
    tensors[which] = wrong
    name = ("running_mean", "running_var", "weight", "bias")[which]
    refused(RuntimeError, f"{name}.*{match}|{match}", torch.zeros(2, 5, 3, 3), *tensors)


def test_pool_of_another_type_raises(each_backend):
    x = torch.zeros(2, 5, 4, 4)
    refused(TypeError, "argument 'pool' must be PoolParams or None, not int", x, None, None, training=True, pool=2)


@pytest.mark.parametrize(("shape", "pool"), [((2, 5, 2, 2), POOL), ((2, 0, 4, 4), POOL)], ids=str)
def test_pool_that_leaves_nothing_raises(each_backend, shape, pool):
    refused(RuntimeError, "size", torch.zeros(shape), None, None, training=True, pool=pool)


@pytest.mark.skipif("cpu" not in fastcnn.backends.available(), reason="C++ kernels are not built")
def test_ops_called_directly_refuse_tensors_that_do_not_fit():
    """The ops are public too, and what a kernel would read out of bounds they must not let through."""
    x, c, args = randn(2, 8, 9, 9), randn(8), fastcnn.params.BatchNormParams(True, pool=POOL).op_args()
    y, argmax, mean, var = NORM(x, None, None, c, c, *args, True)
    evaluation = False, *args[1:]
    for wrong in (
        lambda: NORM(x, None, None, c[:1], c, *args, True),
        lambda: NORM(x, None, None, c, c.half(), *args, True),
        lambda: NORM(x, c[:1], c, c, c, *evaluation, True),
        lambda: NORM_BACKWARD(x, x, mean, var, c, c, argmax, *args),
        lambda: NORM_BACKWARD(y.half(), x, mean, var, c, c, argmax, *args),
        lambda: NORM_BACKWARD(y, x, mean[:1], var, c, c, argmax, *args),
        lambda: NORM_BACKWARD(y, x, mean, var.double(), c, c, argmax, *args),
        lambda: NORM_BACKWARD(y, x, mean, var, c, c, argmax[:1], *args),
    ):
        with fastcnn.backends.use("cpu"), pytest.raises((RuntimeError, ValueError, TypeError)):
            wrong()


def test_reference_is_what_torch_computes():
    for norm in NORMS:
        x, weight, bias = (
            leaf(randn(3, 6, 9, 8, dtype=torch.float64)),
            *(randn(6, dtype=torch.float64, seed=s) for s in (1, 2)),
        )
        ours, theirs = ([torch.zeros(6).double(), torch.ones(6).double()] for _ in range(2))
        y = reference.batch_norm_relu_max_pool2d(x, *ours, weight, bias, **norm)
        expected = torch_norm(x, *theirs, weight, bias, **norm)
        torch.testing.assert_close((y, ours), (expected, theirs))
        torch.testing.assert_close(gradients(y, [x], y), gradients(expected, [x], expected))


@formats
@pytest.mark.parametrize("training", [True, False])
def test_window_without_any_element_is_minus_infinity_and_gets_no_gradient(backend, format, training):
    """A dilated window can straddle the whole map; torch then names a place outside of it."""
    x, weight, bias = leaf(in_format(randn(2, 5, 1, 3), format)), leaf(torch.ones(5)), leaf(torch.ones(5))
    running = (None, None) if training else (torch.zeros(5), torch.ones(5))
    pool = PoolParams((2, 1), 1, (1, 0), (2, 1))
    y = FF.batch_norm_relu_max_pool2d(x, *running, weight, bias, training, pool=pool)
    assert_bitwise(y.detach(), torch.full((2, 5, 1, 3), float("-inf")))
    dx, dweight, dbias = gradients(y, (x, weight, bias), torch.ones_like(y))
    assert not any(t.count_nonzero() for t in (dx, dweight, dbias))
