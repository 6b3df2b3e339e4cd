"""Run the C++ kernels on tensors that lie against a page no one may touch: a script, since it dies where one does.

    python tests/guard_pages.py lrn | relu_lrn_max_pool2d | batch_norm_relu_max_pool2d | augment
        | winograd | change_format | direct_convolution | linear

Every input and output has a guard page directly before its first or directly after its last element, so a read or write
out of bounds ends the process with a segmentation fault; the last line printed names the case.
"""

import ctypes
import itertools
import mmap
import sys

import torch
from promises import DTYPES, FORMATS, ident, in_format, randn, tail_args

import fastcnn
from fastcnn import LRNParams, PoolParams
from fastcnn.ops import outputs
from fastcnn.ops.cpu import lrn
from fastcnn.optimize.inference import pack_panels
from fastcnn.params import AugmentParams, BatchNormParams, opmath

PAGE, PROT_NONE = mmap.PAGESIZE, 0
mprotect = ctypes.CDLL(None, use_errno=True).mprotect
mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


unguarded = outputs.empty_output


def guarded(x: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A dense tensor like ``x``, values and strides, directly before a guard page or directly after one."""
    size = max(x.numel(), 1) * x.element_size()
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + PAGE + pages):
        if mprotect(guard, PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    start = PAGE + (pages - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=x.dtype, count=max(x.numel(), 1), offset=start)
    return flat.as_strided(x.shape, x.stride()).copy_(x)


def guard_outputs(at_end: bool) -> None:
    def empty_output(*args: object) -> torch.Tensor:
        return guarded(unguarded(*args), at_end)

    lrn.empty_output = outputs.empty_output = empty_output


def run_lrn(x: torch.Tensor, dy: torch.Tensor, lrn: LRNParams) -> None:
    args = (lrn.size, lrn.alpha, lrn.beta, lrn.k, lrn.groups)
    torch.ops.fastcnn.lrn(x, *args)
    torch.ops.fastcnn.lrn_backward(dy, x, *args)


def run_tail(x: torch.Tensor, bias: torch.Tensor | None, at_end: bool, **tail: object) -> None:
    args = tail_args(**tail)
    y, argmax = torch.ops.fastcnn.relu_lrn_max_pool2d(x, bias, *args, tail["pool"] is not None)
    torch.ops.fastcnn.relu_lrn_max_pool2d(x, bias, *args, False)
    torch.ops.fastcnn.relu_lrn_max_pool2d_backward(guarded(y, at_end), x, bias, argmax, *args)


def run_norm(x: torch.Tensor, affine: torch.Tensor | None, at_end: bool, **norm: object) -> None:
    running = (affine, affine.abs()) if affine is not None and not norm["training"] else (None, None)
    args = BatchNormParams(**{**norm, "training": running[0] is None}).op_args()
    y, *kept = torch.ops.fastcnn.batch_norm_relu_max_pool2d(x, *running, affine, affine, *args, True)
    torch.ops.fastcnn.batch_norm_relu_max_pool2d(x, *running, affine, affine, *args, False)
    argmax, mean, var = kept
    backward = torch.ops.fastcnn.batch_norm_relu_max_pool2d_backward
    backward(guarded(y, at_end), x, mean, var, affine, affine, argmax, *args)


def run_winograd(at_end: bool) -> None:
    for c, k, (h, w), groups, window in itertools.product((16, 48), (16, 80), ((1, 1), (7, 4)), (1, 2), (3, 5)):
        print(f"{fastcnn.backends.cpu_capability()} 2x{c}x{h}x{w} {k=} {groups=} {window=} {at_end=}", flush=True)
        same = [window // 2] * 2
        x = guarded(in_format(randn(2, c * groups, h, w), torch.channels_last), at_end)
        weight, bias = (guarded(randn(k * groups, *rest), at_end) for rest in ((c, window, window), ()))
        y = guarded(in_format(torch.empty(2, k * groups, h, w), torch.channels_last), at_end)
        halved = guarded(in_format(torch.empty(2, k * groups, h // 2, w // 2), torch.channels_last), at_end)
        mask = guarded(torch.zeros(y.numel() // 8, dtype=torch.uint8), at_end)
        u = [guarded(torch.empty(groups * {3: 16, 5: 49}[window] * c * k), at_end) for _ in range(2)]
        for transformed, turned in zip(u, (False, True), strict=True):
            torch.ops.fastcnn_cpu.winograd_weight(weight, transformed, groups, turned)
        run = torch.ops.fastcnn_cpu.winograd
        run(x, None, u[0], bias, None, y, 0, mask, window, same, groups, True, False)
        run(x, None, u[0], None, None, halved, 0, None, window, same, groups, True, True)
        run(y, mask, u[1], None, None, guarded(x, at_end), 0, None, window, same, groups, False, False)
        more = guarded(in_format(torch.empty(2, k * groups + 5, h, w), torch.channels_last), at_end)
        run(x, None, u[0], bias, guarded(y, at_end), more, 5 if at_end else 0, None, window, same, groups, True, False)
        for parts, like in itertools.product((1, 2), (weight, weight.contiguous(memory_format=torch.channels_last))):
            dw, db = guarded(torch.stack([like] * parts), at_end), guarded(torch.empty(parts, k * groups), at_end)
            torch.ops.fastcnn_cpu.winograd_gradient(x, y, mask, dw, db, same, groups)
            torch.ops.fastcnn_cpu.winograd_gradient(x, y, None, dw, None, same, groups)


def run_change_format(at_end: bool) -> None:
    for c, (h, w) in itertools.product((1, 15, 16, 48, 129), ((1, 1), (3, 5), (4, 8), (13, 21))):
        print(f"{fastcnn.backends.cpu_capability()} 2x{c}x{h}x{w} {at_end=}", flush=True)
        x = randn(2, c, h, w)
        nchw, last = (guarded(in_format(x, format), at_end) for format in FORMATS)
        torch.ops.fastcnn_cpu.change_format(nchw, guarded(last, at_end), True)
        torch.ops.fastcnn_cpu.change_format(last, guarded(nchw, at_end), False)


def run_direct_convolution(at_end: bool) -> None:
    windows = ((1, 1), (1, 1), (0, 0), (1, 1)), ((3, 3), (1, 1), (1, 1), (1, 1)), ((2, 3), (2, 3), (0, 2), (1, 2))
    shapes = itertools.product((1, 16, 19), (1, 17, 80), ((5, 8), (3, 33)), (1, 2), windows)
    for c, k, (h, w), groups, (window, stride, padding, dilation) in shapes:
        where = f"2x{c * groups}x{h}x{w} {k=} {groups=} {window=} {stride=} {padding=} {dilation=} {at_end=}"
        print(fastcnn.backends.cpu_capability(), where, flush=True)
        x = guarded(in_format(randn(2, c * groups, h, w), torch.channels_last), at_end)
        weight, bias = randn(k * groups, c, *window), guarded(randn(k * groups), at_end)
        y = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
        addend = guarded(in_format(y, torch.channels_last), at_end)
        packed, y = guarded(pack_panels(weight, groups), at_end), guarded(addend, at_end)
        more = guarded(in_format(torch.empty(2, y.shape[1] + 5, *y.shape[2:]), torch.channels_last), at_end)
        args, run = (window, stride, padding, dilation, groups, True), torch.ops.fastcnn_cpu.direct_convolution
        run(x, packed, bias, addend, y, 0, k * groups, *args)
        run(x, packed, None, None, more, 5 if at_end else 0, k * groups, *args)


def run_linear(at_end: bool) -> None:
    for dtype, k, o, n in itertools.product(DTYPES, (1, 7, 16, 33), (1, 4, 7), (1, 4)):
        print(f"{fastcnn.backends.cpu_capability()} {n}x{k} {o} {ident(dtype)} {at_end=}", flush=True)
        x, weight, bias, y = (guarded(randn(*s, dtype=dtype), at_end) for s in ((n, k), (o, k), (o,), (n, o)))
        torch.ops.fastcnn_cpu.linear(x, weight, bias, y, True, 0.5)
    for k, o, n in itertools.product((16, 48, 272, 1040), (1, 4, 7, 130), (1, 6, 11, 65)):
        print(f"{fastcnn.backends.cpu_capability()} {n}x{k} {o} in training {at_end=}", flush=True)
        x, weight, bias, y = (guarded(randn(*s), at_end) for s in ((n, k), (o, k), (o,), (n, o)))
        torch.ops.fastcnn_cpu.linear_forward(x, weight, bias, y)
        torch.ops.fastcnn_cpu.linear_input_gradient(y, weight, guarded(x, at_end))
        torch.ops.fastcnn_cpu.linear_weight_gradient(y, x, guarded(weight, at_end))


def run_augment(at_end: bool) -> None:
    """Of each picture both the first and the last pixels, by crops of several widths."""
    unguarded = outputs.augmented
    outputs.augmented = lambda *args: guarded(unguarded(*args), at_end)
    widths, sizes = (1, 2, 3, 15, 16, 17, 33), (None, (5, 40), (9, 33), (3, 90))
    for cw, size, dtype, format in itertools.product(widths, sizes, DTYPES, FORMATS):
        print(f"{fastcnn.backends.cpu_capability()} {cw=} {size=} {ident(dtype)} {ident(format)} {at_end=}", flush=True)
        x = guarded(torch.randint(0, 256, (2, 5, 33, 3), dtype=torch.uint8), at_end)
        height, width = size or x.shape[1:3]
        last = torch.tensor([[0, 0], [height - 3, width - cw]])
        choices = last, torch.tensor([False, True]), torch.zeros(2, 3, dtype=opmath(dtype))
        choices = *choices, None if size is None else torch.tensor([size, size])
        dense = [None if t is None else guarded(t, at_end) for t in choices]
        params = AugmentParams((3, cw), dtype=dtype, memory_format=format).op_args()
        torch.ops.fastcnn.augment(x, *dense, *params)
        dense[1].logical_not_()
        torch.ops.fastcnn.augment(x, *dense, *params)
    outputs.augmented = unguarded


def main(op: str) -> None:
    alone = {
        "augment": run_augment,
        "winograd": run_winograd,
        "change_format": run_change_format,
        "direct_convolution": run_direct_convolution,
        "linear": run_linear,
    }
    if op in alone:
        for at_end in (True, False):
            alone[op](at_end)
        return
    lrns = [LRNParams(1), LRNParams(5, 0.5), LRNParams(4, 0.5, 0.6), LRNParams(40, groups=1)]
    pools = [PoolParams(3, 2), PoolParams(2), PoolParams(3, 2, 1, 1, True)]
    pools += [PoolParams((2, 3), 1, (1, 0)), PoolParams(3, 1, 1, 2)]
    n = 2
    for c, (h, w) in itertools.product((1, 3, 17, 32), ((7, 5), (5, 33), (40, 9))):
        for dtype, format, at_end in itertools.product(DTYPES, FORMATS, (True, False)):
            guard_outputs(at_end)
            x, dy = (guarded(in_format(randn(n, c, h, w, dtype=dtype, seed=seed), format), at_end) for seed in range(2))
            bias = guarded(randn(c, dtype=dtype), at_end)
            where = f"{fastcnn.backends._C.cpu_capability()} {n}x{c}x{h}x{w} {ident(dtype)} {ident(format)} {at_end=}"
            if op == "lrn":
                for lrn in lrns:
                    print(where, ident(lrn), flush=True)
                    run_lrn(x, dy, lrn)
                continue
            if op == "batch_norm_relu_max_pool2d":
                for training, pool in itertools.product((True, False), (None, *pools)):
                    print(where, training, ident(pool), flush=True)
                    run_norm(x, bias, at_end, training=training, pool=pool)
                    run_norm(x, None, at_end, training=training, relu_first=True, pool=pool)
                continue
            for lrn, pool in itertools.product((None, lrns[1]), (None, *pools)):
                print(where, ident(lrn), ident(pool), flush=True)
                run_tail(x, bias, at_end, lrn=lrn, pool=pool)
                run_tail(x, None, at_end, relu=False, lrn=lrn, pool=pool)


if __name__ == "__main__":
    with fastcnn.backends.use("cpu"):
        for capability in fastcnn.backends._C.cpu_capabilities():
            fastcnn.backends._C.set_cpu_capability(capability)
            main(sys.argv[1])
