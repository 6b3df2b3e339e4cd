"""Every promise that max_pool2d makes: it is torch's, bit for bit, and keeps one byte an output."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from promises import (
    DTYPES,
    FORMATS,
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
from torch._subclasses import FakeTensorMode

import fastcnn
import fastcnn.functional as FF
from fastcnn import PoolParams

INF, NAN = float("inf"), float("nan")
POOL = PoolParams(3, 2)
WIDE = PoolParams(17, 1, 8)  # more than 256 places: the argmax takes int32
POOLS = [
    POOL,
    PoolParams(2, 2),
    PoolParams(3, 1, 1),
    PoolParams(1, 3),
    PoolParams((2, 3)),
    PoolParams((1, 3), (2, 1), (0, 1)),
    PoolParams(2, 5),
    PoolParams(3, 2, 1, 2),
    PoolParams((3, 2), 2, 1, (1, 3)),
    PoolParams(3, 2, 0, 1, True),
    PoolParams(3, 2, 1, 1, True),
    PoolParams(2, 3, 1, 2, True),
    PoolParams((16, 16), 3, 8),  # the most places that one byte can name
    WIDE,
    PoolParams((1, 257), 1, (0, 128)),
]
OP, BACKWARD = torch.ops.fastcnn.max_pool2d.default, torch.ops.fastcnn.max_pool2d_backward.default


def assert_is_that_of_torch(x, pool, dy=None):
    """Values, indices and gradient, bit for bit; gradients are small integers, so that no order of adding counts."""
    ours, theirs = leaf(x), leaf(x)
    y, indices = FF.max_pool2d(ours, *pool.op_args(), return_indices=True)
    expected, expected_indices = F.max_pool2d(theirs, *pool.op_args(), return_indices=True)
    assert indices.dtype == torch.int64
    assert not indices.requires_grad
    assert_bitwise(y.detach(), expected.detach())
    assert_bitwise(indices, expected_indices)
    assert y.stride() == expected_strides(x, y.shape)
    for format in FORMATS:
        assert indices.is_contiguous(memory_format=format) == y.is_contiguous(memory_format=format)
    dy = integers(*y.shape, dtype=y.dtype, seed=1) if dy is None else dy
    (dx,) = gradients(y, (ours,), dy)
    assert_bitwise(dx, gradients(expected, (theirs,), dy)[0])
    assert dx.stride() == expected_strides(x, x.shape)
    assert_bitwise(FF.max_pool2d(x, *pool.op_args()), expected.detach())


# -- same answer, ties, NaN, inf --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS, ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_ties(backend, dtype, format, pool):
    assert_is_that_of_torch(in_format(integers(2, 17, 7, 9, dtype=dtype), format), pool)
    assert_is_that_of_torch(torch.zeros(1, 2, 6, 5, dtype=dtype).contiguous(memory_format=format), pool)


@pytest.mark.parametrize("pool", POOLS, ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ident)
def test_nan_and_infinities(kernel, dtype, format, pool):
    choice = integers(1, 17, 7, 12, low=0, high=20, dtype=torch.int64)
    values = torch.tensor([NAN, INF, -INF, -INF, -INF, *range(-7, 8)], dtype=dtype)
    assert_is_that_of_torch(in_format(values[choice], format), pool)
    for value in (NAN, -INF):
        assert_is_that_of_torch(in_format(torch.full((1, 2, 5, 6), value, dtype=dtype), format), pool)


@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0)], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_zeros_of_both_signs_are_ties(backend, format, zeros):
    assert_is_that_of_torch(in_format(torch.tensor(zeros).repeat(1, 20, 6, 4), format), POOL)


@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0)], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_zeros_keep_the_sign_that_torch_gives_them(backend, format, zeros):
    x = in_format(torch.tensor(zeros).repeat(1, 20, 6, 4), format)
    assert_bitwise(FF.max_pool2d(x, 3, 2).signbit(), F.max_pool2d(x, 3, 2, return_indices=True)[0].signbit())


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_non_finite_gradients_stay_at_the_maximum(backend, format, value):
    x = in_format(integers(1, 5, 7, 7), format)
    dy = integers(1, 5, 3, 3, seed=1)
    dy[0, 2, 1, 1] = value
    assert_is_that_of_torch(x, POOL, dy)


# -- every size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [POOL, PoolParams(2, 2, 1, 1, True), WIDE], ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_single_image(backend, dtype, pool):
    assert_is_that_of_torch(integers(5, 9, 11, dtype=dtype), pool)


@pytest.mark.parametrize("pool", [POOL, WIDE], ids=ident)
@pytest.mark.parametrize("shape", [(0, 5, 9, 7), (0, 1, 3, 3)], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_empty_batch(backend, format, shape, pool):
    assert_is_that_of_torch(in_format(randn(*shape), format), pool)


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (3, 1, 5, 4), (1, 7, 3, 70), (2, 33, 70, 3)], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_narrow_and_wide_maps(kernel, format, shape):
    assert_is_that_of_torch(in_format(integers(*shape), format), POOL)
    assert_is_that_of_torch(in_format(integers(*shape), format), PoolParams(2, 1, 1))


@pytest.mark.parametrize(
    "pool", [PoolParams(2, 10**9), PoolParams(1, 1, 0, 10**9), PoolParams(2, 2**31 - 1, 1)], ids=ident
)
def test_stride_and_dilation_far_beyond_the_map(backend, pool):
    assert_is_that_of_torch(integers(2, 5, 4, 6), pool)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=ident)
@pytest.mark.parametrize("pool", [POOL, PoolParams(3, 2, 1, 1, True)], ids=ident)
def test_integers_fall_through_to_torch(each_backend, pool, dtype):
    x = integers(2, 3, 7, 9, dtype=dtype, low=0, high=100)
    y, indices = FF.max_pool2d(x, *pool.op_args(), return_indices=True)
    expected, expected_indices = F.max_pool2d(x, *pool.op_args(), return_indices=True)
    assert_bitwise(y, expected)
    assert_bitwise(indices, expected_indices)
    with recorded_calls() as calls:
        assert_bitwise(FF.max_pool2d(x, *pool.op_args()), expected)
    assert not calls


# -- memory formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (3, 2, 1, 0), (1, 0, 2, 3), (0, 2, 3, 1)], ids=ident)
@pytest.mark.parametrize("steps", [(1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 2), (2, 1, 3, 1)], ids=ident)
def test_any_strides(backend, order, steps):
    assert_is_that_of_torch(embedded(integers(2, 6, 9, 7), order, steps, offset=1), POOL)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0)], ids=ident)
def test_any_strides_of_a_single_image(backend, order):
    assert_is_that_of_torch(embedded(integers(6, 9, 7), order), POOL)


@pytest.mark.parametrize("dim", range(4))
def test_expanded_input(backend, dim):
    shape = [2, 6, 9, 7]
    one = [*shape]
    one[dim] = 1
    x = integers(*one).expand(shape)
    assert_bitwise(FF.max_pool2d(x, 3, 2), F.max_pool2d(x, 3, 2))


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_gradient_in_any_memory_format(backend, format):
    x = in_format(integers(2, 17, 9, 7), format)
    dy = integers(2, 17, 4, 3, seed=1)
    for other in (in_format(dy, torch.channels_last), embedded(dy, (3, 0, 2, 1)), embedded(dy, steps=(1, 1, 1, 2))):
        assert_is_that_of_torch(x, POOL, other)
    assert_is_that_of_torch(x, POOL, torch.ones(()).expand(dy.shape))


@pytest.mark.parametrize("pool", [POOL, WIDE], ids=ident)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 3, 3), (0, 3, 4, 5)], ids=ident)
def test_output_strides_are_channels_last_only_for_channels_last(backend, shape, pool):
    plain = randn(*shape)
    others = in_format(plain, torch.channels_last), embedded(plain, [3, 2, 1, 0]), embedded(plain, steps=(1, 2, 1, 1))
    for x in (plain, *others):
        y, argmax = OP(x, *pool.op_args(), True)
        assert argmax.dtype == (torch.int32 if pool is WIDE else torch.uint8)
        assert y.stride() == argmax.stride() == expected_strides(x, y.shape)
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        dx = BACKWARD(y, argmax, list(shape[2:]), channels_last, *pool.op_args())
        assert dx.stride() == expected_strides(x, x.shape)
        with FakeTensorMode() as mode:
            fake_y, fake_argmax = OP(mode.from_tensor(x), *pool.op_args(), True)
        assert (fake_y.stride(), fake_y.dtype) == (y.stride(), y.dtype)
        assert (fake_argmax.stride(), fake_argmax.dtype) == (argmax.stride(), argmax.dtype)


def test_meta_tensors():
    x = torch.empty(2, 3, 9, 9, device="meta").to(memory_format=torch.channels_last)
    y = FF.max_pool2d(x, 3, 2)
    assert y.device.type == "meta"
    assert y.shape == (2, 3, 4, 4)
    assert y.is_contiguous(memory_format=torch.channels_last)


# -- little memory, deterministic -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pool", "size"), [(POOL, 1), (PoolParams(16, 4, 8), 1), (WIDE, 4)], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("shape", [(2, 5, 9, 7), (5, 9, 7)], ids=ident)
def test_backward_keeps_one_byte_an_output_and_nothing_else(backend, shape, dtype, format, pool, size):
    x = leaf(in_format(randn(*shape, dtype=dtype), format))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = FF.max_pool2d(x, *pool.op_args())
    assert [(t.numel(), t.untyped_storage().nbytes()) for t in kept] == [(y.numel(), size * y.numel())]


def test_nothing_is_kept_and_no_argmax_is_computed_without_gradient(backend):
    for x, mode in [(randn(2, 3, 7, 7), torch.enable_grad()), (leaf(randn(2, 3, 7, 7)), torch.no_grad())]:
        with mode, recorded_calls() as calls:
            y = FF.max_pool2d(x, 3, 2)
        assert not y.requires_grad
        ((name, (_, argmax)),) = calls
        assert name == "fastcnn.max_pool2d.default"
        assert argmax.numel() == 0


@pytest.mark.parametrize("pool", [PoolParams(3, 1, 1), WIDE], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_same_bits_in_every_run_and_for_every_number_of_threads(backend, format, pool, threads):
    x, dy = leaf(in_format(randn(3, 17, 21, 20), format)), None
    results = []
    for n in (1, 2, 3, 2):
        threads(n)
        y, indices = FF.max_pool2d(x, *pool.op_args(), return_indices=True)
        dy = randn(*y.shape, seed=1) if dy is None else dy
        results.append((y.detach(), indices, *gradients(y, (x,), dy)))
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert_bitwise(ours, first)


# -- composes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "format"), [(PoolParams(2, 2, 1, 2, True), FORMATS[1]), (WIDE, FORMATS[0])], ids=ident
)
def test_opcheck(each_backend, pool, format):
    x = randn(1, 3, 7, 6, format=format)
    y, argmax = OP(x, *pool.op_args(), True)
    torch.library.opcheck(OP, (leaf(x), *pool.op_args(), True))
    torch.library.opcheck(OP, (leaf(x), *pool.op_args(), False))
    torch.library.opcheck(BACKWARD, (leaf(y), argmax, [7, 6], format == torch.channels_last, *pool.op_args()))


def apart(*shape, seed=0):
    """Values in float64 that no small step brings to a tie."""
    order = torch.randperm(torch.Size(shape).numel(), generator=torch.Generator().manual_seed(seed))
    return (order.double() / order.numel() - 0.5).view(shape)


@pytest.mark.parametrize("pool", [PoolParams(2, 1), PoolParams(2, 2, 1, 2, True)], ids=ident)
@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (1, 4, 3)], ids=ident)
def test_gradcheck_and_gradgradcheck(each_backend, shape, pool):
    x = leaf(apart(*shape))

    def run(x):
        return FF.max_pool2d(x, *pool.op_args())

    torch.autograd.gradcheck(run, x, check_batched_grad=True)
    torch.autograd.gradgradcheck(run, x)


def test_double_backward_of_batched_gradients(each_backend):
    torch.autograd.gradgradcheck(lambda x: FF.max_pool2d(x, 2, 1), leaf(apart(1, 2, 3, 3)), check_batched_grad=True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("return_indices", [False, True], ids=["values", "indices"])
def test_compile_without_graph_break(each_backend, return_indices, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = fastcnn.nn.MaxPool2d(3, 2, 1, return_indices=return_indices)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    compilations = []
    for batch, width in [(2, 5), (3, 7), (4, 9)]:
        x = leaf(in_format(integers(batch, 3, 8, width), torch.channels_last))
        outputs, expected = compiled(x), layer(x)
        if return_indices:
            assert_bitwise(outputs[1], expected[1])
            outputs, expected = outputs[0], expected[0]
        assert_bitwise(outputs.detach(), expected.detach())
        assert outputs.stride() == expected.stride()
        dy = randn(*expected.shape, seed=1)
        assert_bitwise(gradients(outputs, (x,), dy)[0], gradients(expected, (x,), dy)[0])
        compilations.append(counter.frame_count)
    if dynamic:
        assert compilations[0] == compilations[-1]  # other sizes run what was compiled for the first


@pytest.mark.parametrize("asked", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_export_with_gradients(each_backend, format, strict, asked):
    """Also where no gradient was asked for when the program was exported: no argmax was kept then."""
    layer = fastcnn.nn.MaxPool2d(3, 2)
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    example = randn(2, 6, 9, 8, format=format).requires_grad_(asked)
    exported = torch.export.export(layer, (example,), dynamic_shapes=batch, strict=strict).module()
    for n in (2, 3):
        x = leaf(in_format(integers(n, 6, 9, 8, seed=2), format))
        y, expected = exported(x), layer(x)
        dy = randn(*expected.shape, seed=1)
        assert_bitwise(y.detach(), expected.detach())
        assert_bitwise(gradients(y, (x,), dy)[0], gradients(expected, (x,), dy)[0])


def cubed(run, **kwargs):
    return lambda x: (run(x, 3, 2, 1, **kwargs) ** 3).sum()


@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap(each_backend, in_dim):
    x = integers(3, 2, 4, 7, 8).movedim(0, in_dim)
    func = torch.func
    for run in (lambda x, f: f(x, 3, 2), lambda x, f: f(x[0], 3, 2), lambda x, f: f(x, 3, 2, return_indices=True)):
        ours, theirs = (func.vmap(run, (in_dim, None))(x, f) for f in (FF.max_pool2d, F.max_pool2d))
        if isinstance(ours, torch.Tensor):
            ours, theirs = [ours], [theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert_bitwise(a, b)
    torch.testing.assert_close(
        func.vmap(func.grad(cubed(FF.max_pool2d)), in_dim)(x), func.vmap(func.grad(cubed(F.max_pool2d)), in_dim)(x)
    )


def test_func_transforms(each_backend):
    x, func = apart(3, 2, 2, 4, 5), torch.func

    def of(f):
        return [
            func.grad(cubed(f))(x[0]),
            func.jacrev(lambda x: f(x, 2))(x[0]),
            func.grad(lambda x: func.grad(cubed(f))(x).pow(2).sum())(x[0]),
            func.vmap(func.grad(lambda x: func.grad(cubed(f))(x).pow(2).sum()))(x),
            func.vmap(func.vmap(lambda x: f(x, 2)))(x),
        ]

    torch.testing.assert_close(of(FF.max_pool2d), of(F.max_pool2d))


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_autocast_keeps_the_dtype_of_the_input(each_backend, dtype):
    x = leaf(randn(2, 3, 7, 8, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = FF.max_pool2d(x, 3, 2)
    assert_bitwise(y.detach(), F.max_pool2d(x.detach(), 3, 2))


def test_retained_graph_and_checkpointing(each_backend):
    x = leaf(randn(2, 3, 9, 8))
    y = FF.max_pool2d(x, 3, 2)
    first = torch.autograd.grad(y, x, y.detach(), retain_graph=True)
    assert_bitwise(torch.autograd.grad(y, x, y.detach())[0], first[0])
    again = torch.utils.checkpoint.checkpoint(lambda x: FF.max_pool2d(x, 3, 2), x, use_reentrant=False)
    assert_bitwise(torch.autograd.grad(again, x, y.detach())[0], first[0])


def test_input_changed_in_place_before_backward_is_no_error(each_backend):
    """Only the places are kept: torch, which keeps the input, must refuse."""
    x = leaf(randn(2, 3, 9, 8))
    expected = F.max_pool2d(x, 3, 2)
    inner = x * 1
    y = FF.max_pool2d(inner, 3, 2)
    inner.zero_()
    dy = torch.ones_like(y)
    assert_bitwise(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": 2, "ceil_mode": True},
        {"kernel_size": 2, "return_indices": True},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (3, 9, 8)], ids=ident)
def test_layer_is_that_of_torch(each_backend, shape, kwargs):
    ours, theirs = fastcnn.nn.MaxPool2d(**kwargs), torch.nn.MaxPool2d(**kwargs)
    assert isinstance(ours, torch.nn.MaxPool2d)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = integers(*shape)
    for layer in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        y, expected = layer(x), theirs(x)
        if kwargs.get("return_indices"):
            assert_bitwise(y[1], expected[1])
            y, expected = y[0], expected[0]
        assert_bitwise(y, expected)


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_indices_suit_max_unpool2d(each_backend, format):
    x = leaf(in_format(apart(2, 3, 8, 6).float(), format))
    unpool = torch.nn.MaxUnpool2d(2)
    torch.use_deterministic_algorithms(False)  # for which torch has no MaxUnpool2d
    y = unpool(*fastcnn.nn.MaxPool2d(2, return_indices=True)(x))
    expected = unpool(*F.max_pool2d(x, 2, return_indices=True))
    assert_bitwise(y.detach(), expected.detach())
    assert_bitwise(gradients(y, (x,), x.detach())[0], gradients(expected, (x,), x.detach())[0])


# -- properties -------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    height, width = draw(st.integers(1, 10)), draw(st.integers(1, 20))
    kernel = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    stride = draw(st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    pool = PoolParams(kernel, stride, padding, draw(st.sampled_from([1, 1, 2, 3])), draw(st.booleans()))
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 20)), height, width]
    return draw(inputs(shape[draw(st.integers(0, 1)) :])), pool, draw(st.integers(1, 3))


@settings(max_examples=30)
@given(cases())
def test_any_input_agrees_with_torch(kernel, case):
    described, pool, levels = case
    x = described.tensor().mul(levels).round()
    try:
        F.max_pool2d(x, *pool.op_args())
    except RuntimeError:  # an empty output
        assume(False)
    assert_is_that_of_torch(x, pool)


# -- bad input --------------------------------------------------------------------------------------------------------


def refused(match, *args, **kwargs):
    """With exactly the type of exception that torch raises, and a message of ours."""
    with pytest.raises((TypeError, RuntimeError)) as theirs:
        F.max_pool2d(*args, **kwargs)
    with pytest.raises(theirs.type, match=match) as ours:
        FF.max_pool2d(*args, **kwargs)
    assert ours.type is theirs.type


@pytest.mark.parametrize("shape", [(), (4,), (4, 4), (2, 3, 4, 4, 4)], ids=ident)
def test_wrong_rank_raises_as_torch(each_backend, shape):
    refused("3D .*4D", torch.zeros(shape), 2)


@pytest.mark.parametrize("shape", [(2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (0, 4, 4), (3, 0, 4)], ids=ident)
def test_empty_maps_raise_as_torch(each_backend, shape):
    refused(r"only the batch allowed to be empty.*size \[", torch.zeros(shape), 2, 2, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("kernel_size", "stride", "dilation") for value in (0, -1, (2, 0), (-3, 2))]
    + [("padding", value) for value in (-1, (0, -1), 2, (1, 2), 10)],
    ids=ident,
)
def test_values_out_of_range_raise_as_torch(each_backend, name, value):
    for dtype in (torch.float32, torch.int64):
        refused(f"max_pool2d.*{name}", torch.zeros(1, 3, 9, 9, dtype=dtype), **{"kernel_size": 3, name: value})


@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [(1, 1, 1), "2", 1.5, (1.5, 1), (1, "1")], ids=repr)
def test_values_of_another_kind_raise_as_torch(each_backend, name, value):
    refused(name, torch.zeros(1, 3, 9, 9), **{"kernel_size": 3, name: value})


def test_kernel_size_none_or_empty_raises_as_torch(each_backend):
    refused("kernel_size", torch.zeros(1, 3, 9, 9), None)
    refused("kernel_size", torch.zeros(1, 3, 9, 9), ())


@pytest.mark.parametrize(
    ("shape", "pool"),
    [
        ((1, 3, 2, 5), {"kernel_size": 3}),
        ((3, 5, 2), {"kernel_size": 3}),
        ((0, 3, 2, 2), {"kernel_size": 3}),
        ((1, 3, 4, 4), {"kernel_size": 3, "dilation": 2}),
        ((1, 3, 4, 4), {"kernel_size": 9, "padding": 2, "stride": 1}),
    ],
    ids=str,
)
def test_empty_output_raises_as_torch(each_backend, shape, pool):
    refused(f"{shape[-2]}x{shape[-1]} gives an output of size", torch.zeros(shape), **pool)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.float8_e4m3fn], ids=ident)
def test_other_dtypes_raise_as_torch(each_backend, dtype):
    refused("not implemented for", torch.ones(1, 3, 4, 4).to(dtype), 2)


def test_sparse_input_raises_as_torch(each_backend):
    refused(r"layout torch\.strided, got torch\.sparse_coo", torch.ones(2, 3, 4, 4).to_sparse(), 2)


@pytest.mark.parametrize("x", [[1.0], None, 3.0], ids=ident)
def test_input_that_is_no_tensor_raises_as_torch(each_backend, x):
    refused(f"argument 'input' must be Tensor, not {type(x).__name__}", x, 2)
