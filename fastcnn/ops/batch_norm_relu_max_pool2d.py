"""Batch norm and what follows it: ``max_pool2d(relu(batch_norm(x)))``, or with the ReLU first."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..params import BatchNormParams, PoolParams
from . import outputs
from .aten import batch_norm_relu_max_pool2d as aten
from .cpu import batch_norm_relu_max_pool2d as cpu
from .cuda import batch_norm_relu_max_pool2d as cuda
from .max_pool2d import max_pool2d
from .overridable import overridable
from .register import define, double_backward, needs_grad, one_by_one
from .triton import batch_norm_relu_max_pool2d as triton


def _composition(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    relu: bool = True,
    relu_first: bool = False,
    pool: PoolParams | None = None,
) -> Tensor:
    """torch's operators, one after the other."""
    x = input.relu() if relu and relu_first else input
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = y.relu() if relu and not relu_first else y
    return y if pool is None else max_pool2d(y, *pool.op_args())


@overridable("input", "running_mean", "running_var", "weight", "bias", composite=_composition)
def batch_norm_relu_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    relu: bool = True,
    relu_first: bool = False,
    pool: PoolParams | None = None,
) -> Tensor:
    """``max_pool2d(relu(batch_norm(input)))``, in training in two passes over memory, the first for the statistics.

    Only the pooled map is written and, where a gradient will be asked for, one byte per output for the place of its
    maximum and the statistics; backward recomputes the rest from the input, in two passes too.

    Args:
        input: the convolution's output, shape (N, C, H, W); float16, bfloat16, float32 or float64, contiguous or
            channels_last (others are copied first). Of any other rank torch's operators run one after the other.
        running_mean: shape (C,); the input's dtype, or float32 beside 16-bit input, as the next three. In training it
            moves towards the batch's mean, in place; otherwise it is what is subtracted. None in training: none.
        running_var: the same of the variance, which in the batch is that with N*H*W - 1 for the divisor.
        weight: the factor of each channel, shape (C,). None: 1.
        bias: is added to each channel, shape (C,). None: 0.
        training: whether to normalize by the batch's own statistics.
        momentum: how far the running statistics move.
        eps: is added to the variance.
        relu: whether to rectify.
        relu_first: whether before the batch norm instead of after it.
        pool: the pooling, None for none.

    Returns:
        Tensor of shape (N, C, OH, OW), or the input's shape without ``pool``; dtype and memory format as the input.
        16-bit input is computed in float32 and rounded once, at the end.

    Raises:
        TypeError: an argument is of the wrong type.
        NotImplementedError: ``input`` is not of a supported dtype or layout.
        IndexError: ``input`` has no channels.
        ValueError: there is one value per channel in training, ``eps`` is not positive, or one of the running
            statistics is missing.
        RuntimeError: a tensor does not match ``input``, running statistics are missing in evaluation, or nothing is
            left of the map after pooling.

    Source: Ioffe and Szegedy (2015), algorithm 1.
    """
    op = "batch_norm_relu_max_pool2d"
    if pool is not None and not isinstance(pool, PoolParams):
        raise TypeError(f"{op}(): argument 'pool' must be PoolParams or None, not {type(pool).__name__}")
    norm = BatchNormParams(bool(training), float(eps), bool(relu), bool(relu_first), pool)
    norm.check_tensors(input, running_mean, running_var, weight, bias)
    if input.dim() != 4:
        tensors = input, running_mean, running_var, weight, bias
        return _composition(*tensors, training, momentum, eps, relu=relu, relu_first=relu_first, pool=pool)
    if pool is not None:
        if 0 in input.shape[1:]:
            raise RuntimeError(
                f"{op}(): expected an input with non-zero channels, height and width, but got size {list(input.shape)}"
            )
        pool.output_size(input.shape[2], input.shape[3])
    y, _, mean, var = norm_op(input, running_mean, running_var, weight, bias, norm, needs_grad(input, weight, bias))
    if training:
        reference.update_statistics(running_mean, running_var, mean, var, momentum, input)
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, running_mean, running_var, weight, bias, ctx.norm, kept = inputs
    _, argmax, mean, var = output
    ctx.mark_non_differentiable(argmax, mean, var)
    ctx.set_materialize_grads(False)
    running = (None, None) if kept or ctx.norm.training else (running_mean, running_var)
    ctx.kept = kept
    ctx.save_for_backward(x, weight, bias, argmax, mean, var, *running)


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    x, weight, bias, argmax, mean, var, *running = ctx.saved_tensors
    if not ctx.kept:  # exported where no gradient was asked for, and asked for now
        detached = (None if t is None else t.detach() for t in (x, *running, weight, bias))
        _, argmax, mean, var = norm_op(*detached, ctx.norm, True)
    dx, dweight, dbias = norm_backward_op(dy, x, mean, var, weight, bias, argmax, ctx.norm)
    return dx, None, None, None if weight is None else dweight, None if bias is None else dbias


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, mean, var, weight, bias, _, ctx.norm = inputs
    ctx.save_for_backward(dy, x, mean, var, weight, bias)
    ctx.set_materialize_grads(False)


