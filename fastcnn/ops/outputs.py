"""Empty outputs of the operators: what every implementation writes into, and what compilers see of an op."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..memory_format import format_of, output_format
from ..params import AugmentParams, BatchNormParams, ConvBackwardParams, ConvParams, PoolParams, opmath, pooled_size


def empty_output(x: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized output of an op on ``x``: its device and format, and where not given its shape and dtype."""
    format = output_format(x)
    if shape is None:
        return torch.empty_like(x, dtype=dtype, memory_format=format)
    if format == torch.contiguous_format:
        return x.new_empty(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=format)


def pooled(x: Tensor, pool: PoolParams | None, with_argmax: bool) -> tuple[Tensor, Tensor]:
    """The map of ``x`` after the pool, if there is one, and the argmax, empty if it is not wanted."""
    if pool is None:
        return empty_output(x), x.new_empty(0, dtype=torch.uint8)
    n, c, *size = x.shape
    shape = [n, c, *pooled_size(size, *pool.op_args())]
    if not with_argmax:
        return empty_output(x, shape), x.new_empty(0, dtype=torch.uint8)
    return empty_output(x, shape), empty_output(x, shape, argmax_dtype(pool))


def unpooled(dy: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    """The gradient of a map of this height and width, whose pooled map has the gradient ``dy``."""
    shape = *dy.shape[:2], *size
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=format_of(channels_last))


def argmax_dtype(pool: PoolParams) -> torch.dtype:
    """Of the offset ``kh*KW + kw`` of each maximum in its unclipped window: one byte where that is enough."""
    kh, kw = pool.op_args()[0]
    return torch.int32 if kh * kw > 256 else torch.uint8


def tail_gradients(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of a tail's input and of its bias, empty without one."""
    return empty_output(x), x.new_empty(0) if bias is None else torch.empty_like(bias)


def normalized(x: Tensor, norm: BatchNormParams, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and argmax of a batch norm with its pool, and mean and variance of each channel.

    What only backward needs is empty where it is not kept: argmax, and statistics that are not the batch's.
    """
    channels = x.shape[1] if norm.training or keep else 0
    mean, var = (x.new_empty(channels, dtype=opmath(x.dtype)) for _ in range(2))
    return *pooled(x, norm.pool, keep and norm.pool is not None), mean, var


def norm_gradients(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a batch norm's input, weight and bias, empty without these."""
    dweight, dbias = (x.new_empty(0) if t is None else torch.empty_like(t) for t in (weight, bias))
    return empty_output(x), dweight, dbias


def convolved(x: Tensor, weight: Tensor, conv: ConvParams, with_mask: bool) -> tuple[Tensor, Tensor]:
    """The output of a convolution, and the bit mask of its ReLU, empty if it is not wanted."""
    y = empty_output(x, conv.output_shape(x.shape, weight.shape))
    return y, empty_mask(y, with_mask)


def convolution_gradients(dy: Tensor, weight: Tensor, params: ConvBackwardParams) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias; those that are not needed are empty."""
    input_needs, weight_needs, bias_needs = params.needs
    dx = empty_input(dy, params) if input_needs else dy.new_empty(0)
    dw = torch.empty_like(weight) if weight_needs else dy.new_empty(0)
    return dx, dw, dy.new_empty(weight.shape[0] if bias_needs else 0)


def augmented(x: Tensor, params: AugmentParams) -> Tensor:
    """Crops of the pictures ``x``."""
    crop, _, dtype, channels_last = params.op_args()
    return torch.empty((x.shape[0], 3, *crop), dtype=dtype, device=x.device, memory_format=format_of(channels_last))


def empty_input(dy: Tensor, params: ConvBackwardParams) -> Tensor:
    """Of the form of the convolution's input."""
    format = format_of(params.channels_last)
    return torch.empty(params.size, dtype=dy.dtype, device=dy.device, memory_format=format)


def empty_mask(y: Tensor, with_mask: bool) -> Tensor:
    """One bit for each element of ``y``; see :mod:`.relu_mask`."""
    return torch.empty((y.numel() + 7) // 8 if with_mask else 0, dtype=torch.uint8, device=y.device)
