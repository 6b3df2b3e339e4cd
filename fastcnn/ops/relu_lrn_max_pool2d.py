"""The tail of an AlexNet stage in one pass: ``max_pool2d(lrn(relu(x + bias)))``, any part of which may be absent."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..params import LRNParams, PoolParams, TailParams, check_bias, check_input, opmath
from . import outputs
from .aten import relu_lrn_max_pool2d as aten
from .cpu import relu_lrn_max_pool2d as cpu
from .cuda import relu_lrn_max_pool2d as cuda
from .lrn import local_response_norm
from .max_pool2d import max_pool2d
from .overridable import overridable
from .register import define, double_backward, fold_batch, needs_grad, one_by_one, unfold_batch
from .triton import relu_lrn_max_pool2d as triton


def _composition(input: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """The single operators, one after the other."""
    tail = TailParams(**options)
    if input.dim() < 2 and (bias is not None or tail.lrn is not None):
        raise ValueError(f"relu_lrn_max_pool2d(): expected an input with channels (got {input.dim()} dimensions)")
    check_bias("relu_lrn_max_pool2d", bias, input)
    y = reference.rectified(input, bias, tail.relu)
    if tail.lrn is not None:
        y = local_response_norm(y, tail.lrn.size, tail.lrn.alpha, tail.lrn.beta, tail.lrn.k, groups=tail.lrn.groups)
    if tail.pool is not None:
        y = max_pool2d(y, *tail.pool.op_args())
    return y.to(input.dtype, copy=y is input)


@overridable("input", "bias", composite=_composition)
def relu_lrn_max_pool2d(
    input: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = True,
    lrn: LRNParams | None = None,
    pool: PoolParams | None = None,
) -> Tensor:
    """The tail of an AlexNet stage, ``max_pool2d(local_response_norm(relu(input + bias)))``, in one pass over memory.

    Only the pooled map is written and, where a gradient will be asked for, one byte per output for the place of its
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
        return _composition(input, bias, relu=relu, lrn=lrn, pool=pool)
    check_bias(op, bias, input)
    if lrn is not None:
        lrn.check_shape(input.shape)
    if pool is not None:
        if 0 in input.shape[1:]:
            raise RuntimeError(
                f"{op}(): expected an input with non-zero channels, height and width, but got size {list(input.shape)}"
            )
        pool.output_size(input.shape[2], input.shape[3])
    with_argmax = pool is not None and needs_grad(input, bias)
    return tail_op(input, bias, TailParams(relu, lrn, pool), with_argmax)[0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, bias, ctx.tail, ctx.has_argmax = inputs
    ctx.save_for_backward(x, bias, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None
    x, bias, argmax = ctx.saved_tensors
    if ctx.tail.pool and not ctx.has_argmax:  # exported where no gradient was asked for, and asked for now
        argmax = tail_op(x.detach(), None if bias is None else bias.detach(), ctx.tail, True)[1]
    dx, dbias = tail_backward_op(dy, x, bias, argmax, ctx.tail)
    return dx, None if bias is None else dbias


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dy, x, bias, _, ctx.tail = inputs
    ctx.save_for_backward(dy, x, bias)
    ctx.set_materialize_grads(False)


def _backward_backward(ctx: Any, ddx: Tensor | None, ddbias: Tensor | None) -> tuple[Tensor | None, ...]:
    if ddx is None and ddbias is None:
        return None, None, None
    dy, x, bias = ctx.saved_tensors
    tail: TailParams = ctx.tail

    def forward(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.relu_lrn_max_pool2d(x, bias, relu=tail.relu, lrn=tail.lrn, pool=tail.pool)

    if bias is None:
        return double_backward(forward, (x,), dy, (ddx,))
    return double_backward(forward, (x, bias), dy, (ddx, ddbias))


def _vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, bias: Tensor | None, tail: TailParams, with_argmax: bool
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    if in_dims[1] is not None:  # a bias for each element of the batch
        assert bias is not None
        dtype, wide = x.dtype, opmath(x.dtype)
        x = x.movedim(in_dims[0], 0) if in_dims[0] is not None else x
        x = x.to(wide) + bias.movedim(in_dims[1], 0)[:, None, :, None, None].to(wide)
        (y, argmax), dims = _vmap(info, (0, None), x, None, tail, with_argmax)
        return (y.to(dtype), argmax), dims
    x = fold_batch(x, in_dims[0], info.batch_size)
    y, argmax = torch.ops.fastcnn.relu_lrn_max_pool2d(x, bias, *tail.op_args(), with_argmax)
    return (unfold_batch(y, info.batch_size), unfold_batch(argmax, info.batch_size)), (0, 0)


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    # The bias gradient is summed over the folded batch inside the op, so each element gets a call of its own.
    *tensors, tail = args
    op = torch.ops.fastcnn.relu_lrn_max_pool2d_backward
    return one_by_one(lambda *element: op(*element, *tail.op_args()), info, in_dims, tensors)


BACKENDS = {"reference": aten, "cpu": cpu, "triton": triton, "cuda": cuda}

tail_backward_op = define(
    "relu_lrn_max_pool2d_backward(Tensor grad, Tensor input, Tensor? bias, Tensor argmax, {params})"
    " -> (Tensor, Tensor)",
    TailParams,
    implementations={name: backend.backward for name, backend in BACKENDS.items()},
    fake=lambda dy, x, bias, argmax, tail: outputs.tail_gradients(x, bias),
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    vmap=_backward_vmap,
)
tail_op = define(
    "relu_lrn_max_pool2d(Tensor input, Tensor? bias, {params}, bool with_argmax) -> (Tensor, Tensor)",
    TailParams,
    implementations={name: backend.forward for name, backend in BACKENDS.items()},
    fake=lambda x, bias, tail, with_argmax: outputs.pooled(x, tail.pool, with_argmax),
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
)
