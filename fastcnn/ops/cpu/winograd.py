"""3x3 convolutions on CPU with fewer products, by csrc/cpu/winograd.cpp: float32 in channels_last."""

import math

import torch
from torch import Tensor

from ... import backends
from ...memory_format import is_channels_last
from ..packed import Frozen

_TILES_OF_A_THREAD = 12  # with fewer, reading the transformed weights takes longer than what the products save


def runs(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> bool:
    """Whether the kernel can compute ``conv2d(x, weight, ...)``, and has enough to do to be the fastest."""
    if weight.shape[2:] != (3, 3) or stride != [1, 1] or dilation != [1, 1] or min(padding) < 0:
        return False
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or not is_channels_last(x):
        return False
    if weight.shape[0] % (16 * groups) or weight.shape[1] % 16 or backends.cpu_capability() == "baseline":
        return False
    across, down = (x.shape[2 + i] + 2 * padding[i] - 1 for i in (0, 1))
    return x.shape[0] * (across // 2) * (down // 2) >= _TILES_OF_A_THREAD * torch.get_num_threads()


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    padding: list[int],
    groups: int,
    *,
    cache: Frozen | None = None,
    addend: Tensor | None = None,
    first: int = 0,
    relu: bool = False,
    pool: bool = False,
    turned: bool = False,
    x_mask: Tensor | None = None,
    out_mask: Tensor | None = None,
) -> float | None:
    """``conv2d(x, weight, bias, 1, padding, 1, groups)``, with what surrounds it, into ``out``: its largest magnitude.

    None where that is not finite: NaN, or a sum too large on the way, has then spread to neighbours. So does the
    rounding of a value that is larger by orders of magnitude than the others of its 4x4 inputs.

    Args:
        x: shape (N, C, H, W), where :func:`runs`.
        weight: shape (O, C / groups, 3, 3).
        bias: shape (O,).
        out: channels_last, shape (N, channels, OH, OW), halved by pooling; O of its channels are written.
        padding: zeros on both sides.
        groups: of channels.
        cache: of the weight; gets the transformed one.
        addend: to add before ReLU, channels_last, shape (N, O, OH, OW).
        first: of the channels of ``out`` that are written.
        relu: rectify.
        pool: then take the maximum of each 2x2 outputs.
        turned: convolve with the weight of the input's gradient, (C, O / groups, 3, 3) turned round.
        x_mask: a bit for each element of x in the order of memory, 0 where it counts as zero.
        out_mask: gets a bit for each output, whether ReLU passes its gradient.
    """
    u = transformed(weight, groups, cache, turned=turned)
    bias = None if bias is None else bias.contiguous()
    largest = torch.ops.fastcnn_cpu.winograd(
        x, x_mask, u, bias, addend, out, first, out_mask, padding, groups, relu, pool
    )
    return largest if math.isfinite(largest) else None


def transformed(weight: Tensor, groups: int, cache: Frozen | None = None, *, turned: bool = False) -> Tensor:
    """The weight as the kernel takes it, from the cache where there is one."""

    def transform() -> Tensor:
        u = torch.empty(weight.numel() // 9 * 16, dtype=torch.float32, device="cpu")
        torch.ops.fastcnn_cpu.winograd_weight(weight.detach(), u, groups, turned)
        return u

    return transform() if cache is None else cache.get("winograd turned" if turned else "winograd", transform)
