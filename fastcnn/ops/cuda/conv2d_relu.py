"""Convolution, bias and ReLU by the CUDA C++ kernel."""

import torch
from torch import Tensor

from ... import backends
from ...memory_format import dense, is_channels_last, output_format
from ...params import ConvParams
from .. import outputs, relu_mask
from ..aten import conv2d_relu as aten
from ..gpu_convolution import precision, weight_rows


def can_run(x: Tensor) -> bool:
    """Whether the kernel is there for this tensor: it needs tensor cores, and multiplies float32 as TF32."""
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    if x.dtype == torch.float32 and precision(x.dtype) != "tf32":
        return False
    return not backends.why_not("cuda", x.device) and torch.cuda.get_device_capability(x.device) >= (8, 0)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvParams, with_mask: bool) -> tuple[Tensor, Tensor]:
    """By the kernel, or where it cannot run by torch."""
    return (run if can_run(x) else aten.forward)(x, weight, bias, conv, with_mask)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvParams, with_mask: bool) -> tuple[Tensor, Tensor]:
    """By the kernel; the mask in passes of torch."""
    rows = weight_rows(weight)
    y, mask = outputs.convolved(x, weight, conv, False)
    rows, bias = rows if rows.data_ptr() % 16 == 0 else rows.clone(), None if bias is None else bias.contiguous()
    tensors = dense(x, output_format(x)), rows, bias, y
    torch.ops.fastcnn_cuda.conv2d_relu(*tensors, is_channels_last(x), list(weight.shape[2:]), *conv.op_args())
    return y, relu_mask.pack(y) if with_mask else mask
