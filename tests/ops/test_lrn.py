"""Every promise that lrn makes."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from promises import (
    DTYPES,
    FORMATS,
    NARROW,
    assert_bitwise,
    assert_same_answer,
    embedded,
    expected_strides,
    gradients,
    ident,
    in_format,
    inputs,
    leaf,
    randn,
    recorded_calls,
    saved_bytes,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import fastcnn
import fastcnn.functional as FF
from fastcnn import reference

ALEXNET = (5, 1e-4, 0.75, 2.0)
STRONG = (5, 0.5, 0.75, 1.0)  # the denominator matters as much as the numerator
LRN, LRN_BACKWARD = torch.ops.fastcnn.lrn.default, torch.ops.fastcnn.lrn_backward.default


def assert_lrn_keeps_same_answer(x, *lrn, dy=None, groups=1):
    """Forward and backward against the reference in float64, and the strides of the output."""
    x = leaf(x)
    dy = randn(*x.shape, dtype=x.dtype, seed=1) if dy is None else dy
    y = FF.local_response_norm(x, *lrn, groups=groups)
    (dx,) = gradients(y, (x,), dy)
    x64 = leaf(x, torch.float64)
    y64 = reference.local_response_norm(x64, *lrn, groups=groups)
    (dx64,) = gradients(y64, (x64,), dy.double())
    assert_same_answer(y.detach(), y64.detach())
    assert_same_answer(dx, dx64, backward=True)
    assert y.dtype == x.dtype
    assert y.stride() == expected_strides(x, x.shape)


# -- same answer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(2, 96, 7, 13), (1, 17, 5, 31), (3, 3, 9, 41), (2, 5, 33), (1, 6, 2, 3, 5)], ids=ident
)
@pytest.mark.parametrize("lrn", [ALEXNET, STRONG], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_same_answer_in_every_dtype(backend, dtype, format, lrn, shape):
    assert_lrn_keeps_same_answer(randn(*shape, dtype=dtype, format=format), *lrn)


@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.6, 2.0, 0.0, -0.5])
@pytest.mark.parametrize(("alpha", "k"), [(1e-4, 1.0), (1e-4, 2.0), (3.0, 1.0), (1e3, 2.0), (0.0, 2.0), (1.0, 0.0)])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_same_answer_for_every_parameter(backend, format, alpha, k, beta):
    for dtype in (torch.float32, torch.float64):
        assert_lrn_keeps_same_answer(randn(2, 17, 3, 9, dtype=dtype, format=format), 5, alpha, beta, k)


@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0, 0.6])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_same_answer_for_small_and_large_values(backend, scale, beta):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = scale * randn(2, 20, 5, 9, dtype=dtype)
        assert_lrn_keeps_same_answer(x, 5, 1e-4, beta, 2.0)


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_float16_squares_do_not_overflow(backend, format):
    assert_lrn_keeps_same_answer(randn(2, 20, 5, 9, format=format).mul(1e4).half(), 5, 1e-4, 0.75, 2.0)


@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize(("channels", "groups"), [(6, 2), (6, 3), (6, 6), (96, 2), (34, 2), (51, 3)])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_groups_do_not_see_each_other(backend, size, channels, groups, format):
    x = randn(2, channels, 3, 5, format=format)
    assert_lrn_keeps_same_answer(x, size, 0.5, groups=groups)
    parts = [FF.local_response_norm(part, size, 0.5) for part in x.chunk(groups, 1)]
    torch.testing.assert_close(FF.local_response_norm(x, size, 0.5, groups=groups), torch.cat(parts, 1))


# -- every size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 16, 17, 48, 96, 100])
@pytest.mark.parametrize("width", [1, 2, 7, 13, 15, 16, 17, 31, 55])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_every_channel_count_and_width(kernel, format, width, channels):
    assert_lrn_keeps_same_answer(randn(2, channels, 2, width, format=format), *STRONG)


@pytest.mark.parametrize(
    ("channels", "size"), [(c, size) for c in (1, 2, 3, 5, 16, 17) for size in (*range(1, c + 4), 1001, 2**40)]
)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_every_window_also_even_and_wider_than_the_channels(kernel, format, channels, size):
    x = randn(2, channels, 3, 7, format=format)
    assert_lrn_keeps_same_answer(x, size, 0.5 * min(size, 40), 0.75, 1.0)
    if size <= 40:
        torch.testing.assert_close(FF.local_response_norm(x, size, 0.5), F.local_response_norm(x, size, 0.5))


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize(
    "shape", [(3, 5, 1), (1, 17, 40), (2, 6, 3, 2, 5), (2, 1, 1, 1, 1), (1, 5, 2, 2, 1, 3)], ids=ident
)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_every_rank_from_three(backend, format, shape, size):
    x = randn(*shape, format=format)
    assert_lrn_keeps_same_answer(x, size, 0.5)
    torch.testing.assert_close(FF.local_response_norm(x, size, 0.5), F.local_response_norm(x, size, 0.5))


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("shape", [(5, 3, 3), (5, 0, 3), (5, 3, 0), (0, 4, 4), (1, 1, 1)], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_empty_batch_and_empty_maps(backend, format, shape, batch):
    assert_lrn_keeps_same_answer(randn(batch, *shape, format=format), *STRONG)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_more_than_2_to_the_31_elements(huge, format):
    if "cpu" not in fastcnn.backends.available():
        pytest.skip("takes minutes in plain PyTorch")
    x = huge(1, 64, 4096, 8200, format=format)
    y, dx = LRN(x, *STRONG, 1), LRN_BACKWARD(x, x, *STRONG, 1)
    pixels = x[0, 0].numel()
    for start in (0, pixels // 2, pixels - 100):

        def cut(t, start=start):
            flat = t.as_strided((1, 64, pixels), (t.stride(0), t.stride(1), t.stride(3)))
            return flat[..., start : start + 100].double()

        expected, expected_dx = (
            f(cut(x)) for f in (lambda x: LRN(x, *STRONG, 1), lambda x: LRN_BACKWARD(x, x, *STRONG, 1))
        )
        assert_same_answer(cut(y).bfloat16(), expected)
        assert_same_answer(cut(dx).bfloat16(), expected_dx, backward=True)


# -- memory formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (3, 2, 1, 0), (1, 0, 2, 3), (0, 2, 3, 1), (2, 0, 3, 1)], ids=ident)
@pytest.mark.parametrize("steps", [(1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 2), (2, 1, 3, 1)], ids=ident)
def test_any_strides(backend, order, steps):
    assert_lrn_keeps_same_answer(embedded(randn(2, 6, 5, 7), order, steps), *STRONG)


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=ident)
def test_misaligned_memory(backend, order, offset, dtype):
    assert_lrn_keeps_same_answer(embedded(randn(2, 17, 5, 7, dtype=dtype), order, offset=offset), *STRONG)


@pytest.mark.parametrize("dim", range(4))
def test_expanded_input(backend, dim):
    shape = [2, 6, 5, 7]
    one = [*shape]
    one[dim] = 1
    assert_lrn_keeps_same_answer(randn(*one).expand(shape), *STRONG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_gradient_in_any_memory_format(backend, format, dtype):
    x, dy = randn(2, 17, 5, 7, dtype=dtype, format=format), randn(2, 17, 5, 7, dtype=dtype, seed=1)
    others = [
        dy.contiguous(),
        in_format(dy, torch.channels_last),
        embedded(dy, (3, 0, 2, 1)),
        embedded(dy, steps=(1, 1, 1, 2)),
        embedded(dy, offset=1),
    ]
    for other in others:
        assert_lrn_keeps_same_answer(x, *STRONG, dy=other)
    assert_lrn_keeps_same_answer(x, *STRONG, dy=dy[0, 0, 0, 0].expand(dy.shape))  # as sum().backward() makes it


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (0, 3, 4, 5), (2, 3, 4, 5, 6), (2, 3, 4)], ids=ident
)
def test_output_strides_are_channels_last_only_for_channels_last(backend, shape):
    plain = randn(*shape)
    others = in_format(plain, torch.channels_last), embedded(plain, [*range(plain.dim())][::-1]), plain[:, ::2]
    for x in (plain, *others):
        strides = expected_strides(x, x.shape)
        assert LRN(x, *STRONG, 1).stride() == strides
        assert LRN_BACKWARD(x, x, *STRONG, 1).stride() == strides
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x)
            assert LRN(fake, *STRONG, 1).stride() == strides
            assert LRN_BACKWARD(fake, fake, *STRONG, 1).stride() == strides


def test_output_is_fresh_memory_even_where_values_do_not_change(backend):
    x = randn(1, 2, 3, 4)
    y = FF.local_response_norm(x, 1, 0.0, 0.75, 1.0)
    assert_bitwise(y, x)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.skipif(sys.platform != "linux", reason="needs mmap with guard pages")
@pytest.mark.skipif("cpu" not in fastcnn.backends.available(), reason="C++ kernels are not built")
def test_no_kernel_reads_or_writes_out_of_bounds():
    """Every tensor lies against a page that must not be touched, in a process of its own."""
    script = Path(__file__).parents[1] / "guard_pages.py"
    run = subprocess.run([sys.executable, script, "lrn"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-2000:]


@pytest.mark.skipif("cpu" not in fastcnn.backends.available(), reason="C++ kernels are not built")
def test_ops_called_directly_refuse_tensors_that_do_not_fit():
    """The ops are public too, and what a kernel would read out of bounds they must not let through."""
    x = randn(2, 8, 9, 9)
    for dy in (x[:1, :1, :1, :1], x.half()):
        with fastcnn.backends.use("cpu"), pytest.raises((RuntimeError, ValueError, TypeError)):
            LRN_BACKWARD(dy, x, *STRONG, 1)


# -- NaN and inf ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0, 0.6])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e20])
def test_non_finite_values_like_torch(backend, value, beta, format, dtype):
    x = randn(2, 20, 3, 5, dtype=dtype, format=format)
    x[0, 0, 0, 0] = x[0, 7, 1, 1] = x[1, 19, 2, 4] = value
    ours, theirs = FF.local_response_norm(x, 5, 0.5, beta, 1.0), F.local_response_norm(x, 5, 0.5, beta, 1.0)
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_zeros_with_k_zero_give_nan_like_torch(backend, format):
    x = randn(1, 20, 3, 5, format=format)
    x[:, :, 1] = 0
    ours, theirs = FF.local_response_norm(x, 5, 0.5, 0.75, 0.0), F.local_response_norm(x, 5, 0.5, 0.75, 0.0)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_nan_gradient_stays_in_its_windows_like_torch(backend, format):
    x, dy = leaf(randn(2, 20, 3, 5, format=format)), randn(2, 20, 3, 5, seed=1)
    dy[0, 0, 0, 0] = dy[1, 10, 1, 1] = float("nan")
    for size in (1, 4, 5, 60):
        (ours,) = gradients(FF.local_response_norm(x, size, 0.5), (x,), dy)
        (theirs,) = gradients(F.local_response_norm(x, size, 0.5), (x,), dy)
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("value", [1e20, float("inf"), float("nan")])
def test_one_huge_value_does_not_spoil_its_neighbours(backend, value, size, format, dtype):
    """Neither forward nor backward, neither as input nor as gradient: outside of its windows not one bit changes."""
    channels, (before, after) = 36, (size // 2, (size - 1) // 2)
    x, dy = randn(2, channels, 3, 18, dtype=dtype, format=format), randn(2, channels, 3, 18, dtype=dtype, seed=1)
    lrn = (size, 0.5, 0.75, 1.0, 1)
    y, dx = LRN(x, *lrn), LRN_BACKWARD(dy, x, *lrn)
    for c, h, w in [(0, 0, 0), (13, 1, 7), (17, 2, 17), (35, 1, 16)]:
        spoilt_x, spoilt_dy = x.clone(), dy.clone()
        spoilt_x[1, c, h, w] = spoilt_dy[1, c, h, w] = value

        def spared(t, first, last, at=(c, h, w)):
            t = t.clone()
            t[1, max(at[0] - first, 0) : at[0] + last + 1, at[1], at[2]] = 0
            return t

        # channel d sees the values of d - before ... d + after, its gradient those of all the windows that hold d
        assert_bitwise(spared(LRN(spoilt_x, *lrn), after, before), spared(y, after, before))
        assert_bitwise(spared(LRN_BACKWARD(dy, spoilt_x, *lrn), size - 1, size - 1), spared(dx, size - 1, size - 1))
        assert_bitwise(spared(LRN_BACKWARD(spoilt_dy, x, *lrn), before, after), spared(dx, before, after))


@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("value", [1e20, float("inf"), float("nan")])
def test_one_spoilt_group_leaves_the_other_as_it_is(backend, value, format):
    lrn = (9, 0.5, 0.75, 1.0, 2)
    x, dy = randn(2, 38, 3, 5, format=format), randn(2, 38, 3, 5, seed=1)
    spoilt_x, spoilt_dy = x.clone(), dy.clone()
    spoilt_x[:, :19] = spoilt_dy[:, :19] = value
    assert_bitwise(LRN(spoilt_x, *lrn)[:, 19:], LRN(x, *lrn)[:, 19:])
    assert_bitwise(LRN_BACKWARD(spoilt_dy, spoilt_x, *lrn)[:, 19:], LRN_BACKWARD(dy, x, *lrn)[:, 19:])


# -- deterministic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("beta", [0.75, 0.6])
@pytest.mark.parametrize("shape", [(1, 96, 27, 27), (7, 17, 31, 31), (2, 5, 13, 999)], ids=ident)
def test_same_bits_in_every_run_and_for_every_number_of_threads(kernel, shape, beta, format, threads):
    x, dy = randn(*shape, format=format), randn(*shape, seed=1)
    lrn = (5, 1e-4, beta, 2.0, 1)
    threads(2)
    y, dx = LRN(x, *lrn), LRN_BACKWARD(dy, x, *lrn)
    # torch's own power, in the reference, differs by where each thread's part ends
    for count in (2, 2) if kernel == "reference" else (2, 1, 3):
        threads(count)
        assert_bitwise(LRN(x, *lrn), y)
        assert_bitwise(LRN_BACKWARD(dy, x, *lrn), dx)


def test_many_python_threads_at_once(backend):
    inputs = [randn(2, 17, 9, 11 + seed, seed=seed) for seed in range(8)]

    def run(x):
        x = leaf(x)
        y = FF.local_response_norm(x, *STRONG)
        y.backward(y.detach())
        return y.detach(), x.grad

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, inputs * 4))
    for (y, dx), x in zip(together, inputs * 4, strict=True):
        expected_y, expected_dx = run(x)
        assert_bitwise(y, expected_y)
        assert_bitwise(dx, expected_dx)


# -- little memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_backward_keeps_nothing_but_the_input(backend, dtype):
    x = leaf(randn(2, 17, 5, 7, dtype=dtype))
    with saved_bytes() as kept:
        FF.local_response_norm(x, *STRONG)
    assert kept["bytes"] == x.untyped_storage().nbytes()


def test_nothing_is_kept_without_gradient(backend):
    x = randn(2, 17, 5, 7)
    with saved_bytes() as kept:
        assert not FF.local_response_norm(x, *STRONG).requires_grad
        with torch.no_grad():
            assert not FF.local_response_norm(leaf(x), *STRONG).requires_grad
        with torch.inference_mode():
            FF.local_response_norm(x, *STRONG)
    assert kept["bytes"] == 0


def test_a_call_is_one_op(backend):
    x = leaf(randn(2, 17, 5, 7))
    with recorded_calls() as calls:
        FF.local_response_norm(x, *STRONG).sum().backward()
    assert [name for name, _ in calls] == ["fastcnn.lrn.default", "fastcnn.lrn_backward.default"]


# -- composes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_opcheck(each_backend, dtype, format):
    x, dy = randn(2, 5, 3, 4, dtype=dtype, format=format), randn(2, 5, 3, 4, dtype=dtype, seed=1)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype in NARROW else {}
    torch.library.opcheck(LRN, (leaf(x), *STRONG, 1), **tolerance)
    torch.library.opcheck(LRN_BACKWARD, (dy, x, *STRONG, 1), **tolerance)
    if dtype == torch.float64:
        torch.library.opcheck(LRN_BACKWARD, (leaf(dy), leaf(x), *STRONG, 1))


@pytest.mark.parametrize("shape", [(2, 4, 2, 2), (1, 6, 3), (0, 2, 2), (1, 2, 1, 2, 2)], ids=ident)
@pytest.mark.parametrize(("size", "groups"), [(1, 1), (2, 2), (3, 1), (4, 1), (9, 2)])
def test_gradcheck_and_gradgradcheck(each_backend, shape, size, groups):
    for format in FORMATS:
        x = leaf(randn(*shape, dtype=torch.float64, format=format))

        def lrn(x):
            return FF.local_response_norm(x, size, 0.5, 0.75, 1.0, groups=groups)

        torch.autograd.gradcheck(lrn, (x,), check_batched_grad=x.numel() > 0)
        torch.autograd.gradgradcheck(lrn, (x,), check_batched_grad=x.numel() > 0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_compile_without_graph_break(each_backend, format, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = fastcnn.nn.LocalResponseNorm(*STRONG, groups=2)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    compilations = []
    for batch, width in [(2, 5), (3, 7), (4, 9)]:
        x, dy = leaf(randn(batch, 6, 4, width, format=format)), randn(batch, 6, 4, width, seed=1)
        y, expected = compiled(x), layer(x)
        assert_bitwise(y.detach(), expected.detach())
        assert y.stride() == expected.stride()
        assert_bitwise(gradients(y, (x,), dy)[0], gradients(expected, (x,), dy)[0])
        with torch.no_grad():
            assert_bitwise(compiled(x), expected.detach())
        compilations.append(counter.frame_count)
    if dynamic:
        assert compilations[0] == compilations[-1]  # other sizes run what was compiled for the first


@pytest.mark.slow
def test_compile_with_inductor(best_backend):
    torch._dynamo.reset()

    def stage(x):
        return FF.local_response_norm(x.relu() + 1, *STRONG) * 2

    x, dy = leaf(randn(2, 6, 4, 5, format=torch.channels_last)), randn(2, 6, 4, 5, seed=1)
    y, expected = torch.compile(stage, fullgraph=True)(x), stage(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, (x,), dy), gradients(expected, (x,), dy))


@pytest.mark.parametrize("asked", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export_with_gradients(each_backend, strict, asked):
    """Also where no gradient was asked for when the program was exported."""
    layer = fastcnn.nn.LocalResponseNorm(*STRONG)
    example = randn(2, 6, 4, 5).requires_grad_(asked)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(layer, (example,), dynamic_shapes=(batch,), strict=strict).module()
    for n in (2, 3):
        x, dy = leaf(randn(n, 6, 4, 5, seed=2)), randn(n, 6, 4, 5, seed=1)
        y, expected = exported(x), layer(x)
        assert_bitwise(y.detach(), expected.detach())
        assert_bitwise(gradients(y, (x,), dy)[0], gradients(expected, (x,), dy)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_autocast_keeps_the_dtype_of_the_input(each_backend, dtype):
    x = leaf(randn(2, 6, 4, 5, dtype=dtype))
    expected = FF.local_response_norm(x, *STRONG)
    with torch.autocast("cpu", torch.bfloat16):
        y = FF.local_response_norm(x, *STRONG)
        (dx,) = gradients(y, (x,), y.detach())
    assert y.dtype == dtype
    assert_bitwise(y.detach(), expected.detach())
    assert_bitwise(dx, gradients(expected, (x,), expected.detach())[0])


@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
@pytest.mark.parametrize("out_dim", [0, 2])
def test_vmap(each_backend, in_dim, out_dim):
    x = randn(3, 2, 6, 4, 5).movedim(0, in_dim)
    y = torch.func.vmap(lambda x: FF.local_response_norm(x, *STRONG), in_dim, out_dim)(x)
    expected = [FF.local_response_norm(part, *STRONG) for part in x.unbind(in_dim)]
    torch.testing.assert_close(y, torch.stack(expected, out_dim))


@pytest.mark.parametrize("in_dims", [(0, 0), (None, 0), (0, None), (1, -1)], ids=ident)
def test_vmap_of_backward(each_backend, in_dims):
    parts = {
        "x": [randn(2, 6, 4, 5, seed=s) for s in range(3)],
        "dy": [randn(2, 6, 4, 5, seed=9 + s) for s in range(3)],
    }
    args = [p[0] if d is None else torch.stack(p, d) for p, d in zip(parts.values(), in_dims, strict=True)]

    def vjp(x, dy):
        return torch.func.vjp(lambda x: FF.local_response_norm(x, *STRONG), x)[1](dy)[0]

    expected = [
        vjp(*(p[0 if d is None else i] for p, d in zip(parts.values(), in_dims, strict=True))) for i in range(3)
    ]
    torch.testing.assert_close(torch.func.vmap(vjp, in_dims)(*args), torch.stack(expected))


def test_func_transforms_nest(each_backend):
    x = randn(3, 2, 6, 4, dtype=torch.float64)

    def of(lrn):
        def loss(x):
            return (lrn(x, *STRONG) ** 3).sum()

        func = torch.func
        return [
            func.vmap(func.grad(loss))(x),
            func.grad(lambda x: func.grad(loss)(x).pow(2).sum())(x),
            func.vmap(func.grad(lambda x: func.grad(loss)(x).pow(2).sum()))(x),
            func.vmap(func.vmap(lambda x: lrn(x[None], *STRONG)))(x),
            func.jacrev(lambda x: lrn(x, *STRONG))(x[:1]),
        ]

    torch.testing.assert_close(of(FF.local_response_norm), of(F.local_response_norm))


def test_double_backward_is_that_of_torch(each_backend):
    x, dy, cotangent = (randn(2, 6, 3, 2, dtype=torch.float64, seed=seed) for seed in range(3))

    def twice(op):
        inputs = leaf(x), leaf(dy)
        (dx,) = torch.autograd.grad(op(inputs[0], *STRONG), inputs[0], inputs[1], create_graph=True)
        return gradients(dx, inputs, cotangent)

    for ours, theirs in zip(twice(FF.local_response_norm), twice(F.local_response_norm), strict=True):
        assert_same_answer(ours, theirs, backward=True)


def test_checkpointing_and_retained_graphs(each_backend):
    x, dy = leaf(randn(2, 6, 3, 2)), randn(2, 6, 3, 2, seed=1)
    y = FF.local_response_norm(x, *STRONG)
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, dy)
    again = torch.utils.checkpoint.checkpoint(lambda x: FF.local_response_norm(x, *STRONG), x, use_reentrant=False)
    assert_bitwise(second, first)
    assert_bitwise(gradients(again, (x,), dy)[0], first)


def test_input_changed_in_place_before_backward_is_an_error(each_backend):
    x = leaf(randn(2, 6, 3, 2)) * 1
    y = FF.local_response_norm(x, *STRONG)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_meta_tensors_have_shape_and_strides():
    x = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
    y = FF.local_response_norm(x, 5)
    assert y.device.type == "meta"
    assert y.stride() == x.stride()


def test_layer_survives_pickling_and_deepcopy(each_backend):
    layer = fastcnn.nn.LocalResponseNorm(*STRONG, groups=2)
    x = randn(1, 4, 3, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_bitwise(twin(x), layer(x))


# -- properties -------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    """An input of any rank and size, and LRN parameters that suit it."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 20))
    rank = draw(st.sampled_from([4, 4, 4, 3, 5]))
    spatial = [draw(st.integers(1, 20)), *(draw(st.integers(1, 4)) for _ in range(rank - 3))]
    x = draw(inputs([draw(st.integers(0, 3)), channels, *draw(st.permutations(spatial))]))
    beta = draw(st.sampled_from([0.75, 0.5, 1.0, 0.6, 2.0]))
    lrn = (draw(st.integers(1, channels + 3)), draw(st.floats(0, 0.5)), beta, draw(st.sampled_from([1.0, 2.0])))
    return x, lrn, groups


