"""The operators in plain PyTorch: their definition, the numerical truth of the tests, differentiable in any order.

16-bit inputs are computed in float32 and rounded once, at the end; float32 and float64 in themselves.
The names and arguments are those of :mod:`fastcnn.functional`. Also here is the random generator of everything that
happens to training pictures, :func:`philox4x32`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory_format import format_of, output
from .params import AugmentParams, BatchNormParams, IntOrPair, LRNParams, PoolParams, check_bias, check_input, opmath


def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, groups: int = 1
) -> Tensor:
    """``x / s**beta`` with ``s = k + alpha/size * sum(x**2)``; see :func:`fastcnn.functional.local_response_norm`."""
    lrn = LRNParams(size, alpha, beta, k, groups)
    check_input("local_response_norm", input)
    lrn.check_shape(input.shape)
    return normalized(input.to(opmath(input.dtype)), lrn).to(input.dtype)


def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """torch's own; see :func:`fastcnn.functional.max_pool2d`."""
    pool = PoolParams(kernel_size, stride, padding, dilation, ceil_mode)
    return F.max_pool2d(input, *pool.op_args(), return_indices=return_indices)  # type: ignore[call-overload]


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv2d(...))``; see :func:`fastcnn.functional.conv2d_relu`."""
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups).relu()


def relu_lrn_max_pool2d(
    input: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = True,
    lrn: LRNParams | None = None,
    pool: PoolParams | None = None,
) -> Tensor:
    """``max_pool(lrn(relu(x + bias)))``; see :func:`fastcnn.functional.relu_lrn_max_pool2d`."""
    check_input("relu_lrn_max_pool2d", input)
    check_bias("relu_lrn_max_pool2d", bias, input)
    if lrn is not None:
        lrn.check_shape(input.shape)
    y = rectified(input.to(opmath(input.dtype)), bias, relu)
    if lrn is not None:
        y = normalized(y, lrn)
    if pool is not None:
        pool.output_size(*input.shape[-2:])
        y = F.max_pool2d(y, *pool.op_args())
    return y.to(input.dtype, copy=y is input)


def batch_norm_relu_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    relu: bool = True,
    relu_first: bool = False,
    pool: PoolParams | None = None,
) -> Tensor:
    """``max_pool(relu(batch_norm(x)))``; see :func:`fastcnn.functional.batch_norm_relu_max_pool2d`."""
    norm = BatchNormParams(training, eps, relu, relu_first, pool)
    norm.check_tensors(input, running_mean, running_var, weight, bias)
    mean, var = statistics(input, running_mean, running_var, norm)
    if training:
        update_statistics(running_mean, running_var, mean.detach(), var.detach(), momentum, input)
    y = standardized(input.to(opmath(input.dtype)), mean, var, weight, bias, norm)
    if pool is not None:
        pool.output_size(*input.shape[-2:])
        y = F.max_pool2d(y, *pool.op_args())
    return y.to(input.dtype)


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, norm: BatchNormParams
) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel with which a batch norm normalizes, in the dtype it computes in."""
    x = x.to(opmath(x.dtype))
    if not norm.training:
        assert running_mean is not None
        assert running_var is not None
        return running_mean.to(x.dtype), running_var.to(x.dtype)
    if norm.relu and norm.relu_first:
        x = x.relu()
    if not x.numel():
        return x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    over = [0, *range(2, x.dim())]
    near = x.mean(over).detach()
    difference = x - _per_channel(near, x)  # from a number so close to the mean that nothing is lost
    shift = difference.mean(over)
    return near + shift, (difference - _per_channel(shift, x)).square().mean(over)


def update_statistics(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, momentum: float, input: Tensor
) -> None:
    """Move the running statistics, in place, towards those of a batch, with its unbiased variance."""
    if running_mean is None or running_var is None or not input.numel():
        return
    count = input.numel() // input.shape[1]
    for running, new in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
        if not torch.compiler.is_compiling():
            running = running.data  # as for torch's own, autograd does not count it as a change in place
        if running.dtype == new.dtype:
            running.lerp_(new, momentum)
        else:
            running.copy_(running.to(new.dtype).lerp(new, momentum))


