"""Convolution by cuDNN, or what torch has in its place; bias, ReLU and mask in one more pass, by a Triton kernel."""

from dataclasses import replace

import torch
from torch import Tensor

from ...memory_format import dense, format_of, output, output_format
from ...params import ConvBackwardParams, ConvParams, check_same
from ..aten import conv2d_relu as aten
from ..gpu_convolution import check_tensors
from ..triton import conv2d_relu as triton
from ..triton.launch import cdiv


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvParams, with_mask: bool) -> tuple[Tensor, Tensor]:
    check_tensors(x, weight, bias, conv)
    if not triton.can_run(x):
        return aten.forward(x, weight, bias, conv, with_mask)
    x, bias = dense(x, output_format(x)), None if bias is None else bias.contiguous()
    y = output(torch.conv2d(x, weight, None, *conv.op_args()), output_format(x))
    return y, triton.bias_relu(y, bias, with_mask, rectify=True)


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvParams, with_mask: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's own fusion. torch asks it for a ReLU that need not keep NaN, so that it must have shown that it does."""
    y = output(torch.cudnn_convolution_relu(x, weight, bias, *conv.op_args()), output_format(x))
    return y, triton.bias_relu(y, None, with_mask, rectify=False)


def backward(
    dy: Tensor, y_or_mask: Tensor, x: Tensor | None, weight: Tensor, params: ConvBackwardParams
) -> tuple[Tensor, Tensor, Tensor]:
    if not triton.can_run(dy):
        return aten.backward(dy, y_or_mask, x, weight, params)
    op, format = "conv2d_relu_backward", format_of(params.channels_last)
    dy = dense(dy, format)
    if x is None:
        bits = dy.new_empty(0, dtype=torch.uint8)
        check_same(op, "output_or_mask", y_or_mask, bits, [cdiv(dy.numel(), 8)])
        return aten.convolution_backward(triton.mask_backward(dy, y_or_mask), x, weight, params)
    check_same(op, "output_or_mask", y_or_mask, dy)
    *convolved, of_bias = params.needs
    dz, db = triton.relu_backward(dy, dense(y_or_mask, format), params.channels_last, of_bias)
    dx, dw, _ = aten.convolution_backward(dz, x, weight, replace(params, needs=[*convolved, False]))
    return dx, dw, db
