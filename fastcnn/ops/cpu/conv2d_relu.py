"""Convolution, bias and ReLU on CPU: by Winograd's algorithm where that runs, else by oneDNN or whatever torch has."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...memory_format import dense, format_of, output, output_format
from ...params import ConvBackwardParams, ConvParams
from .. import outputs
from ..aten.conv2d_relu import convolution_backward
from ..packed import Frozen, contents_of
from . import onednn, winograd
from .memory import kept


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvParams, with_mask: bool) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, groups = conv.op_args()
    format = output_format(x)
    x = dense(x, format)
    bias = None if bias is None else bias.contiguous()
    if format == torch.contiguous_format and winograd.runs_converted(x.shape, weight, *conv.op_args()):
        y = _converted(forward(_converted(x, torch.channels_last), weight, bias, conv, False)[0], format, with_mask)
        return y, _mask(y, with_mask)
    # From packed weights oneDNN writes channels_last: of no use to NCHW.
    by_onednn = onednn.runs(x)
    cache = contents_of(weight) if by_onednn and format == torch.channels_last else None
    if winograd.runs(x, weight, stride, padding, dilation, groups):
        y, mask = outputs.convolved(x, weight, conv, with_mask)
        y, out_mask = kept(y, lasting=with_mask), mask if with_mask else None
        run = partial(winograd.convolve, cache=cache, relu=True, out_mask=out_mask)
        if run(x, weight, bias, y, padding, groups) is not None:
            return y, mask
    if by_onednn and _cannot_be_nan(x, weight, bias, cache):
        if cache is not None:
            weight = cache.get("forward", lambda: onednn.pack(weight, x, stride, padding, dilation, groups))
        y = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, groups, "relu", [], "")
    else:
        y = torch.relu_(F.conv2d(x, weight, bias, stride, padding, dilation, groups))
    y = output(y, format)
    return y, _mask(y, with_mask)


def _converted(x: Tensor, format: torch.memory_format, lasting: bool = False) -> Tensor:
    """``x``, float32 and dense in the other memory format, in this one."""
    y = kept(torch.empty_like(x, memory_format=format), lasting=lasting)
    torch.ops.fastcnn_cpu.change_format(x, y, format == torch.channels_last)
    return y


def _mask(y: Tensor, with_mask: bool = True) -> Tensor:
    mask = outputs.empty_mask(y, with_mask)
    if with_mask:
        torch.ops.fastcnn_cpu.relu_mask(y, mask)
    return mask


def _cannot_be_nan(x: Tensor, weight: Tensor, bias: Tensor | None, cache: Frozen | None) -> bool:
    """oneDNN's ReLU makes 0 of NaN, so it may run only where all is finite and no sum can overflow.

    That is one read of the input, next to nothing beside a convolution. A NaN makes every comparison false.
    """
    of_weight = onednn.magnitude(weight) if cache is None else cache.get("magnitude", lambda: onednn.magnitude(weight))
    return onednn.magnitude(x) * of_weight * weight[0].numel() + onednn.magnitude(bias) < 1e38


def backward(
    dy: Tensor, y_or_mask: Tensor, x: Tensor | None, weight: Tensor, params: ConvBackwardParams
) -> tuple[Tensor, Tensor, Tensor]:
    format, conv = format_of(params.channels_last), params.conv.op_args()
    dy = dense(dy, format)
    if x is None and params.channels_last:
        return gradients(dy, y_or_mask, x, weight, params)
    if x is not None and params.needs[1] and winograd.finds_weight_gradient(x, weight, *conv):
        mask = _mask(dense(y_or_mask, format))  # which is read for each gradient, and no dz is written
        return gradients(dy, mask, x, weight, params)
    dz = _unmasked(dy, y_or_mask) if x is None else _rectified(dy, y_or_mask)
    if params.channels_last or not winograd.runs_converted(params.size, weight, *conv):
        return gradients(dz, None, x, weight, params)
    dz = _converted(dz, torch.channels_last)
    if x is not None and params.needs[1]:
        x = _converted(dense(x, format), torch.channels_last)
    dx, dw, db = gradients(dz, None, x, weight, replace(params, channels_last=True))
    return _converted(dx, format) if params.needs[0] else dx, dw, db


def gradients(
    dy: Tensor, mask: Tensor | None, x: Tensor | None, weight: Tensor, params: ConvBackwardParams
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a convolution's input, weight and bias, from that of its output where the mask, if there is one, passes it."""
    needs, (_, padding, _, groups) = params.needs, params.conv.op_args()
    dx, dw, db = (_input_gradient(dy, mask, weight, params) if needs[0] else None), None, None
    if x is not None and needs[1] and winograd.finds_weight_gradient(x, weight, *params.conv.op_args()):
        dw, db = winograd.weight_gradient(x, dy, weight, padding, groups, dy_mask=mask, with_bias=needs[2])
    found = dx, dw, db
    missing = [need and gradient is None for need, gradient in zip(needs, found, strict=True)]
    if not any(missing):
        dx, dw, db = (dy.new_empty(0) if gradient is None else gradient for gradient in found)
        return dx, dw, db
    dz = dy if mask is None else _unmasked(dy, mask)
    others = convolution_backward(dz, x, weight, replace(params, needs=missing))
    dx, dw, db = (other if gradient is None else gradient for gradient, other in zip(found, others, strict=True))
    return dx, dw, db


def _unmasked(dy: Tensor, mask: Tensor) -> Tensor:
    dz = kept(torch.empty_like(dy))
    torch.ops.fastcnn_cpu.relu_mask_backward(dy, mask, dz)
    return dz


def _rectified(dy: Tensor, y: Tensor) -> Tensor:
    dz = kept(torch.empty_like(dy))
    return torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=dz)


def _input_gradient(dy: Tensor, mask: Tensor | None, weight: Tensor, params: ConvBackwardParams) -> Tensor | None:
    """The gradient for the input, of that of the output where the mask passes it; None where nothing here is faster.

    With stride 1 it is a convolution too: each window turned round, input and output channels exchanged.
    """
    stride, padding, dilation, groups = params.conv.op_args()
    padding = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    if stride != [1, 1] or min(padding) < 0 or not params.channels_last:
        return None
    cache = contents_of(weight)
    if winograd.runs(dy, weight, stride, padding, dilation, groups):
        dx = kept(outputs.empty_input(dy, params))
        run = partial(winograd.convolve, cache=cache, turned=True, x_mask=mask)
        if run(dy, weight, None, dx, padding, groups) is not None:
            return dx
    if mask is None or cache is None or not onednn.runs(dy):
        return None

    def turned() -> Tensor:
        flipped = weight.detach().flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        return onednn.pack(flipped.contiguous(), dy, stride, padding, dilation, groups)

    dx = torch.ops.mkldnn._convolution_pointwise(
        _unmasked(dy, mask), cache.get("backward", turned), None, padding, stride, dilation, groups, "none", [], ""
    )
    return output(dx, torch.channels_last)
