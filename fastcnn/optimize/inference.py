"""Inference on CPU from frozen weights: what runs a stage for one kind of input, knowing all that does not change.

Each runs with the arguments of its stage, where they are like those that it was made for.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory_format import output_format
from ..ops.cpu import winograd
from ..ops.cpu.memory import REUSED_BYTES, kept
from ..ops.cpu.onednn import pack
from ..ops.packed import unchanged
from ..params import ConvParams, PoolParams, TailParams, opmath, pooled_size

Run = Callable[..., Tensor]
_HALVES = PoolParams(2).op_args()
_FEW = 4  # vectors, for which reading the weights is all that takes time
_LINEAR_BATCH = 32  # that weights are packed for, and good for any
_SMALL_POINTWISE, _SMALL = (
    1 << 26,
    1 << 25,
)  # products, with 1x1 windows and others, of which ours is faster than oneDNN


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A map in channels_last."""
    return kept(torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last))


class Tail:
    """ReLU? -> LRN? -> max-pool? of one kind of map."""

    __name__ = "tail"

    def __init__(self, shape: torch.Size | list[int], format: torch.memory_format, tail: TailParams) -> None:
        if tail.lrn is not None:
            tail.lrn.check_shape(shape)
        self.args, self.format = (format == torch.channels_last, *tail.op_args()), format
        self.shape = list(shape)
        if tail.pool is not None:
            self.shape[2:] = pooled_size(shape[2:], *tail.pool.op_args())

    def __call__(self, x: Tensor, *_: Any) -> Tensor:
        y = self.empty(x.dtype)
        self.write(x, None, y)
        return y

    def empty(self, dtype: torch.dtype) -> Tensor:
        return kept(torch.empty(self.shape, dtype=dtype, device="cpu", memory_format=self.format))

    def write(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        torch.ops.fastcnn_cpu.relu_lrn_max_pool2d(x, bias, out, None, *self.args)

    @staticmethod
    def of(x: Tensor, tail: TailParams) -> "Tail | None":
        format = output_format(x)
        return Tail(x.shape, format, tail) if x.dim() == 4 and x.is_contiguous(memory_format=format) else None


class Linear:
    """Linear layer -> ReLU? -> factor, of one kind of vectors."""

    __name__ = "linear"

    def __init__(self, x: Tensor, weight: Tensor, relu: bool, factor: float) -> None:
        self.relu, self.factor, self.shape = relu, factor, (len(x), len(weight))
        self.packed: Tensor | None = None
        if len(x) > _FEW or not weight.is_contiguous():
            reorder = torch.ops.mkldnn._reorder_linear_weight
            self.packed = unchanged(weight).get("linear", lambda: reorder(weight.detach(), _LINEAR_BATCH))

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.contiguous()
        if self.packed is None:
            y = torch.empty(self.shape, dtype=x.dtype, device="cpu")
            torch.ops.fastcnn_cpu.linear(x.contiguous(), weight, bias, y, self.relu, self.factor)
            return y
        y = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        y = torch.relu_(y) if self.relu else y
        return y if self.factor == 1 else y.mul_(self.factor)


class Convolution:
    """Convolution -> sum? -> ReLU? -> LRN? -> max-pool?, in channels_last, of one kind of input.

    Args:
        stage: what computes the same should a value not be finite.
        x: an input.
        weight: of the convolution, with the batch norm in it. It does not change.
        bias: the same.
        conv: the convolution.
        tail: what follows it.
    """

    __name__ = "convolution"

    def __init__(
        self, stage: Run, x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvParams, tail: TailParams
    ) -> None:
        self.stage, self.conv, self.relu = stage, conv.op_args(), tail.relu
        self.shape, self.window = conv.output_shape(x.shape, weight.shape), list(weight.shape[2:])
        self.bias = None if bias is None else bias.detach().contiguous()
        self.is_converted = not x.is_contiguous(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
        frozen, products = unchanged(weight), math.prod(self.shape) * weight[0].numel()
        self.tail: Tail | None = None
        self.halves = False
        by_winograd = winograd.runs(x, weight, *self.conv)
        if tail.lrn is not None or tail.pool is not None:
            self.tail = Tail(self.shape, torch.channels_last, tail)
            self.halves = by_winograd and tail.lrn is None and tail.pool.op_args() == _HALVES  # type: ignore[union-attr]
        images, image_bytes = self.shape[0], math.prod(self.shape[1:]) * x.element_size()
        self.step = images if images * image_bytes <= REUSED_BYTES else max(1, REUSED_BYTES // 2 // image_bytes)
        if by_winograd:
            self.run, self.packed = self._by_winograd, winograd.transformed(weight, conv.groups, frozen)
        elif x.dtype == torch.float32 and products <= (_SMALL_POINTWISE if self.window == [1, 1] else _SMALL):
            self.run, self.packed = self._directly, frozen.get("panels", partial(pack_panels, weight, conv.groups))
        else:
            self.run, self.packed = self._by_onednn, frozen.get("onednn", partial(pack, weight, x, *self.conv))

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        norm: tuple[Tensor | None, ...] = (),
        addend: Tensor | None = None,
        out: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:
        """As the stage; ``out``, in channels_last, gets the output in its channels from ``first`` on."""
        z = x
        if self.is_converted:
            z = kept(torch.empty_like(x, memory_format=torch.channels_last)).copy_(x)
        if addend is not None:
            addend = addend.contiguous(memory_format=torch.channels_last)
        y = self.run(z, addend, out, first)
        if y is None:
            y = self.stage(x, weight, bias, norm, addend)
            if out is not None:
                out.narrow(1, first, self.shape[1]).copy_(y)
        return y if out is None else out

    def _directly(self, x: Tensor, addend: Tensor | None, out: Tensor | None, first: int) -> Tensor:
        y = empty(self.shape, x.dtype) if out is None else out
        stride, padding, dilation, groups = self.conv
        shape = first, self.shape[1], self.window
        torch.ops.fastcnn_cpu.direct_convolution(
            x, self.packed, self.bias, addend, y, *shape, stride, padding, dilation, groups, self.relu
        )
        if self.tail is None:
            return y
        return self.tail(y)

    def _by_winograd(self, x: Tensor, addend: Tensor | None, out: Tensor | None, first: int) -> Tensor | None:
        tail = None if self.halves else self.tail
        if out is None:
            out = self.tail.empty(x.dtype) if self.tail is not None and self.halves else empty(self.shape, x.dtype)
        _, padding, _, groups = self.conv
        relu = self.relu and tail is None
        where = self.window[0], padding, groups
        largest = torch.ops.fastcnn_cpu.winograd(
            x, None, self.packed, self.bias, addend, out, first, None, *where, relu, self.halves
        )
        if not math.isfinite(largest):
            return None
        return out if tail is None else tail(out)

    def _by_onednn(self, x: Tensor, addend: Tensor | None, out: Tensor | None, first: int) -> Tensor:
        if addend is None and out is None and (self.tail is not None or (self.relu and self.step < len(x))):
            return self._in_parts(x)
        y = self._convolve(x, self.bias, addend)
        if out is None:
            return torch.relu_(y) if self.relu else y  # oneDNN's own makes 0 of NaN, and saves next to nothing
        out = out.narrow(1, first, self.shape[1])
        return torch.clamp_min(y, 0, out=out) if self.relu else out.copy_(y)

    def _convolve(self, x: Tensor, bias: Tensor | None, addend: Tensor | None = None) -> Tensor:
        stride, padding, dilation, groups = self.conv
        where = padding, stride, dilation, groups
        if addend is None:
            y = torch.ops.mkldnn._convolution_pointwise(x, self.packed, bias, *where, "none", [], "")
        else:
            binary = torch.ops.mkldnn._convolution_pointwise.binary
            y = binary(x, addend, self.packed, bias, *where, "add", None, None, [], None)
        return y.contiguous(memory_format=torch.channels_last)

    def _in_parts(self, x: Tensor) -> Tensor:
        """A few images at a time, so that the convolution's output stays in memory that is used again."""
        if self.tail is None:
            y = empty(self.shape, x.dtype)
            for part, out in zip(x.split(self.step), y.split(self.step), strict=True):
                torch.clamp_min(self._convolve(part, self.bias), 0, out=out)
            return y
        y, bias = self.tail.empty(x.dtype), None if self.bias is None else self.bias.to(opmath(x.dtype))
        for part, out in zip(x.split(self.step), y.split(self.step), strict=True):
            self.tail.write(self._convolve(part, None), bias, out)
        return y


def pack_panels(weight: Tensor, groups: int) -> Tensor:
    """``weight`` as csrc/cpu/direct_convolution.h has it."""
    outputs, channels, *window = weight.shape
    padded = -(-outputs // groups // 16) * 16
    panels = -(-padded // 64)
    cuts = [padded // 16 * i // panels * 16 for i in range(panels + 1)]
    w = weight.detach().reshape(groups, outputs // groups, channels, *window).permute(0, 3, 4, 2, 1)
    w = F.pad(w, (0, padded - outputs // groups))
    return torch.cat([group[..., a:b].reshape(-1) for group in w for a, b in itertools.pairwise(cuts)])


def normalized(
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    variance: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that these and a batch norm make together."""
    made = unchanged(weight).made
    of = [None if t is None else unchanged(t) for t in (bias, scale, shift, mean, variance)]
    known = made.get("normalized")
    if known is None or known[0] != eps or any(a is not b for a, b in zip(known[1], of, strict=True)):
        with torch.inference_mode(False), torch.no_grad():  # they outlive this call
            factor = (variance.double() + eps).rsqrt() * (1 if scale is None else scale)
            offset = ((0 if bias is None else bias) - mean.double()) * factor + (0 if shift is None else shift)
            both = (weight * factor.view(-1, 1, 1, 1)).to(weight.dtype), offset.to(weight.dtype)
        known = made["normalized"] = eps, of, both
    return known[2]