@given(cases())
def test_any_input_gets_the_same_answer(backend, case):
    x, lrn, groups = case
    assert_lrn_keeps_same_answer(x.tensor(), *lrn, groups=groups)


@given(cases())
def test_any_input_agrees_with_torch(backend, case):
    described, lrn, _ = case
    x = described.tensor()
    expected = F.local_response_norm(x.double().contiguous(), *lrn).to(x.dtype)
    torch.testing.assert_close(FF.local_response_norm(x, *lrn), expected)


# -- bad input --------------------------------------------------------------------------------------------------------


def refused_by_both(error, match, *args, **kwargs):
    with pytest.raises(error):
        F.local_response_norm(*args, **kwargs)
    with pytest.raises(error, match=match):
        FF.local_response_norm(*args, **kwargs)


@pytest.mark.parametrize("shape", [(3, 4), (3,), ()], ids=ident)
def test_wrong_rank_raises_as_torch(each_backend, shape):
    refused_by_both(ValueError, rf"3D or higher.*\(got {len(shape)} dimensions\)", torch.zeros(shape), 3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn], ids=ident)
def test_other_dtypes_raise_as_torch(each_backend, dtype):
    refused_by_both(NotImplementedError, rf"{dtype}.*allowed are float16", torch.ones(2, 3, 4, 4).to(dtype), 3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=ident)
