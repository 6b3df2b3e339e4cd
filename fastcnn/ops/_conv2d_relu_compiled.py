"""conv2d_relu by the CUDA C++ kernel, where the backend "cuda" is forced or the kernel was tuned to be the fastest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from . import _conv2d_relu_cuda as on_gpu
from . import conv2d_relu as op
from ._layout import dense, empty_output, is_channels_last, output_format


def can_run(x: Tensor) -> bool:
    """Whether the kernel is there for this tensor: it needs tensor cores, and multiplies float32 as TF32."""
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    if x.dtype == torch.float32 and on_gpu.precision(x.dtype) != "tf32":
        return False
    return not backends.why_not("cuda", x.device) and torch.cuda.get_device_capability(x.device) >= (8, 0)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """Output, and the bit mask if it is wanted."""
    *conv, groups, with_mask = args
    rows = on_gpu._rows(weight)
    y = empty_output(x, op._output_shape(x, weight, *args[:4]))
    torch.ops.fastcnn_cuda.conv2d_relu(
        dense(x, output_format(x)),
        rows if rows.data_ptr() % 16 == 0 else rows.clone(),
        None if bias is None else bias.contiguous(),
        y,
        is_channels_last(x),
        list(weight.shape[2:]),
        *conv,
        groups,
    )
    return y, op._pack_bits(y) if with_mask else op._empty_mask(y, False)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """The backend "cuda": the kernel where it is forced, cuDNN elsewhere."""
    if backends._forced == "cuda" and can_run(x):
        return run(x, weight, bias, *args)
    return op._reference(x, weight, bias, *args)
