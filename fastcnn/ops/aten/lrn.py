"""Local response normalization in plain PyTorch."""

from torch import Tensor

from ... import reference
from ...memory_format import output, output_format
from ...params import LRNParams, opmath


def forward(x: Tensor, lrn: LRNParams) -> Tensor:
    y = reference.normalized(x.to(opmath(x.dtype)), lrn)
    return output(y.to(x.dtype), output_format(x))


def backward(dy: Tensor, x: Tensor, lrn: LRNParams) -> Tensor:
    wide = opmath(x.dtype)
    dx = reference.lrn_backward(dy.to(wide), x.to(wide), lrn)
    return output(dx.to(x.dtype), output_format(x))
