"""A whole stage, convolution -> ReLU? -> LRN? -> max-pool?, from the operators that take the fewest passes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..params import ConvParams, LRNParams, PoolParams
from .conv2d_relu import conv2d_relu
from .cpu import winograd as _winograd
from .lrn import local_response_norm
from .max_pool2d import max_pool2d
from .overridable import overridable
from .register import needs_grad
from .relu_lrn_max_pool2d import relu_lrn_max_pool2d


@overridable("x", "weight", "bias")
def run_stage(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *arguments: Any,
    relu: bool = True,
    lrn: LRNParams | None = None,
    pool: PoolParams | None = None,
) -> Tensor:
    """``arguments`` are stride, padding, dilation and groups, as of :func:`torch.nn.functional.conv2d`."""
    if not relu and lrn is None and pool is None:
        return F.conv2d(x, weight, bias, *arguments)
    # Of frozen weights conv2d_relu keeps a bit an output, and the pool a byte.
    frozen = needs_grad(x) and not needs_grad(weight, bias)
    if relu and ((lrn is None and (pool is None or frozen)) or _by_winograd(x, weight, bias, *arguments)):
        y = conv2d_relu(x, weight, bias, *arguments)
        return y if lrn is None and pool is None else run_tail(y, relu=False, lrn=lrn, pool=pool)
    y = F.conv2d(x, weight, None, *arguments)
    return relu_lrn_max_pool2d(y, bias, relu=relu, lrn=lrn, pool=pool)


def run_tail(x: Tensor, *, relu: bool, lrn: LRNParams | None, pool: PoolParams | None) -> Tensor:
    """:func:`relu_lrn_max_pool2d` of which there is something, by an operator of its own where it is only one thing."""
    if not relu and lrn is None and pool is not None:
        return max_pool2d(x, *pool.op_args())
    if not relu and pool is None and lrn is not None:
        return local_response_norm(x, lrn.size, lrn.alpha, lrn.beta, lrn.k, groups=lrn.groups)
    return relu_lrn_max_pool2d(x, relu=relu, lrn=lrn, pool=pool)


def _by_winograd(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> bool:
    """Whether conv2d_relu computes that convolution faster than torch does. Any layer may be compiled the other way."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dim() != 4 or weight.dim() != 4:
        return False
    if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    if backends.choose("conv2d_relu", ("reference", "cpu"), x) != "cpu":
        return False
    conv, asymmetric = ConvParams.of(x, weight, bias, *arguments)
    return not asymmetric and _winograd.runs(x, weight, *conv.op_args())
