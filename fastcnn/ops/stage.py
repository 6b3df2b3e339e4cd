"""A whole stage, convolution -> batch norm? -> ReLU? -> LRN? -> max-pool?, from the operators of the fewest passes."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..memory_format import is_channels_last
from ..params import ConvParams, LRNParams, PoolParams, pooled_size
from .batch_norm_relu_max_pool2d import batch_norm_relu_max_pool2d
from .conv2d_relu import conv2d_relu
from .cpu import winograd as _winograd
from .cpu.convolution import Convolution
from .cpu.memory import REUSED_BYTES
from .lrn import local_response_norm
from .max_pool2d import max_pool2d
from .overridable import is_seen_through, overridable
from .packed import contents_of
from .register import needs_grad
from .relu_lrn_max_pool2d import relu_lrn_max_pool2d

# Below these a call of ours costs more than it saves, and torch's runs: products of a convolution with ReLU that is
# trained, and of any other; outputs of a pool in NCHW, and in channels_last; elements of a batch norm's input in
# training, and in evaluation; pixels for which the weight is transformed anew in each call. Forward and gradients of
# convolutions that are trained, in channels_last, took torch 1.0 to 1.6 times as long above the limits, with 16 to 512
# channels and maps of 4x4 to 112x112 on 2 threads with AVX-512.
_TRAINED, _PLAIN, _POOLED, _POOLED_LAST, _TRANSFORMED = 1 << 27, 1 << 24, 1 << 14, 1 << 19, 768
_NORMALIZED, _NORMALIZED_LATER = 1 << 19, 1 << 21


@overridable("x", "weight", "bias")
def run_stage(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *arguments: Any,
    relu: bool = True,
    lrn: LRNParams | None = None,
    pool: PoolParams | None = None,
) -> Tensor:
    """``arguments`` are stride, padding, dilation and groups, as of :func:`torch.nn.functional.conv2d`."""
    return fastest_stage(x, weight, bias, *arguments, relu=relu, lrn=lrn, pool=pool)(x, weight, bias)


def fastest_stage(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *arguments: Any,
    relu: bool,
    lrn: LRNParams | None,
    pool: PoolParams | None,
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """What runs a stage on tensors like these, in the memory format that they have."""
    convolve = _convolution(x, weight, bias, *arguments)
    pool_args = None if pool is None else pool.op_args()

    def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any) -> Tensor:
        y = convolve(x, weight, bias)
        if relu:
            torch.relu_(y)
        return y if pool_args is None else F.max_pool2d(y, *pool_args)

    def fused(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any) -> Tensor:
        return _tail(convolve(x, weight, None), relu, lrn, pool, bias)

    by_conv2d_relu = partial(_by_conv2d_relu, arguments=arguments, lrn=lrn, pool=pool)
    is_frozen = needs_grad(x) and not needs_grad(weight, bias)
    if not relu and lrn is None and pool is None:
        return by_torch
    if not _runs_on_cpu(x, weight):
        # Of frozen weights conv2d_relu saves one bit per output, and the pool one byte.
        return by_conv2d_relu if relu and lrn is None and (pool is None or is_frozen) else fused
    conv, asymmetric = ConvParams.of(x, weight, bias, *arguments)
    shape = conv.output_shape(x.shape, weight.shape)
    is_large = _products(x, weight, conv) >= (_TRAINED if needs_grad(weight, bias) else _PLAIN)
    by_winograd = not asymmetric and _is_faster_by_winograd(x, weight, conv)
    if relu and is_large and lrn is None and (by_winograd or is_frozen):
        return by_conv2d_relu
    return by_torch if lrn is None and (pool is None or _is_small(shape, is_channels_last(x), pool)) else fused


def _products(x: Tensor, weight: Tensor, conv: ConvParams) -> int:
    return math.prod(conv.output_shape(x.shape, weight.shape)) * weight[0].numel()


def _is_faster_by_winograd(x: Tensor, weight: Tensor, conv: ConvParams) -> bool:
    batch, _, height, width = conv.output_shape(x.shape, weight.shape)
    # With 5x5 windows on small maps, outputs of tiles beyond the border and the weight's transformation take what the
    # products save: training on maps of 7x7 was 0.80 to 0.98 times as fast, on 13x13 and more 0.99 to 1.58 times.
    is_small = batch * height * width < _TRANSFORMED or (weight.shape[2] == 5 and min(height, width) < 8)
    if weight.requires_grad and is_small:
        return False
    if _products(x, weight, conv) < _PLAIN:
        return False
    if is_channels_last(x):
        return _winograd.runs(x, weight, *conv.op_args())
    return x.dtype == torch.float32 and _winograd.runs_converted(x.shape, weight, *conv.op_args())


def rectifies_by_itself(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> bool:
    """Whether the fastest convolution with a ReLU is one operator, and not the two one after the other."""
    run = fastest_stage(x, weight, bias, *arguments, relu=True, lrn=None, pool=None)
    return isinstance(run, partial) and run.func is _by_conv2d_relu


def run_norm(
    x: Tensor,
    statistics: tuple[Tensor | None, Tensor | None],
    affine: tuple[Tensor | None, Tensor | None],
    training: bool,
    momentum: float,
    eps: float,
    *,
    relu: bool,
    relu_first: bool,
    lrn: LRNParams | None,
    pool: PoolParams | None,
) -> Tensor:
    """Batch norm with a ReLU after or before it, if any, then LRN? -> max-pool?, by whatever is fastest."""
    arguments = *statistics, *affine, training, momentum, eps
    least = 0 if torch.compiler.is_compiling() else _NORMALIZED if training else _NORMALIZED_LATER
    if x.dim() != 4 or not x.is_cpu or x.numel() < least:  # on GPUs, where ours was not measured yet, cuDNN's
        y, relu_last = F.batch_norm(torch.relu(x) if relu and relu_first else x, *arguments), relu and not relu_first
        if lrn or pool:
            return run_tail(y, relu=relu_last, lrn=lrn, pool=pool)
        return torch.relu_(y) if relu_last else y
    own_pool = None if lrn else pool
    y = batch_norm_relu_max_pool2d(x, *arguments, relu=relu, relu_first=relu_first, pool=own_pool)
    return _tail(y, False, lrn, pool) if lrn else y


def _is_small(shape: Sequence[int], channels_last: bool, pool: PoolParams) -> bool:
    """Whether a map of this shape is so small that torch pools it faster."""
    outputs = math.prod(shape[:2]) * math.prod(pooled_size(shape[2:], *pool.op_args()))
    return outputs < (_POOLED_LAST if channels_last else _POOLED)


def _by_conv2d_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, arguments: tuple[Any, ...], **norm_and_pool: Any
) -> Tensor:
    return _tail(conv2d_relu(x, weight, bias, *arguments), relu=False, **norm_and_pool)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """By Winograd's algorithm, or torch's, which also runs a few images at a time where its output is large.

    It would bring the weight into the format of the input itself, but again for backward.
    """

    def in_our_memory(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return Convolution.apply(x, weight, bias, conv)

    def as_it_is(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.conv2d(x, weight, bias, *arguments)

    def trained(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.conv2d(x, weight.contiguous(memory_format=torch.channels_last), bias, *arguments)

    def frozen(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        known = contents_of(weight)
        if known is not None:
            weight = known.get("channels_last", lambda: weight.detach().contiguous(memory_format=torch.channels_last))
        return torch.conv2d(x, weight, bias, *arguments)

    if weight.shape[2:] == (1, 1) or not is_channels_last(x) or not _runs_on_cpu(x, weight):
        return as_it_is
    conv, asymmetric = ConvParams.of(x, weight, bias, *arguments)
    if not asymmetric and not _is_transformed():
        output_bytes = math.prod(conv.output_shape(x.shape, weight.shape)) * x.element_size()
        if _is_faster_by_winograd(x, weight, conv) or (weight.requires_grad and output_bytes > REUSED_BYTES):
            return in_our_memory
    if is_channels_last(weight):
        return as_it_is
    return trained if weight.requires_grad else frozen


def _is_transformed() -> bool:
    """Whether someone looks into the convolution who knows what to do with torch's."""
    return torch._C._are_functorch_transforms_active() or is_seen_through()


