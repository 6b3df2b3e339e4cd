"""Inference on CPU from weights that do not change: packed once, convolution and tail sharing one small buffer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..params import LRNParams, PoolParams, opmath, pooled_size
from . import _winograd
from ._layout import kept
from ._packed import unchanged
from .conv2d_relu import _magnitude, _onednn_runs, _output_shape, _pack

# A larger block is mapped anew each time it is allocated, by the GNU C library for one; smaller ones are used again.
_REUSED_BYTES = 32 << 20
_HALVES = PoolParams(2).op_args()
_LARGE = 1e38  # far enough below the largest float32 that no sum on the way overflows
_LINEAR_BATCH = 32  # that weights are packed for, and good for any


_seen = threading.local()  # .largest: bytes of an image's largest map since it was set to 0


def in_parts(run: Callable[[Tensor], Any], largest: dict[Any, int], input: Any) -> Any:
    """``run(input)``, a few images at a time where the maps in between would be too large to be used again.

    ``largest`` keeps, for each kind of input, the bytes of an image's largest map, found when it is first met.
    """
    x = input
    if type(x) is not Tensor or x.dim() != 4 or x.device.type != "cpu" or len(x) < 2 or torch.compiler.is_compiling():
        return run(x)
    if torch._C._are_functorch_transforms_active() or (torch.is_grad_enabled() and x.requires_grad):
        return run(x)
    kind = x.shape[1:], x.dtype
    if kind not in largest:
        _seen.largest = 0
        y = run(x)
        largest[kind] = _seen.largest if isinstance(y, Tensor) else 0
        if _images_at_a_time(len(x), largest[kind]) == len(x):
            return y  # else anew, so that the first time gives the same bits as the next
    step = _images_at_a_time(len(x), largest[kind])
    return run(x) if step == len(x) else torch.cat([run(part) for part in x.split(step)])


def _images_at_a_time(images: int, bytes_of_one: int) -> int:
    return images if images * bytes_of_one <= _REUSED_BYTES else max(1, _REUSED_BYTES // 2 // bytes_of_one)


def runs_packed(x: Tensor, weight: Tensor) -> bool:
    """Whether the functions of this file may run: on real tensors of the CPU that ask for no gradient."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if type(x) is not Tensor or x.device.type != "cpu" or weight.device.type != "cpu" or x.dtype != weight.dtype:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if weight.is_inference():  # made under torch.inference_mode: whether it changes cannot be seen
        return False
    return _onednn_runs(x) and backends.choose("conv2d_relu", ("reference", "cpu"), x) == "cpu"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`torch.nn.functional.linear` of a batch of vectors."""
    reorder = torch.ops.mkldnn._reorder_linear_weight
    packed = unchanged(weight).get("linear", lambda: reorder(weight.detach(), _LINEAR_BATCH))
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def conv_stage(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    lrn: LRNParams | None,
    pool: PoolParams | None,
) -> Tensor:
    """Convolution -> ReLU? -> LRN? -> max-pool?, in channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    shape = _output_shape(x, weight, stride, padding, dilation, groups)
    image_bytes = shape[1] * shape[2] * shape[3] * x.element_size()
    _seen.largest = max(getattr(_seen, "largest", 0), image_bytes)
    frozen = unchanged(weight)
    winograd = partial(_winograd.convolve, weight=weight, padding=padding, groups=groups, frozen=frozen)
    by_winograd = _winograd.runs(x, weight, stride, padding, dilation, groups)
    if by_winograd and lrn is None and (pool is None or pool.op_args() == _HALVES):
        size = shape if pool is None else [*shape[:2], shape[2] // 2, shape[3] // 2]
        y = kept(torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last))
        found = winograd(x, bias=bias, out=y, relu=relu, pool=pool is not None)
        if found is not None:
            return _bounded(y, found)

    bound = _bound(x)  # of absolute values; what comes out of this layer is bounded by it too

    def outgoing(of_input: float) -> float:
        of_weight = frozen.get("magnitude", lambda: torch.tensor(_magnitude(weight))).item()
        return of_input * of_weight * weight[0].numel() + _magnitude(bias)

    def convolve(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        if by_winograd and bias is None:
            z = torch.empty((len(x), *shape[1:]), dtype=x.dtype, memory_format=torch.channels_last)
            if winograd(x, bias=None, out=z) is not None:
                return z
        packed = frozen.get("forward", lambda: _pack(weight, x, stride, padding, dilation, groups))
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed, bias, padding, stride, dilation, groups, activation, [], ""
        ).contiguous(memory_format=torch.channels_last)

    if lrn is None and pool is None:
        if not relu:
            return convolve(x, bias, "none")
        # oneDNN's ReLU makes 0 of NaN: it may run where NaN is ruled out, if need be by a read of a short input.
        if bound is None or not outgoing(bound) < _LARGE:
            bound = _magnitude(x) if x.numel() <= 2 * len(x) * image_bytes // x.element_size() else None
        if bound is None or not outgoing(bound) < _LARGE:
            return torch.relu_(convolve(x, bias, "none"))
        return _bounded(convolve(x, bias, "relu"), outgoing(bound))
    y = _with_tail(x, convolve, shape, image_bytes, bias, relu, lrn, pool)
    whole = pool is None or pool.op_args()[3] == [1, 1]  # a dilated window may hold nothing, and give -inf
    return _bounded(y, outgoing(bound)) if lrn is None and whole and bound is not None else y


def _bounded(y: Tensor, bound: float) -> Tensor:
    """``y``, which remembers that none of its values is larger, nor NaN, until it is written."""
    if bound < _LARGE and not y.is_inference():
        y._fastcnn_bound = bound, y._version  # type: ignore[attr-defined]
    return y


def _bound(x: Tensor) -> float | None:
    bound, version = getattr(x, "_fastcnn_bound", (None, None))
    return bound if bound is not None and x._version == version else None


def _with_tail(
    x: Tensor,
    convolve: Any,
    shape: list[int],
    image_bytes: int,
    bias: Tensor | None,
    relu: bool,
    lrn: LRNParams | None,
    pool: PoolParams | None,
) -> Tensor:
    """A few images at a time, so that the convolution's output stays in memory that is used again."""
    n, c, *size = shape
    lrn_args = (0, 0.0, 0.0, 0.0, 1) if lrn is None else lrn.op_args()
    pool_args = ([], [], [], [], False) if pool is None else pool.op_args()
    out_size = size if pool is None else pooled_size(size, *pool_args)
    y = kept(torch.empty((n, c, *out_size), dtype=x.dtype, memory_format=torch.channels_last))
    wide_bias = None if bias is None else bias.to(opmath(x.dtype)).contiguous()
    step = _images_at_a_time(n, image_bytes)
    for i in range(0, n, max(step, 1)):
        z = convolve(x[i : i + step], None, "none")
        torch.ops.fastcnn_cpu.relu_lrn_max_pool2d(
            z, wide_bias, y[i : i + step], None, True, relu, *lrn_args, *pool_args
        )
    return y
