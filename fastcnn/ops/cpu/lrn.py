"""Local response normalization by the C++ kernel."""

from typing import Any

import torch
from torch import Tensor

from ...memory_format import dense, output_format
from ...params import LRNParams
from ..outputs import empty_output
from .memory import kept

CPU = torch.ops.fastcnn_cpu


def forward(x: Tensor, lrn: LRNParams, library: Any = CPU) -> Tensor:
    format = output_format(x)
    y = kept(empty_output(x))
    library.lrn(dense(x, format), y, format != torch.contiguous_format, *lrn.op_args())
    return y


def backward(dy: Tensor, x: Tensor, lrn: LRNParams, library: Any = CPU) -> Tensor:
    format = output_format(x)
    dy, x, dx = dense(dy, format), dense(x, format), kept(empty_output(x))
    library.lrn_backward(dy, x, dx, format != torch.contiguous_format, *lrn.op_args())
    return dx
