"""A fully connected layer, whose time in training is that of the memory of its weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from .. import backends
from .cpu.memory import kept
from .overridable import overridable

# Fewer weights take torch as long as calling ours does. With more vectors the products take the time, of which torch's
# then need about as little. Output and gradients took torch 1.3 to 6 times as long between, with 2 threads and AVX-512,
# the weight's gradient longest, for which it has the system map and clear new memory in every step.
_WEIGHTS, _VECTORS = 1 << 19, 256


@overridable("input", "weight", "bias", composite=F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear`, by csrc/cpu/linear_training.cpp where that is faster."""
    return Linear.apply(input, weight, bias) if _is_ours(input, weight, bias) else F.linear(input, weight, bias)


def is_large(weight: Tensor) -> bool:
    """Whether :func:`linear` may be faster than torch's function."""
    if not weight.is_cpu or weight.dtype != torch.float32 or weight.dim() != 2:
        return False
    return bool(weight.numel() >= _WEIGHTS and weight.shape[1] % 16 == 0)


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or not is_large(weight) or x.dim() != 2 or not 0 < len(x) <= _VECTORS:
        return False
    if x.shape[1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if any(type(t) not in (Tensor, nn.Parameter) or not t.is_cpu or t.dtype != torch.float32 for t in tensors):
        return False
    if any(t.layout != torch.strided for t in tensors):
        return False
    if _is_seen() or forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"):
        return False
    return weight.is_contiguous() and backends.runs_cpu_kernels() and backends.cpu_capability() != "baseline"


def _is_seen() -> bool:
    """Whether something must see torch's own operators: a dispatch mode, or a transform of torch.func."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())


class Linear(torch.autograd.Function):
    """:func:`linear` where it is ours."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)
        y = x.new_empty(len(x), len(weight))
        torch.ops.fastcnn_cpu.linear_forward(x.contiguous(), weight, None if bias is None else bias.contiguous(), y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        db = dy.sum(0) if needs[2] else None
        is_plain = dy.layout == torch.strided and not is_legacy_batchedtensor(dy)
        if torch.is_grad_enabled() or _is_seen() or not is_plain:  # enabled: to be differentiated again
            return dy @ weight if needs[0] else None, dy.t() @ x if needs[1] else None, db
        dy = dy.contiguous()
        dx = dw = None
        if needs[0] and len(dy) == 1:
            dx = dy @ weight
        elif needs[0]:
            dx = dy.new_empty(len(dy), weight.shape[1])
            torch.ops.fastcnn_cpu.linear_input_gradient(dy, weight.contiguous(), dx)
        if needs[1]:
            dw = kept(dy.new_empty(dy.shape[1], x.shape[1]), lasting=True)
            torch.ops.fastcnn_cpu.linear_weight_gradient(dy, x.contiguous(), dw)
        return dx, dw, db