def run_tail(x: Tensor, *, relu: bool, lrn: LRNParams | None, pool: PoolParams | None) -> Tensor:
    """:func:`relu_lrn_max_pool2d` of which there is something, by whatever is fastest."""
    return fastest_tail(x, relu=relu, lrn=lrn, pool=pool)(x)


def fastest_tail(
    x: Tensor, *, relu: bool, lrn: LRNParams | None, pool: PoolParams | None
) -> Callable[[Tensor], Tensor]:
    """What runs a tail on tensors like this one."""
    is_on_cpu = x.is_cpu and not torch.compiler.is_compiling()
    if (
        pool is not None
        and lrn is None
        and is_on_cpu
        and x.dim() == 4
        and _is_small(x.shape, is_channels_last(x), pool)
    ):
        return partial(_tail_by_torch, relu=relu, pool=pool.op_args())
    return partial(_tail, relu=relu, lrn=lrn, pool=pool)


def _tail_by_torch(x: Tensor, *, relu: bool, pool: tuple[Any, ...]) -> Tensor:
    return F.max_pool2d(torch.relu(x) if relu else x, *pool)


def _tail(x: Tensor, relu: bool, lrn: LRNParams | None, pool: PoolParams | None, bias: Tensor | None = None) -> Tensor:
    if bias is None and not relu:
        if pool is None:
            return x if lrn is None else local_response_norm(x, lrn.size, lrn.alpha, lrn.beta, lrn.k, groups=lrn.groups)
        if lrn is None:
            return max_pool2d(x, *pool.op_args())
    return relu_lrn_max_pool2d(x, bias, relu=relu, lrn=lrn, pool=pool)


def _runs_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution runs on CPU by what is fastest there. Any layer may be compiled the other way."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dim() != 4 or weight.dim() != 4:
        return False
    if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    return backends.choose("conv2d_relu", ("reference", "cpu"), x) == "cpu"
