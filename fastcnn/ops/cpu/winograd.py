"""3x3 and 5x5 convolutions and their gradients on CPU with fewer products: csrc/cpu/winograd*.cpp, in channels_last."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...memory_format import is_channels_last
from ..packed import Frozen

_PRODUCTS: dict[tuple[int, ...], int] = {(3, 3): 16, (5, 5): 49}  # that 2x2 outputs take, by the window
_TILES_OF_A_THREAD = 12  # with fewer, reading the transformed weights takes longer than what the products save
# Pairs of an input and an output channel for each channel: with fewer, transforming tiles takes what the products save,
# and so does converting from and to NCHW. 32 inputs and 32 outputs have 16: 0.95 to 1.19 times as fast as oneDNN, and
# 16 inputs with 16 to 64 outputs 0.55 to 1.10 times.
_PAIRS_OF_A_CHANNEL, _PAIRS_OF_A_CONVERTED = 16, 24
# With fewer, a weight gradient is a sum of so few products that its transformations' rounding counts, and its error is
# more than twice torch's. With more, it is 1.0 to 2.7 times as fast as oneDNN's, for any numbers of channels:
# `fastcnn bench kernels --op conv2d_relu --mode backward` with a CPU that has AVX-512.
_TILES_OF_A_SUM = 64
# A weight gradient is cut into at least so many pieces, or as many as there are threads: by panels of channels and of
# outputs, then by parts of the tiles; with fewer in a part, adding up the parts takes longer than what threads gain.
_PIECES, _PANEL, _TILES_OF_A_PART = 16, 128, 128


def runs(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> bool:
    """Whether the kernel can compute ``conv2d(x, weight, ...)``, and has enough to do to be the fastest."""
    if x.dtype != torch.float32 or not is_channels_last(x):
        return False
    return _suits(x.shape, weight, stride, padding, dilation, groups, _PAIRS_OF_A_CHANNEL)


def runs_converted(
    size: Sequence[int], weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> bool:
    """Whether it still is the fastest if input and output, of float32, are converted from and to NCHW."""
    return _suits(size, weight, stride, padding, dilation, groups, _PAIRS_OF_A_CONVERTED)


def _suits(
    size: Sequence[int],
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    fewest_pairs: int,
) -> bool:
    outputs, channels = weight.shape[:2]
    if tuple(weight.shape[2:]) not in _PRODUCTS or stride != [1, 1] or dilation != [1, 1] or min(padding) < 0:
        return False
    if weight.dtype != torch.float32 or backends.cpu_capability() == "baseline":
        return False
    if outputs % (16 * groups) or channels % 16 or outputs * channels < fewest_pairs * (outputs + groups * channels):
        return False
    return _tiles(size, weight, padding) >= _TILES_OF_A_THREAD * torch.get_num_threads()


def finds_weight_gradient(x: Tensor, weight: Tensor, *arguments: Any) -> bool:
    """Whether it also computes the weight's gradient as precisely as it should, given what :func:`runs` is."""
    return runs(x, weight, *arguments) and _tiles(x.shape, weight, arguments[1]) >= _TILES_OF_A_SUM


def _tiles(size: Sequence[int], weight: Tensor, padding: list[int]) -> int:
    across, down = (size[2 + i] + 2 * padding[i] - weight.shape[2 + i] + 2 for i in (0, 1))
    return size[0] * (across // 2) * (down // 2)


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
        weight: shape (O, C / groups, 3, 3) or (O, C / groups, 5, 5).
        bias: shape (O,).
        out: channels_last, shape (N, channels, OH, OW), halved by pooling; O of its channels are written.
        padding: zeros on both sides.
        groups: of channels.
        cache: of the weight; gets the transformed one.
        addend: to add before ReLU, channels_last, shape (N, O, OH, OW).
        first: of the channels of ``out`` that are written.
        relu: rectify.
        pool: then take the maximum of each 2x2 outputs.
        turned: convolve with the weight of the input's gradient, (C, O / groups, ...) turned round.
        x_mask: a bit for each element of x in the order of memory, 0 where it counts as zero.
        out_mask: gets a bit for each output, whether ReLU passes its gradient.
    """
    u = transformed(weight, groups, cache, turned=turned)
    bias = None if bias is None else bias.contiguous()
    largest = torch.ops.fastcnn_cpu.winograd(
        x, x_mask, u, bias, addend, out, first, out_mask, weight.shape[2], padding, groups, relu, pool
    )
    return largest if math.isfinite(largest) else None


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    padding: list[int],
    groups: int,
    *,
    dy_mask: Tensor | None = None,
    with_bias: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias of ``conv2d(x, weight, bias, 1, padding, 1, groups)``, where it is found.

    The same bits for every number of threads up to 16. None where the weight's is not finite, as of :func:`convolve`.

    Args:
        x: shape (N, C, H, W).
        dy: gradient of the output, channels_last, shape (N, O, OH, OW).
        weight: as of :func:`convolve`; only its form counts.
        padding: zeros on both sides.
        groups: of channels.
        dy_mask: a bit for each element of dy in the order of memory, 0 where it counts as zero.
        with_bias: whether the bias's gradient is wanted.
    """
    outputs, channels = weight.shape[:2]
    panels = groups * math.ceil(channels / _PANEL) * math.ceil(outputs // groups / _PANEL)
    panels *= 1 if weight.shape[2] == 3 else 4
    pieces = max(_PIECES, torch.get_num_threads())
    parts = max(1, min(math.ceil(pieces / panels), _tiles(x.shape, weight, padding) // _TILES_OF_A_PART))
    dw = torch.empty_like(weight)
    terms = dw.unsqueeze(0) if parts == 1 else dw.new_empty_strided((parts, *dw.shape), (dw.numel(), *dw.stride()))
    db = dw.new_empty(parts, outputs) if with_bias else None
    largest = torch.ops.fastcnn_cpu.winograd_gradient(x, dy, dy_mask, terms, db, padding, groups)
    if not math.isfinite(largest):
        return None, None
    if parts > 1:
        torch.sum(terms, 0, out=dw)
    return dw, None if db is None else db.sum(0)


def transformed(weight: Tensor, groups: int, cache: Frozen | None = None, *, turned: bool = False) -> Tensor:
    """The weight as the kernel takes it, from the cache where there is one."""

    products = _PRODUCTS[tuple(weight.shape[2:])]

    def transform() -> Tensor:
        u = torch.empty(weight.numel() * products // weight.shape[2:].numel(), dtype=torch.float32, device="cpu")
        torch.ops.fastcnn_cpu.winograd_weight(weight.detach(), u, groups, turned)
        return u

    return transform() if cache is None else cache.get("winograd turned" if turned else "winograd", transform)
