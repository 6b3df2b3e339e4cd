"""A convolution that is trained, and has no ReLU, by Winograd's algorithm or a few images at a time."""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ...params import ConvBackwardParams, ConvParams
from .. import outputs
from ..packed import contents_of
from . import winograd
from .conv2d_relu import gradients
from .memory import REUSED_BYTES, kept


class Convolution(torch.autograd.Function):
    """``conv2d(x, weight, bias, ...)`` in channels_last, by Winograd's algorithm where that runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvParams) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.conv = conv
        stride, padding, dilation, groups = conv.op_args()
        y = kept(outputs.convolved(x, weight, conv, False)[0], lasting=True)
        if winograd.runs(x, weight, *conv.op_args()):
            if winograd.convolve(x, weight, bias, y, padding, groups, cache=contents_of(weight)) is not None:
                return y
            return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
        # Torch's own output would be new memory, which takes as long to map and clear as the products of a first layer.
        weight = weight.contiguous(memory_format=torch.channels_last)
        images = max(1, len(x) * (REUSED_BYTES // 2) // y.nbytes)
        for part, out in zip(x.split(images), y.split(images), strict=True):
            out.copy_(torch.conv2d(part, weight, bias, stride, padding, dilation, groups))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() or is_legacy_batchedtensor(dy):  # enabled: to be differentiated again
            stride, padding, dilation, groups = ctx.conv.op_args()
            found = torch.ops.aten.convolution_backward(
                dy, x, weight, [len(weight)], stride, padding, dilation, False, [0, 0], groups, needs
            )
        else:
            dy = dy.contiguous(memory_format=torch.channels_last)
            found = gradients(dy, None, x, weight, ConvBackwardParams(list(x.shape), True, ctx.conv, needs))
        return *(gradient if need else None for gradient, need in zip(found, needs, strict=True)), None
