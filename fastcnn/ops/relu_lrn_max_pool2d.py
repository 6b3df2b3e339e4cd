"""The tail of an AlexNet stage in one pass: ``max_pool2d(lrn(relu(x + bias)))``, any part of which may be absent."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..params import LRNParams, PoolParams, check_bias, check_input, opmath, pooled_size
from . import lrn as single_lrn
from . import max_pool2d as single_pool
from ._layout import dense, empty_output, is_channels_last, kept, output, output_format
from ._operator import define, double_backward, fold_batch, needs_grad, unfold_batch
from ._triton import acc_dtype, capability, cdiv, check_same, index_dtype, kernels, launch, processors
from .lrn import local_response_norm
from .max_pool2d import empty_argmax, max_pool2d


def relu_lrn_max_pool2d(
    input: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = True,
    lrn: LRNParams | None = None,
    pool: PoolParams | None = None,
) -> Tensor:
    """The tail of an AlexNet stage, ``max_pool2d(local_response_norm(relu(input + bias)))``, in one pass over memory.

    Only the pooled map is written and, where a gradient will be asked for, one byte an output for the place of its
    maximum; backward recomputes the rest from the input.

    Args:
        input: the convolution's output, shape (N, C, H, W); float16, bfloat16, float32 or float64, contiguous or
            channels_last (others are copied first). Of any other rank the single operators run one after the other.
        bias: one value a channel, shape (C,); the input's dtype, or float32 beside 16-bit input. None: no bias.
        relu: whether to rectify.
        lrn: the normalization, None for none.
        pool: the pooling, None for none.

    Returns:
        Tensor of shape (N, C, OH, OW), or the input's shape without ``pool``; dtype and memory format as the input.
        16-bit input is computed in float32 and rounded once, at the end. With every part absent, a copy.

    Raises:
        TypeError: an argument is of the wrong type.
        NotImplementedError: ``input`` is not of a supported dtype or layout.
        RuntimeError: ``bias`` does not match ``input``, or nothing is left of the map after pooling.
        ValueError: ``lrn.groups`` does not divide C.

    Source: Krizhevsky et al. (2012), 3.1, 3.3 and 3.4; the order is Caffe's ``bvlc_alexnet``.
    """
    op = "relu_lrn_max_pool2d"
    check_input(op, input)
    for name, value, kind in (("lrn", lrn, LRNParams), ("pool", pool, PoolParams)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{op}(): argument '{name}' must be {kind.__name__} or None, not {type(value).__name__}")
    if input.dim() != 4:
        return _composition(input, bias, relu, lrn, pool)
    check_bias(op, bias, input)
    if lrn is not None:
        lrn.check_shape(input.shape)
    if pool is not None:
        if 0 in input.shape[1:]:
            raise RuntimeError(
                f"{op}(): expected an input with non-zero channels, height and width, but got size {list(input.shape)}"
            )
        pool.output_size(input.shape[2], input.shape[3])
    lrn_args = (0, 0.0, 0.0, 0.0, 1) if lrn is None else lrn.op_args()
    pool_args = ([], [], [], [], False) if pool is None else pool.op_args()
    with_argmax = pool is not None and needs_grad(input, bias)
    return tail(input, bias, relu, *lrn_args, *pool_args, with_argmax)[0]


def _composition(x: Tensor, bias: Tensor | None, relu: bool, lrn: LRNParams | None, pool: PoolParams | None) -> Tensor:
    if x.dim() < 2 and (bias is not None or lrn is not None):
        raise ValueError(f"relu_lrn_max_pool2d(): expected an input with channels (got {x.dim()} dimensions)")
    check_bias("relu_lrn_max_pool2d", bias, x)
    y = reference.rectified(x, bias, relu)
    if lrn is not None:
        y = local_response_norm(y, lrn.size, lrn.alpha, lrn.beta, lrn.k, groups=lrn.groups)
    if pool is not None:
        y = max_pool2d(y, *pool.op_args())
    return y.to(x.dtype, copy=y is x)


# Below, an absent part is size=0 (LRN) or an empty kernel_size (pool), and `tail` stands for the arguments
# relu, size, alpha, beta, k, groups, kernel_size, stride, padding, dilation, ceil_mode of both ops.


def _params(tail: tuple[Any, ...]) -> tuple[bool, LRNParams | None, PoolParams | None]:
    relu, lrn, pool = tail[0], tail[1:6], tail[6:11]
    return relu, LRNParams(*lrn) if lrn[0] else None, PoolParams(*pool) if pool[0] else None


def _empty_outputs(x: Tensor, *tail: Any, with_argmax: bool) -> tuple[Tensor, Tensor]:
    kernel_size = tail[6]
    shape = list(x.shape)
    if kernel_size:
        shape[2:] = pooled_size(shape[2:], *tail[6:11])
    argmax = empty_argmax(x, shape, kernel_size) if with_argmax and kernel_size else x.new_empty(0, dtype=torch.uint8)
    return empty_output(x, shape), argmax


def _fake(x: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(x, *args[:-1], with_argmax=args[-1])


def _reference(x: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    *tail, with_argmax = args
    relu, lrn, pool = _params(tuple(tail))
    format = output_format(x)
    if pool is None or not with_argmax:
        y = reference.relu_lrn_max_pool2d(x, bias, relu=relu, lrn=lrn, pool=pool)
        return output(y, format), x.new_empty(0, dtype=torch.uint8)
    wide = x.to(opmath(x.dtype))
    y, argmax = reference.window_offsets(
        reference.relu_lrn_max_pool2d(wide, None if bias is None else bias.to(wide.dtype), relu=relu, lrn=lrn), pool
    )
    dtype = empty_argmax(x, [0] * 4, tail[6]).dtype
    return output(y.to(x.dtype), format), output(argmax.to(dtype), format)


def _wide_bias(bias: Tensor | None, x: Tensor) -> Tensor | None:
    check_bias("relu_lrn_max_pool2d", bias, x)
    return None if bias is None else bias.to(opmath(x.dtype)).contiguous()


def _triton_bias(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """In the dtype of ``x`` if it has that, so that the kernels rectify two 16-bit elements at once; else wide."""
    if bias is None or bias.dtype != x.dtype:
        return _wide_bias(bias, x)
    check_bias("relu_lrn_max_pool2d", bias, x)
    return bias.contiguous()


def _compiled(library: str, x: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    *tail, with_argmax = args
    format = output_format(x)
    y, argmax = _empty_outputs(x, *tail, with_argmax=with_argmax)
    y = kept(y, lasting=with_argmax)
    getattr(torch.ops, library).relu_lrn_max_pool2d(
        dense(x, format),
        _wide_bias(bias, x),
        y,
        argmax if argmax.numel() else None,
        is_channels_last(x),
        *tail,
    )
    return y, argmax


def _backward_fake(dy: Tensor, x: Tensor, bias: Tensor | None, argmax: Tensor, *tail: Any) -> tuple[Tensor, Tensor]:
    return empty_output(x), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _backward_reference(
    dy: Tensor, x: Tensor, bias: Tensor | None, argmax: Tensor, *tail: Any
) -> tuple[Tensor, Tensor]:
    relu, lrn, pool = _params(tail)
    wide = opmath(x.dtype)
    z = reference.rectified(x.to(wide), bias, relu)
    dz = dy.to(wide)
    if pool is not None:
        dz = reference.max_pool2d_backward(dz, argmax, (x.shape[2], x.shape[3]), pool)
    if lrn is not None:
        dz = reference.lrn_backward(dz, z, lrn)
    if relu:
        dz = dz.masked_fill(z <= 0, 0)
    dbias = x.new_empty(0) if bias is None else dz.sum((0, 2, 3)).to(bias.dtype)
    return output(dz.to(x.dtype, copy=dz is dy), output_format(x)), dbias


def _backward_compiled(
    library: str, dy: Tensor, x: Tensor, bias: Tensor | None, argmax: Tensor, *tail: Any
) -> tuple[Tensor, Tensor]:
    format = output_format(x)
    dx = kept(empty_output(x))
    wide_bias = _wide_bias(bias, x)
    dbias = x.new_empty(0) if wide_bias is None else torch.empty_like(wide_bias)
    getattr(torch.ops, library).relu_lrn_max_pool2d_backward(
        dense(dy, format),
        dense(x, format),
        wide_bias,
        dense(argmax, format) if tail[6] else None,
        dx,
        None if bias is None else dbias,
        is_channels_last(x),
        *tail,
    )
    return dx, dbias if bias is None else dbias.to(bias.dtype)


# Of the Triton kernels: lanes in a program, warps that they are spread over, and about how many channels a lane owns;
# forward also, how many neighbouring outputs where their windows overlap, in channels_last, and how many programs a
# multiprocessor runs. For 16-bit tensors in channels_last the second is for sm_90, and the third, of fewer registers,
# from sm_100 on; the first is for all others, and the rest are what a GPU test checks too.
FORWARD_CONFIGS = [(128, 4, 12, 1, 3), (128, 4, 8, 3, 3), (128, 4, 8, 2, 3), (128, 4, 16, 2, 2), (64, 2, 8, 4, 4)]
BACKWARD_CONFIGS = [(128, 4, 8), (128, 4, 24), (128, 4, 16), (64, 2, 16)]


def _config(x: Tensor) -> int:
    """Index of the configuration for ``x``."""
    if not is_channels_last(x) or x.element_size() != 2:
        return 0
    return sum(capability(x) >= least for least in ((9, 0), (10, 0)))  # see kernels/packed.py


def _constants(x: Tensor, tail: Any, most: int) -> dict[str, Any] | None:
    """What both Triton kernels take; None where a window is too large to unroll. ``most`` is that of ``lrn.share``."""
    relu, lrn, pool = tail[0], tail[1:6], tail[6:11]
    channels = x.shape[1]
    window = single_lrn.triton_window(channels, *(lrn if lrn[0] else (1, 0.0, 0.0, 1.0, 1)))
    pooling = single_pool.triton_pool(pool if pool[0] else ([1, 1], [1, 1], [0, 0], [1, 1], False))
    if not single_lrn.is_near(window) or not single_pool.is_near(pooling):
        return None
    channels_last = is_channels_last(x)
    v, width = single_lrn.share(x, window["CHANNELS"], most)
    return {
        "C": channels,
        "RELU": relu,
        "LRN": lrn[0] > 0,
        "CHANNELS_LAST": channels_last,
        "V": v,
        "VECTOR": width,
        "ACC": acc_dtype(x.dtype),
        **window,
        **pooling,
    }


def _registers(lanes: int) -> int:
    """Per lane, for a multiprocessor to run so many at once. Left alone, ptxas uses more, or spills to use fewer."""
    return min(255, 65536 // lanes // 8 * 8)


def triton(
    x: Tensor, bias: Tensor | None, *args: Any, config: tuple[int, int, int, int, int] | None = None
) -> tuple[Tensor, Tensor]:
    *tail, with_argmax = args
    bias = _triton_bias(bias, x)
    y, argmax = _empty_outputs(x, *tail, with_argmax=with_argmax)
    if y.numel() == 0:
        return y, argmax
    block, num_warps, most, r, programs = config or FORWARD_CONFIGS[_config(x)]
    constants = _constants(x, tail, most)
    if constants is None:
        return _triton_in_steps(x, bias, *args)
    (h, w), (oh, ow) = x.shape[2:], y.shape[2:]
    channels, kw, sw, dw = (constants[name] for name in ("CHANNELS", "KW", "SW", "DW"))
    exchanged = not is_channels_last(x) and kw == sw + 1 and dw == 1
    if exchanged or kw <= sw or dw > 1 or ow < r:
        r = 1
    columns = ow + 1 if exchanged else cdiv(ow, r)
    lanes = x.shape[0] * x.shape[1] // channels * cdiv(channels, constants["V"]) * columns
    blocks = cdiv(lanes, block // 32 * 31 if exchanged else block)
    rows = blocks * oh
    run = cdiv(rows, programs * processors(x.device))
    launch(
        kernels("relu_lrn_max_pool2d").forward,
        cdiv(rows, run),
        *(dense(x, output_format(x)), x if bias is None else bias, y, argmax, x.shape[0], h, w, oh, ow, rows, run),
        PADDED=not single_pool.is_inside(constants, (h, w), (oh, ow)),
        WITH_BIAS=bias is not None,
        WITH_ARGMAX=argmax.numel() > 0,
        R=r,
        EXCHANGED=exchanged,
        BLOCK=block,
        INDEX=index_dtype(max(blocks * block, rows + run)),
        num_warps=num_warps,
        maxnreg=_registers(32 * num_warps * programs),
        **constants,
    )
    return y, argmax


def _triton_in_steps(x: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """One operator after the other, rounded once at the end."""
    *tail, with_argmax = args
    y, argmax = reference.rectified(x.to(opmath(x.dtype)), bias, tail[0]), x.new_empty(0, dtype=torch.uint8)
    if tail[1]:
        y = single_lrn.triton(y, *tail[1:6])
    if tail[6]:
        y, argmax = single_pool.triton(y, *tail[6:11], with_argmax)
    return output(y.to(x.dtype), output_format(x)), argmax


def _triton_backward_in_steps(
    dy: Tensor, x: Tensor, bias: Tensor | None, argmax: Tensor, *tail: Any
) -> tuple[Tensor, Tensor]:
    wide = opmath(x.dtype)
    z, dz = reference.rectified(x.to(wide), bias, tail[0]), dy.to(wide)
    if tail[6]:
        dz = single_pool.triton_backward(dz, argmax, list(x.shape[2:]), is_channels_last(x), *tail[6:11])
    if tail[1]:
        dz = single_lrn.triton_backward(dz, z, *tail[1:6])
    if tail[0]:
        dz = dz.masked_fill(z <= 0, 0)
    return output(dz.to(x.dtype), output_format(x)), dz.sum((0, 2, 3)) if bias is not None else x.new_empty(0)


@lru_cache
def _splits(batch: int, lanes: int, at_once: int) -> int:
    """Into how many groups to split the images, each group done by so many lanes, of which a GPU runs some at once.

    Of the numbers that finish soonest, the smallest: each group leaves partial sums.
    """
    most = min(batch, max(1, 8 * at_once // lanes))
    return min(range(1, most + 1), key=lambda splits: cdiv(batch, splits) * cdiv(splits * lanes, at_once))


def triton_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, argmax: Tensor, *tail: Any, config: tuple[int, int, int] | None = None
) -> tuple[Tensor, Tensor]:
    op, like = "relu_lrn_max_pool2d_backward", _empty_outputs(x, *tail, with_argmax=True)
    check_same(op, "grad", dy, like[0])
    check_same(op, "argmax", argmax, like[1]) if tail[6] else None
    kernel_bias, format, dx = _triton_bias(bias, x), output_format(x), empty_output(x)
    block, num_warps, most = config or BACKWARD_CONFIGS[_config(x)]
    constants = _constants(x, tail, most) if x.numel() else {}
    if constants is None:
        dx, dbias = _triton_backward_in_steps(dy, x, bias, argmax, *tail)
        return dx, dbias if bias is None else dbias.to(bias.dtype)
    resident = 256 if tail[1] else 384  # lanes that a multiprocessor runs at once
    rows = columns = splits = 0
    if constants:
        rows = cdiv(x.shape[2] + constants["PH"], constants["SH"])
        columns = cdiv(x.shape[3] + constants["PW"], constants["SW"])
        channels = constants["CHANNELS"]
        lanes = rows * columns * x.shape[1] // channels * cdiv(channels, constants["V"])
        splits = _splits(x.shape[0], lanes, resident * processors(x.device))
    sums = x.new_empty((splits * rows * columns, x.shape[1]) if bias is not None else 0, dtype=opmath(x.dtype))
    if constants:
        launch(
            kernels("relu_lrn_max_pool2d").backward,
            cdiv(splits * lanes, block),
            *(
                dense(dy, format),
                dense(x, format),
                x if kernel_bias is None else kernel_bias,
                dense(argmax, format) if tail[6] else argmax,
                dx,
                sums,
                x.shape[0],
                *x.shape[2:],
                *dy.shape[2:],
                splits,
            ),
            POOL=bool(tail[6]),
            WITH_BIAS=bias is not None,
            BLOCK=block,
            INDEX=index_dtype(splits * lanes),
            num_warps=num_warps,
            maxnreg=_registers(resident),
            **constants,
        )
    return dx, sums if bias is None else sums.sum(0).to(bias.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, bias, *ctx.tail, ctx.has_argmax = inputs
    ctx.save_for_backward(x, bias, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 12
    if dy is None:
        return None, None, *rest
    x, bias, argmax = ctx.saved_tensors
    if ctx.tail[6] and not ctx.has_argmax:  # exported where no gradient was asked for, and asked for now
        argmax = tail(x.detach(), None if bias is None else bias.detach(), *ctx.tail, True)[1]
    dx, dbias = tail_backward(dy, x, bias, argmax, *ctx.tail)
    return dx, None if bias is None else dbias, *rest


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dy, x, bias, _, *ctx.tail = inputs
    ctx.save_for_backward(dy, x, bias)
    ctx.set_materialize_grads(False)


def _backward_backward(ctx: Any, ddx: Tensor | None, ddbias: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 12
    if ddx is None and ddbias is None:
        return None, None, None, *rest
    dy, x, bias = ctx.saved_tensors
    relu, lrn, pool = _params(tuple(ctx.tail))

    def forward(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.relu_lrn_max_pool2d(x, bias, relu=relu, lrn=lrn, pool=pool)

    if bias is None:
        return *double_backward(forward, (x,), dy, (ddx,)), None, *rest
    return *double_backward(forward, (x, bias), dy, (ddx, ddbias)), *rest


def _vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, bias: Tensor | None, *args: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    with_argmax = args[-1]
    if in_dims[1] is not None:  # a bias for each element of the batch
        assert bias is not None
        dtype, wide = x.dtype, opmath(x.dtype)
        x = x.movedim(in_dims[0], 0) if in_dims[0] is not None else x
        x = x.to(wide) + bias.movedim(in_dims[1], 0)[:, None, :, None, None].to(wide)
        (y, argmax), dims = _vmap(info, (0, None), x, None, *args)
        return (y.to(dtype), argmax), dims
    y, argmax = torch.ops.fastcnn.relu_lrn_max_pool2d(fold_batch(x, in_dims[0], info.batch_size), bias, *args)
    y = unfold_batch(y, info.batch_size)
    return (y, unfold_batch(argmax, info.batch_size) if with_argmax else argmax), (0, 0 if with_argmax else None)


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    # The bias gradient is summed over the folded batch inside the op, so each element gets a call of its own.
    def element(i: int) -> tuple[Tensor, Tensor]:
        return torch.ops.fastcnn.relu_lrn_max_pool2d_backward(
            *(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True))
        )

    in_dims = (*in_dims, *(None,) * (len(args) - len(in_dims)))
    results = [element(i) for i in range(info.batch_size)]
    dx, dbias = (torch.stack(column) for column in zip(*results, strict=True))
    return (dx, dbias), (0, 0)


_TAIL = (
    "bool relu, int size, float alpha, float beta, float k, int groups, "
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"
)
tail_backward = define(
    f"relu_lrn_max_pool2d_backward(Tensor grad, Tensor input, Tensor? bias, Tensor argmax, {_TAIL})"
    " -> (Tensor, Tensor)",
    implementations={
        "reference": _backward_reference,
        "cpu": partial(_backward_compiled, "fastcnn_cpu"),
        "triton": triton_backward,
        "cuda": partial(_backward_compiled, "fastcnn_cuda"),
    },
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    vmap=_backward_vmap,
)
tail = define(
    f"relu_lrn_max_pool2d(Tensor input, Tensor? bias, {_TAIL}, bool with_argmax) -> (Tensor, Tensor)",
    implementations={
        "reference": _reference,
        "cpu": partial(_compiled, "fastcnn_cpu"),
        "triton": triton,
        "cuda": partial(_compiled, "fastcnn_cuda"),
    },
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
)