def standardized(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, norm: BatchNormParams
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, rectified before or after if it is, in the dtype of ``x``."""
    if norm.relu and norm.relu_first:
        x = x.relu()
    scale = (var + norm.eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(x.dtype)
    y = (x - _per_channel(mean, x)) * _per_channel(scale, x)
    if bias is not None:
        y = y + _per_channel(bias.to(x.dtype), x)
    return y.relu() if norm.relu and not norm.relu_first else y


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


def rectified(x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """``relu(x + bias)``, either of them optional, in the dtype of ``x``."""
    if bias is not None:
        x = x + bias.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
    return x.relu() if relu else x


def _window_sum(x: Tensor, before: int, after: int, groups: int) -> Tensor:
    """Sum over channels ``c - before ... c + after`` of the same group, re-added for every window."""
    x = x.unflatten(1, (groups, -1))
    channels = x.shape[2]
    before, after = min(before, channels), min(after, channels)
    padded = F.pad(x, [0, 0] * (x.dim() - 3) + [before, after])
    window = torch.zeros_like(x)
    for i in range(before + after + 1):
        window = window + padded.narrow(2, i, channels)
    return window.flatten(1, 2)


def _scale(x: Tensor, lrn: LRNParams) -> Tensor:
    before, after = lrn.size // 2, (lrn.size - 1) // 2
    return lrn.k + lrn.alpha / lrn.size * _window_sum(x * x, before, after, lrn.groups)


def normalized(x: Tensor, lrn: LRNParams) -> Tensor:
    """:func:`local_response_norm`, in the dtype of ``x``."""
    return x / _scale(x, lrn) ** lrn.beta if x.numel() else x.clone()


def lrn_backward(dy: Tensor, x: Tensor, lrn: LRNParams) -> Tensor:
    """Gradient of :func:`local_response_norm`, for wide dtypes, as a formula.

    ``dx = dy * s**-beta - 2 * alpha * beta / size * x * sum(dy * x * s**(-beta-1))``, the sum over the windows that
    hold the channel: those of ``c - (size-1)//2 ... c + size//2``.
    """
    if not x.numel():
        return dy.clone()
    s = _scale(x, lrn)
    before, after = (lrn.size - 1) // 2, lrn.size // 2
    q = _window_sum(dy * x * s ** (-lrn.beta - 1), before, after, lrn.groups)
    return dy * s**-lrn.beta - 2 * lrn.alpha * lrn.beta / lrn.size * x * q


def window_offsets(x: Tensor, pool: PoolParams) -> tuple[Tensor, Tensor]:
    """Max-pool ``x``; also each maximum's place in its unclipped window, ``kh*KW + kw``, as int64."""
    (_, kw), (sh, sw), (ph, pw), (dh, dw), _ = pool.op_args()
    y, flat = F.max_pool2d(x, *pool.op_args(), return_indices=True)
    oh = torch.arange(y.shape[-2], device=x.device).view(-1, 1)
    ow = torch.arange(y.shape[-1], device=x.device)
    row, column = flat // x.shape[-1], flat % x.shape[-1]
    return y, (row - oh * sh + ph) // dh * kw + (column - ow * sw + pw) // dw


def flat_indices(argmax: Tensor, width: int, pool: PoolParams) -> Tensor:
    """torch's indices ``h*W + w`` from places in the window; the inverse of :func:`window_offsets`."""
    (_, kw), (sh, sw), (ph, pw), (dh, dw), _ = pool.op_args()
    oh = torch.arange(argmax.shape[-2], device=argmax.device).view(-1, 1)
    ow = torch.arange(argmax.shape[-1], device=argmax.device)
    place = argmax.long()
    return (oh * sh - ph + place // kw * dh) * width + ow * sw - pw + place % kw * dw


def max_pool2d_backward(dy: Tensor, argmax: Tensor, size: tuple[int, int], pool: PoolParams) -> Tensor:
    """Each input element gathers the gradients of the windows whose maximum it was: no atomics, one fixed order."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), _ = pool.op_args()
    oh, ow = dy.shape[-2:]
    padded = dy.new_zeros(
        *dy.shape[:-2],
        max(size[0] + ph, (oh - 1) * sh + (kh - 1) * dh + 1) + ph,
        max(size[1] + pw, (ow - 1) * sw + (kw - 1) * dw + 1) + pw,
    )
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dh, i * dh + (oh - 1) * sh + 1, sh)
            columns = slice(j * dw, j * dw + (ow - 1) * sw + 1, sw)
            padded[..., rows, columns] += torch.where(argmax == i * kw + j, dy, 0)
    return padded[..., ph : ph + size[0], pw : pw + size[1]]


_PHILOX_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_PHILOX_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: int) -> Tensor:
    """Random words by Philox-4x32-10: a function without state, of which each counter gives four independent words.

    Ten rounds of ``(c0, c1, c2, c3) <- (hi(m1*c2) ^ c1 ^ k0, lo(m1*c2), hi(m0*c0) ^ c3 ^ k1, lo(m0*c0))``, after each
    of which the key's halves ``k0, k1`` are increased by constants, modulo 2**32. Source: Salmon, Moraes, Dror, Shaw,
    "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), whose test vectors the tests check.

    Args:
        counter: int64 tensor of shape (..., 4), values from 0 to 2**32 - 1.
        key: from 0 to 2**64 - 1; its lower half is ``k0``.

    Returns:
        int64 tensor of the counter's shape, on its device, values from 0 to 2**32 - 1: the same ones everywhere.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key & _WORD, key >> 32
    (m0, m1), (w0, w1) = _PHILOX_MULTIPLIERS, _PHILOX_INCREMENTS
    for _ in range(10):
        first, second = c0 * m0, c2 * m1  # 64 bits each, as which int64 wraps
        c0, c1 = (second >> 32) & _WORD ^ c1 ^ k0, second & _WORD
        c2, c3 = (first >> 32) & _WORD ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + w0) & _WORD, (k1 + w1) & _WORD
    return torch.stack((c0, c1, c2, c3), -1)


def augment(
    input: Tensor,
    offsets: Tensor,
    mirror: Tensor,
    mean: Tensor,
    sizes: Tensor | None = None,
    *,
    crop: IntOrPair,
    scale: Sequence[float] = (1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """``(crop(resize(pixels)) - mean) * scale``; see :func:`fastcnn.functional.augment`.

    Difference and product are rounded to float32 each, and the result to ``dtype``: these are the bits of every
    backend, unless there are ``sizes``. (A float64 result is computed in float64.) A resized pixel is the sum of ``v *
    h * pixel`` over the pixels of the picture, here in float64 and then rounded once, with weights ``v`` of its row and
    ``h`` of its column, which are ``a(i) / sum(a)`` with integers ``a``: new pixel ``o`` of an axis that goes from
    ``length`` to ``size`` pixels has ``a(i) = max(0, 2 * max(length, size) - abs((2 * i + 1) * size - (2 * o + 1) *
    length))``. This is the triangle filter of ``F.interpolate(mode="bilinear", antialias=True, align_corners=False)``.
    """
    params = AugmentParams(crop, scale, dtype, memory_format)
    params.check_tensors(input, offsets, mirror, mean, sizes)
    params.check_values(input.shape, offsets, sizes)
    return augmented(input, offsets, mirror, mean, sizes, params)


def augmented(
    input: Tensor, offsets: Tensor, mirror: Tensor, mean: Tensor, sizes: Tensor | None, params: AugmentParams
) -> Tensor:
    """:func:`augment` of checked arguments."""
    (ch, cw), scale, dtype, channels_last = params.op_args()
    wide, device, (_, height, width, _) = opmath(dtype), input.device, input.shape
    offsets, mirror, mean = offsets.to(device), mirror.to(device)[:, None], mean.to(device, wide)
    rows = offsets[:, :1] + torch.arange(ch, device=device)
    along = torch.arange(cw, device=device)
    columns = offsets[:, 1:] + torch.where(mirror, cw - 1 - along, along)
    if sizes is None:
        pixels = _at(input, rows, columns).to(wide)
    else:
        sizes = sizes.to(device)
        sums = torch.zeros(input.shape[0], ch, cw, 3, dtype=torch.float64, device=device)
        for r, v in _taps(rows, height, sizes[:, :1]):
            for c, h in _taps(columns, width, sizes[:, 1:]):
                sums += _at(input, r, c) * (v[:, :, None] * h[:, None, :])[..., None]
        pixels = sums.to(wide)
    y = (pixels - mean[:, None, None]) * torch.tensor(scale, dtype=wide, device=device)
    return output(y.permute(0, 3, 1, 2).to(dtype), format_of(channels_last))


def _at(pictures: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Of each picture the pixels in these rows and columns."""
    each = torch.arange(pictures.shape[0], device=pictures.device)[:, None, None]
    return pictures[each, rows[:, :, None], columns[:, None, :]]


def _taps(places: Tensor, length: int, sizes: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The pixels that each place is made of, in an axis that goes from ``length`` to ``sizes``, and their weights."""
    reach = 2 * sizes.clamp(min=length)
    centre = (2 * places + 1) * length
    first = (centre - reach - sizes).div(2 * sizes, rounding_mode="floor") + 1
    count = int((-(-reach // sizes)).max()) if places.numel() else 0
    pixels = [first + i for i in range(count)]
    weights = [
        (reach - ((2 * i + 1) * sizes - centre).abs()).clamp(min=0).where((i >= 0) & (i < length), 0) for i in pixels
    ]
    total = torch.stack(weights).sum(0) if weights else places
    return [(i.clamp(0, length - 1), a.double() / total) for i, a in zip(pixels, weights, strict=True)]