def test_integers_raise(each_backend, dtype):
    with pytest.raises(NotImplementedError, match=rf"input of dtype {dtype}; allowed are float16"):
        FF.local_response_norm(torch.ones(2, 3, 4, 4, dtype=dtype), 3)


def test_sparse_input_raises(each_backend):
    with pytest.raises(NotImplementedError, match=r"layout torch\.strided, got torch\.sparse_coo"):
        FF.local_response_norm(torch.ones(2, 3, 4).to_sparse(), 3)


@pytest.mark.parametrize("x", [[1.0], None, 3.0], ids=ident)
def test_input_that_is_no_tensor_raises(each_backend, x):
    with pytest.raises(TypeError, match=rf"argument 'input' must be Tensor, not {type(x).__name__}"):
        FF.local_response_norm(x, 3)


@pytest.mark.parametrize("size", [0, -1, -5])
def test_size_that_is_not_positive_raises_as_torch(each_backend, size):
    refused_by_both(RuntimeError, f"size must be greater than zero, but got size={size}", torch.zeros(1, 3, 4, 4), size)


@pytest.mark.parametrize("size", [2.0, None, "3", True], ids=ident)
def test_size_that_is_no_int_raises_as_torch(each_backend, size):
    match = f"argument 'size' must be int, not {type(size).__name__}"
    refused_by_both(TypeError, match, torch.zeros(1, 3, 4, 4), size)


@pytest.mark.parametrize("name", ["alpha", "beta", "k"])
@pytest.mark.parametrize("value", ["1", None], ids=ident)
def test_parameter_that_is_no_number_raises_as_torch(each_backend, name, value):
    match = f"argument '{name}' must be a number, not {type(value).__name__}"
    refused_by_both(TypeError, match, torch.zeros(1, 3, 4, 4), 3, **{name: value})


@pytest.mark.parametrize("groups", [0, -1, 2, 4])
def test_groups_that_do_not_divide_the_channels_raise(each_backend, groups):
    with pytest.raises(ValueError, match=f"groups=?.*got groups={groups}"):
        FF.local_response_norm(torch.zeros(1, 3, 4, 4), 3, groups=groups)


def test_groups_must_be_named(each_backend):
    with pytest.raises(TypeError):
        FF.local_response_norm(torch.zeros(1, 4, 4, 4), 3, 1e-4, 0.75, 1.0, 2)
