"""Local response normalization by the CUDA C++ kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ...memory_format import dense, output_format
from ...params import LRNParams
from ..outputs import empty_output


def forward(x: Tensor, lrn: LRNParams) -> Tensor:
    format, y = output_format(x), empty_output(x)
    torch.ops.fastcnn_cuda.lrn(dense(x, format), y, format != torch.contiguous_format, *lrn.op_args())
    return y


def backward(dy: Tensor, x: Tensor, lrn: LRNParams) -> Tensor:
    format, dx = output_format(x), empty_output(x)
    dy, x = dense(dy, format), dense(x, format)
    torch.ops.fastcnn_cuda.lrn_backward(dy, x, dx, format != torch.contiguous_format, *lrn.op_args())
    return dx
