"""What the convolutions on GPUs share: the order of their weights, the precision of their products, and a check."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..params import ConvParams, check_same


def weight_rows(weight: Tensor) -> Tensor:
    """(O, ROW): of each output k = (kh, kw, c), with zeros to the next 16 bytes. No copy of a channels_last weight."""
    rows = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    missing = -rows.shape[1] % 8
    return F.pad(rows, (0, missing)) if missing else rows.contiguous()


def precision(dtype: torch.dtype) -> str:
    """How products of this dtype are computed, by torch's own switch for convolutions."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


def check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvParams) -> None:
    """Raise if weight or bias, handed to the op directly, would be read out of bounds."""
    shape = [weight.shape[0], x.shape[1] // conv.groups, *weight.shape[2:]]
    check_same("conv2d_relu", "weight", weight, x, shape)
    if bias is not None:
        check_same("conv2d_relu", "bias", bias, x, weight.shape[:1])
