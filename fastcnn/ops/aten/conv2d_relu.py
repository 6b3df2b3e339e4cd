"""Convolution, bias and ReLU by torch's own convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...memory_format import format_of, output, output_format
from ...params import ConvBackwardParams, ConvParams
from .. import outputs, relu_mask


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvParams, with_mask: bool) -> tuple[Tensor, Tensor]:
    y = output(torch.relu_(F.conv2d(x, weight, bias, *conv.op_args())), output_format(x))
    return y, relu_mask.pack(y) if with_mask else outputs.empty_mask(y, False)


def backward(
    dy: Tensor, y_or_mask: Tensor, x: Tensor | None, weight: Tensor, params: ConvBackwardParams
) -> tuple[Tensor, Tensor, Tensor]:
    dz = torch.where(relu_mask.passes(dy, y_or_mask, x, params.channels_last), dy, 0)
    return convolution_backward(dz, x, weight, params)


def convolution_backward(
    dz: Tensor, x: Tensor | None, weight: Tensor, params: ConvBackwardParams
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, empty where they are not needed, from that of the convolution's output."""
    if x is None:  # only its size counts where no weight gradient is wanted; memory never touched costs nothing
        x = outputs.empty_input(dz, params)
    stride, padding, dilation, groups = params.conv.op_args()
    dx, dw, db = torch.ops.aten.convolution_backward(
        dz, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, params.needs
    )
    return (
        output(dx, format_of(params.channels_last)) if params.needs[0] else dz.new_empty(0),
        torch.empty_like(weight).copy_(dw) if params.needs[1] else dz.new_empty(0),
        db if params.needs[2] else dz.new_empty(0),
    )
