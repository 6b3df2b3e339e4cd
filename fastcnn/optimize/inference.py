"""Inference on CPU from weights that do not change: packed once, convolution and tail sharing one small buffer."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..ops.cpu import winograd
from ..ops.cpu.memory import kept
from ..ops.cpu.onednn import pack
from ..ops.cpu.onednn import runs as onednn_runs
from ..ops.packed import Frozen, unchanged
from ..params import ConvParams, PoolParams, TailParams, opmath, pooled_size

_HALVES = PoolParams(2).op_args()
# A larger block is mapped anew each time it is allocated, by the GNU C library for one; smaller ones are used again.
_REUSED_BYTES = 32 << 20
_FEW = 4  # vectors, for which reading the weights is all that takes time
_LINEAR_BATCH = 32  # that weights are packed for, and good for any


def runs_packed(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a layer may compute ``x`` from packed copies of its parameters, the weight first.

    They and ``x`` are real tensors of the CPU that ask for no gradient, and no dispatch mode looks on.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(x) is not Tensor or not x.is_cpu:
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        return False
    weight = parameters[0]
    assert weight is not None
    if not weight.is_cpu or any(t is not None and t.dtype != x.dtype for t in parameters) or not onednn_runs(x):
        return False
    if torch.is_autocast_enabled("cpu") or backends.choose("conv2d_relu", ("reference", "cpu"), x) != "cpu":
        return False
    return not weight.is_inference()  # made under torch.inference_mode: whether it changes cannot be seen


def normalized(
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    variance: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of the convolution that these and a batch norm make together; None where one is not finite."""
    made = unchanged(weight).made
    of = [None if t is None else unchanged(t) for t in (bias, scale, shift, mean, variance)]
    known = made.get("normalized")
    if known is None or known[0] != eps or any(a is not b for a, b in zip(known[1], of, strict=True)):
        with torch.inference_mode(False), torch.no_grad():
            factor = (variance.double() + eps).rsqrt() * (1 if scale is None else scale)
            offset = ((0 if bias is None else bias) - mean.double()) * factor + (0 if shift is None else shift)
            both = (weight * factor.view(-1, 1, 1, 1)).to(weight.dtype), offset.to(weight.dtype)
            finite = all(bool(t.isfinite().all()) for t in both)
        known = made["normalized"] = eps, of, both if finite else (None, None)
    return known[2]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, factor: float = 1.0) -> Tensor:
    """``factor * relu(linear(x, weight, bias))`` of a batch of vectors, or without ReLU."""
    bias = None if bias is None else bias.contiguous()
    if 0 < len(x) <= _FEW and weight.is_contiguous():
        y = torch.empty((len(x), len(weight)), dtype=x.dtype)
        torch.ops.fastcnn_cpu.linear(x.contiguous(), weight, bias, y, relu, factor)
        return y
    reorder = torch.ops.mkldnn._reorder_linear_weight
    packed = unchanged(weight).get("linear", lambda: reorder(weight.detach(), _LINEAR_BATCH))
    y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    y = torch.relu_(y) if relu else y
    return y if factor == 1 else y.mul_(factor)


class Convolution:
    """``tail(conv2d(x, weight, bias))`` in channels_last of one kind of input: all that is known before one comes.

    Args:
        x: an input in channels_last.
        weight: its shape counts.
        conv: the convolution.
        relu: rectify, where there is no tail.
        tail: what follows the convolution, if more than ReLU.
    """

    def __init__(self, x: Tensor, weight: Tensor, conv: ConvParams, relu: bool, tail: TailParams | None) -> None:
        self.conv, self.relu, self.tail = conv.op_args(), relu, tail
        self.shape = conv.output_shape(x.shape, weight.shape)
        self.by_winograd = winograd.runs(x, weight, *self.conv)
        pool = None if tail is None else tail.pool
        self.halves = pool is not None and tail.lrn is None and pool.op_args() == _HALVES  # type: ignore[union-attr]
        size = self.shape[2:] if pool is None else pooled_size(self.shape[2:], *pool.op_args())
        self.out_shape = [*self.shape[:2], *size]
        images, bytes_of_one = self.shape[0], math.prod(self.shape[1:]) * x.element_size()
        self.step = images if images * bytes_of_one <= _REUSED_BYTES else max(1, _REUSED_BYTES // 2 // bytes_of_one)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Of an ``x`` of this kind, in channels_last."""
        frozen, bias = unchanged(weight), None if bias is None else bias.contiguous()
        if self.by_winograd and (self.tail is None or self.halves):
            y = self._empty(x)
            if self._winograd(x, weight, bias, y, frozen, relu=self.relu, pool=self.halves):
                return y
        if self.tail is not None or (self.relu and self.step < len(x)):
            return self._in_parts(x, weight, bias, frozen)
        y = self._convolve(x, weight, bias, frozen)
        return torch.relu_(y) if self.relu else y  # oneDNN's own makes 0 of NaN, and saves next to nothing

    def _empty(self, x: Tensor) -> Tensor:
        return kept(torch.empty(self.out_shape, dtype=x.dtype, memory_format=torch.channels_last))

    def _winograd(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, frozen: Frozen, **then: Any) -> bool:
        _, padding, _, groups = self.conv
        return winograd.convolve(x, weight, bias, y, padding, groups, cache=frozen, **then) is not None

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        if self.by_winograd and bias is None:
            z = torch.empty((len(x), *self.shape[1:]), dtype=x.dtype, memory_format=torch.channels_last)
            if self._winograd(x, weight, None, z, frozen):
                return z
        stride, padding, dilation, groups = self.conv
        packed = frozen.get("forward", lambda: pack(weight, x, *self.conv))
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed, bias, padding, stride, dilation, groups, "none", [], ""
        ).contiguous(memory_format=torch.channels_last)

    def _in_parts(self, x: Tensor, weight: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        """A few images at a time, so that the convolution's output stays in memory that is used again."""
        y, wide_bias = self._empty(x), None if bias is None else bias.to(opmath(x.dtype))
        for part, out in zip(x.split(self.step), y.split(self.step), strict=True):
            if self.tail is None:
                torch.clamp_min(self._convolve(part, weight, bias, frozen), 0, out=out)
            else:
                z = self._convolve(part, weight, None, frozen)
                torch.ops.fastcnn_cpu.relu_lrn_max_pool2d(z, wide_bias, out, None, True, *self.tail.op_args())
        return y