def _backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """In training the statistics are functions of the input, whose gradient theirs is a part of."""
    if all(c is None for c in cotangents):
        return (None,) * 6
    dy, x, mean, var, *affine = ctx.saved_tensors
    norm: BatchNormParams = ctx.norm
    running_mean, running_var = (None, None) if norm.training else (mean, var)
    given = [t is not None for t in affine]

    def forward(x: Tensor, *tensors: Tensor) -> Tensor:
        left = iter(tensors)
        weight, bias = (next(left) if is_given else None for is_given in given)
        arguments = running_mean, running_var, weight, bias, norm.training, 0.0, norm.eps
        return reference.batch_norm_relu_max_pool2d(
            x, *arguments, relu=norm.relu, relu_first=norm.relu_first, pool=norm.pool
        )

    inputs = [x, *(t for t in affine if t is not None)]
    asked = [cotangents[0], *(c for c, is_given in zip(cotangents[1:], given, strict=True) if is_given)]
    ddy, dx, *rest = double_backward(forward, inputs, dy, asked)
    left = iter(rest)
    return ddy, dx, None, None, *(next(left) if is_given else None for is_given in given)


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    *tensors, norm, keep = args
    op = torch.ops.fastcnn.batch_norm_relu_max_pool2d
    return one_by_one(lambda *element: op(*element, *norm.op_args(), keep), info, in_dims, tensors)


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    *tensors, norm = args
    op = torch.ops.fastcnn.batch_norm_relu_max_pool2d_backward
    return one_by_one(lambda *element: op(*element, *norm.op_args()), info, in_dims, tensors)


BACKENDS = {"reference": aten, "cpu": cpu, "triton": triton, "cuda": cuda}

norm_backward_op = define(
    "batch_norm_relu_max_pool2d_backward(Tensor grad, Tensor input, Tensor mean, Tensor var, Tensor? weight, "
    "Tensor? bias, Tensor argmax, {params}) -> (Tensor, Tensor, Tensor)",
    BatchNormParams,
    implementations={name: backend.backward for name, backend in BACKENDS.items()},
    fake=lambda dy, x, mean, var, weight, bias, argmax, norm: outputs.norm_gradients(x, weight, bias),
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    vmap=_backward_vmap,
)
norm_op = define(
    "batch_norm_relu_max_pool2d(Tensor input, Tensor? running_mean, Tensor? running_var, Tensor? weight, "
    "Tensor? bias, {params}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    BatchNormParams,
    implementations={name: backend.forward for name, backend in BACKENDS.items()},
    fake=lambda x, running_mean, running_var, weight, bias, norm, keep: outputs.normalized(x, norm, keep),
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
)
