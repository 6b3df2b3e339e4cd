"""A run of calls, convolution -> ReLU -> LRN -> max-pool, as one call: what :func:`fastcnn.optimize` puts in its place.

A part of a stage is None, a layer, or a :class:`Function`. Layers are asked for their parameters in every call.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import functional as FF
from . import nn as layers
from .models.layers import GroupedLocalResponseNorm, PaperDropout
from .ops._inference import conv_stage, linear, max_pool2d, normalized, runs, runs_packed
from .ops._stage import run_stage as run_convolution
from .params import FLOATING_DTYPES, LRNParams, PoolParams

PARTS = ("conv", "norm", "relu", "lrn", "pool")  # in the order in which they may follow each other


class Function(NamedTuple):
    """A call of a function: which part of a stage it is, and its arguments after the input."""

    part: str
    arguments: tuple[Any, ...] = ()
    inplace: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        if self.part == "relu":
            return torch.relu_(x) if self.inplace else torch.relu(x)
        return _FUNCTIONS[self.part](x, *self.arguments)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "conv": F.conv2d,
    "lrn": FF.local_response_norm,
    "pool": FF.max_pool2d,
}

Part = nn.Module | Function
_LAYERS: dict[str, Any] = {
    "conv": nn.Conv2d,
    "norm": nn.BatchNorm2d,
    "relu": nn.ReLU,
    "lrn": nn.LocalResponseNorm,
    "pool": nn.MaxPool2d,
}
_OURS = (layers.LocalResponseNorm, GroupedLocalResponseNorm, layers.MaxPool2d)


def part_of(layer: nn.Module) -> str | None:
    """Which part of a stage a layer is, by its class; None if it is none."""
    return next((part for part, kind in _LAYERS.items() if isinstance(layer, kind)), None)


def why_not(layer: nn.Module, part: str) -> str:
    """Why a layer cannot run fused, as it is now, as this part of a stage; empty if it can."""
    if part_of(layer) != part:
        return f"it is no {_LAYERS[part].__name__}"
    cls: Any = type(layer)
    if cls.forward is not _LAYERS[part].forward and cls.forward not in [kind.forward for kind in _OURS]:
        return f"a subclass of {_LAYERS[part].__name__} with a forward of its own"
    if part == "conv" and cls._conv_forward is not nn.Conv2d._conv_forward:
        return "a subclass of Conv2d with a convolution of its own"
    if part == "conv" and layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r}"
    if part == "norm" and (layer.training or layer.running_mean is None or layer.running_var is None):
        return "it normalizes by the batch"
    if part == "pool" and layer.return_indices:
        return "return_indices=True"
    if "forward" in vars(layer):
        return "its forward was replaced"
    return "it has hooks" if has_hooks(layer) else ""


def has_hooks(layer: nn.Module) -> bool:
    """Whether anything wants to see or change what goes in or out."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or all_modules._global_forward_hooks
        or all_modules._global_forward_pre_hooks
        or all_modules._global_backward_hooks
        or all_modules._global_backward_pre_hooks
    )


def run_stage(
    x: Tensor, conv: Part | None = None, relu: Part | None = None, lrn: Part | None = None, pool: Part | None = None
) -> Any:
    """The stage in as few passes as can be; as its parts one after the other where it cannot run fused."""
    if not _has_kernels(x) or not _fusible(conv=conv, relu=relu, lrn=lrn, pool=pool):
        for part in (conv, relu, lrn, pool):
            x = x if part is None else part(x)
        return x
    of_lrn, of_pool = _lrn_arguments(lrn), _pool_arguments(pool)
    tail: dict[str, Any] = {
        "relu": relu is not None,
        "lrn": None if of_lrn is None else LRNParams(*of_lrn),
        "pool": None if of_pool is None else PoolParams(*of_pool),
    }
    if conv is None:
        return FF.relu_lrn_max_pool2d(x, **tail)
    return run_convolution(x, *conv_arguments(conv), **tail)


