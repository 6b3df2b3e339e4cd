"""A whole stage, convolution -> ReLU? -> LRN? -> max-pool?, from the operators that take the fewest passes."""

import math
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


# Below these a call of ours costs more than it saves, and torch's runs: products of a convolution that is trained, and
# of one that is not; elements of a map; pixels for which the weight is transformed anew in each call.
_TRAINED, _FROZEN, _MAP, _TRANSFORMED = 1 << 27, 1 << 24, 1 << 15, 1 << 10


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
    if not _runs_on_cpu(x, weight):
        # Of frozen weights conv2d_relu keeps a bit an output, and the pool a byte.
        if relu and lrn is None and (pool is None or (needs_grad(x) and not needs_grad(weight, bias))):
            return _tail(conv2d_relu(x, weight, bias, *arguments), False, lrn, pool)
        return _tail(F.conv2d(x, weight, None, *arguments), relu, lrn, pool, bias)
    conv, asymmetric = ConvParams.of(x, weight, bias, *arguments)
    shape = conv.output_shape(x.shape, weight.shape)
    products, is_trained = math.prod(shape) * weight[0].numel(), needs_grad(weight, bias)
    by_winograd = not asymmetric and _winograd.runs(x, weight, *conv.op_args())
    by_winograd = by_winograd and (not weight.requires_grad or shape[0] * shape[2] * shape[3] >= _TRANSFORMED)
    if relu and products >= (_TRAINED if is_trained else _FROZEN) and (
        by_winograd or (not is_trained and lrn is None and (pool is None or needs_grad(x)))
    ):
        return _tail(conv2d_relu(x, weight, bias, *arguments), False, lrn, pool)
    if lrn is None and (pool is None or math.prod(shape) < _MAP):
        y = F.conv2d(x, weight, bias, *arguments)
        y = y.relu_() if relu else y
        return y if pool is None else F.max_pool2d(y, *pool.op_args())
    return _tail(F.conv2d(x, weight, None, *arguments), relu, lrn, pool, bias)


def run_tail(x: Tensor, *, relu: bool, lrn: LRNParams | None, pool: PoolParams | None) -> Tensor:
    """:func:`relu_lrn_max_pool2d` of which there is something, by whatever is fastest."""
    if lrn is None and x.is_cpu and x.numel() < _MAP and not torch.compiler.is_compiling():
        y = x.relu() if relu else x
        return y if pool is None else F.max_pool2d(y, *pool.op_args())
    return _tail(x, relu, lrn, pool)


def _tail(
    x: Tensor, relu: bool, lrn: LRNParams | None, pool: PoolParams | None, bias: Tensor | None = None
) -> Tensor:
    if bias is None and not relu:
        if pool is None:
            return x if lrn is None else local_response_norm(x, lrn.size, lrn.alpha, lrn.beta, lrn.k, groups=lrn.groups)
        if lrn is None:
            return max_pool2d(x, *pool.op_args())
    return relu_lrn_max_pool2d(x, bias, relu=relu, lrn=lrn, pool=pool)


def _runs_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution runs on CPU by what is fastest there. Any layer may be compiled the other way."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dim() != 4 or weight.dim() != 4:
        return False
    if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    return backends.choose("conv2d_relu", ("reference", "cpu"), x) == "cpu"