def _fusible(**parts: Part | None) -> bool:
    return not any(isinstance(part, nn.Module) and why_not(part, name) for name, part in parts.items())


def _has_kernels(x: Any) -> bool:
    if not isinstance(x, Tensor) or is_traceable_wrapper_subclass(x):
        return False
    return x.dim() == 4 and x.dtype in FLOATING_DTYPES and x.layout == torch.strided


def infer_stage(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d | None = None,
    relu: Part | None = None,
    lrn: Part | None = None,
    pool: Part | None = None,
) -> Any:
    """:func:`run_stage` for inference, with a batch norm behind the convolution: packed weights, in their dtype."""
    x = x.to(conv.weight.dtype)
    if _fusible(conv=conv, norm=norm, relu=relu, lrn=lrn, pool=pool):
        y = _infer(x, conv, norm, relu is not None, lrn, pool)
        if y is not None:
            return y
    if norm is None:
        return run_stage(x, conv, relu, lrn, pool)
    y = norm(conv(x))
    return y if relu is None else run_stage(y, None, relu, lrn, pool)  # without ReLU the norm is the last


def infer_fused_layer(x: Tensor, layer: Any) -> Tensor:
    """A layer of fastcnn that begins with a convolution, for inference."""
    x = x.to(layer.weight.dtype)
    y = None
    if layer.padding_mode == "zeros" and not has_hooks(layer):
        y = _infer(x, layer, None, True, getattr(layer, "lrn", None), getattr(layer, "pool", None))
    return layer(x) if y is None else y


def _infer(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, relu: bool, lrn: Any, pool: Any) -> Tensor | None:
    weight, bias, *arguments = conv_arguments(conv)
    of_norm: tuple[Any, ...] = () if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if not _has_kernels(x) or isinstance(conv.padding, str) or not runs_packed(x, weight, bias, *of_norm):
        return None
    if norm is not None:
        weight, bias = normalized(norm.eps, weight, bias, *of_norm)
        if weight is None:
            return None
    return conv_stage(x, weight, bias, arguments, relu, _lrn_arguments(lrn), _pool_arguments(pool))


def infer_pool(x: Tensor, layer: nn.MaxPool2d) -> Any:
    """A pool for inference."""
    if not _has_kernels(x) or why_not(layer, "pool") or not runs("max_pool2d", x):
        return layer(x)
    return max_pool2d(x, _pool_arguments(layer))  # type: ignore[arg-type]


def infer_linear(x: Tensor, layer: nn.Linear, relu: Part | None = None, dropout: PaperDropout | None = None) -> Tensor:
    """A linear layer, and what follows it, for inference: in the dtype of its weights."""
    weight, bias = layer.weight, layer.bias
    x = x.to(weight.dtype)
    usual = type(layer).forward is nn.Linear.forward and not has_hooks(layer)
    usual = usual and not (isinstance(relu, nn.Module) and why_not(relu, "relu"))
    usual = usual and (dropout is None or not (has_hooks(dropout) or dropout.training))
    fits = x.dim() == 2 and x.shape[1] == weight.shape[1] and (bias is None or bias.dtype == weight.dtype)
    if usual and fits and runs_packed(x, weight, bias):
        return linear(x, weight, bias, relu is not None, 1.0 if dropout is None else 1 - dropout.p)
    y = layer(x)
    y = y if relu is None else relu(y)
    return y if dropout is None else dropout(y)


def conv_arguments(conv: Part) -> tuple[Any, ...]:
    """Those of :func:`torch.nn.functional.conv2d` after the input."""
    if isinstance(conv, Function):
        return conv.arguments
    return conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups


def _lrn_arguments(lrn: Any) -> tuple[Any, ...] | None:
    if lrn is None or isinstance(lrn, Function):
        return lrn and lrn.arguments
    return lrn.size, lrn.alpha, lrn.beta, lrn.k, getattr(lrn, "groups", 1)


def _pool_arguments(pool: Any) -> tuple[Any, ...] | None:
    if pool is None or isinstance(pool, Function):
        return pool and pool.arguments
    return pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
