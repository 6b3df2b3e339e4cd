"""Convolution, bias and ReLU in one pass; where the weights are frozen, backward keeps one bit an output."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..params import ConvParams, IntOrPair, autocast
from . import _conv2d_relu_compiled as compiled
from . import _conv2d_relu_cuda as on_gpu
from . import _winograd
from ._layout import dense, empty_output, format_of, is_channels_last, kept, output, output_format
from ._operator import define, fold_batch, needs_grad, unfold_batch
from ._packed import Frozen, contents_of


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv2d(input, weight, bias, ...))``, with bias and ReLU in the convolution's epilogue.

    Where ``weight`` and ``bias`` ask for no gradient but ``input`` does (a frozen feature extractor), a bit mask is
    kept for backward instead of input and output.

    On CPU 3x3 windows with stride 1, float32 and channels_last, take 16 products for 4 outputs instead of 36.

    Args:
        input: shape (N, C, H, W) or (C, H, W); float16, bfloat16, float32 or float64.
        weight: shape (O, C / groups, KH, KW), of the input's dtype.
        bias: shape (O,), of the input's dtype. None: no bias.
        stride: of the window.
        padding: zeros on both sides; or ``"valid"``, or ``"same"`` where ``stride`` is 1.
        dilation: distance between the window's elements.
        groups: the channels are cut into this many equal parts that do not see each other (2: AlexNet's towers).

    Returns:
        Tensor of shape (N, O, OH, OW) or (O, OH, OW); dtype and memory format as the input. Under autocast the
        arguments are cast to its dtype first, as by torch's convolution.

    Raises:
        TypeError, RuntimeError, NotImplementedError: as torch, for the same arguments.

    Source: Krizhevsky et al. (2012), 3.1 and 3.5; Lavin and Gray (2016), Fast Algorithms for Convolutional Neural
    Networks.
    """
    input, weight, bias = autocast(input, weight, bias)
    conv, asymmetric = ConvParams.of(input, weight, bias, stride, padding, dilation, groups)
    if asymmetric:
        input = F.pad(input, asymmetric)
    batched = input if input.dim() == 4 else input.contiguous().unsqueeze(0)
    frozen = needs_grad(input) and not needs_grad(weight, bias)
    y = conv_relu(batched, weight, bias, *conv.op_args(), frozen)[0]
    return y if input.dim() == 4 else y.squeeze(0)


def _output_shape(x: Tensor, weight: Tensor, *conv: Any) -> list[int]:
    stride, padding, dilation, _ = conv
    spatial = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return [x.shape[0], weight.shape[0], *spatial]


def _empty_mask(y: Tensor, with_mask: bool) -> Tensor:
    return torch.empty((y.numel() + 7) // 8 if with_mask else 0, dtype=torch.uint8, device=y.device)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    *conv, with_mask = args
    y = empty_output(x, _output_shape(x, weight, *conv))
    return y, _empty_mask(y, with_mask)


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    *conv, with_mask = args
    y = output(torch.relu_(F.conv2d(x, weight, bias, *conv)), output_format(x))
    return y, _pack_bits(y) if with_mask else _empty_mask(y, False)


def _flat(y: Tensor) -> Tensor:
    """In the order of memory, which for a dense tensor is a view."""
    return (y.permute(0, 2, 3, 1) if is_channels_last(y) else y).reshape(-1)


def _pack_bits(y: Tensor) -> Tensor:
    """One bit an element, in the order of memory: whether ReLU passes the gradient."""
    bits = F.pad(~(_flat(y) <= 0), (0, -y.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, device=y.device)).sum(1).to(torch.uint8)


def _unpack_bits(mask: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    bits = ((mask.unsqueeze(1) >> torch.arange(8, device=mask.device)) & 1).bool().view(-1)[: shape.numel()]
    n, c, h, w = shape
    return bits.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else bits.view(shape)


def _onednn_runs(x: Tensor) -> bool:
    """oneDNN fuses the ReLU only for the dtypes its convolutions have on this machine; 16-bit ones need AVX-512."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled or x.numel() == 0:
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x.dtype == torch.float32 or (x.dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _magnitude(t: Tensor | None) -> float:
    """The largest absolute value, NaN if there is one."""
    if t is None or not t.numel():
        return 0.0
    low, high = torch.aminmax(_flat(t))
    return max(-low.item(), high.item()) if high == high else float("nan")


def _cannot_be_nan(x: Tensor, weight: Tensor, bias: Tensor | None, frozen: Frozen | None) -> bool:
    """oneDNN's ReLU makes 0 of NaN, so it may run only where all is finite and no sum can overflow.

    That is one read of the input, next to nothing beside a convolution. A NaN makes every comparison false.
    """
    of_weight = _magnitude(weight) if frozen is None else frozen.get("magnitude", lambda: _magnitude(weight))
    return _magnitude(x) * of_weight * weight[0].numel() + _magnitude(bias) < 1e38


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, groups, with_mask = args
    format = output_format(x)
    x = dense(x, format)
    bias = None if bias is None else bias.contiguous()
    # From packed weights oneDNN writes channels_last: of no use to NCHW.
    frozen = contents_of(weight) if _onednn_runs(x) and is_channels_last(x) else None
    if _winograd.runs(x, weight, stride, padding, dilation, groups):
        y, mask = _fake(x, weight, bias, *args)
        y, out_mask = kept(y, lasting=with_mask), mask if with_mask else None
        run = partial(_winograd.convolve, frozen=frozen, relu=True, out_mask=out_mask)
        if run(x, weight, bias, y, padding, groups) is not None:
            return y, mask
    if _onednn_runs(x) and _cannot_be_nan(x, weight, bias, frozen):
        if frozen is not None:
            weight = frozen.get("forward", lambda: _pack(weight, x, stride, padding, dilation, groups))
        y = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, groups, "relu", [], "")
    else:
        y = torch.relu_(F.conv2d(x, weight, bias, stride, padding, dilation, groups))
    y = output(y, format)
    mask = _empty_mask(y, with_mask)
    if with_mask:
        torch.ops.fastcnn_cpu.relu_mask(y, mask)
    return y, mask


def _pack(weight: Tensor, x: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """In the blocked format that oneDNN prefers for an input like ``x``; good for any."""
    return torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
        weight.detach().to_mkldnn(), padding, stride, dilation, groups, x.shape
    )


def _backward_fake(
    dy: Tensor, y_or_mask: Tensor, x: Tensor | None, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    size, channels_last, *_, needs = args
    format = format_of(channels_last)
    return (
        torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=format) if needs[0] else dy.new_empty(0),
        torch.empty_like(weight) if needs[1] else dy.new_empty(0),
        dy.new_empty(weight.shape[0]) if needs[2] else dy.new_empty(0),
    )


def _convolution_backward(dz: Tensor, x: Tensor | None, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    size, channels_last, stride, padding, dilation, groups, needs = args
    format = format_of(channels_last)
    if x is None:  # only its size counts where no weight gradient is wanted; memory never touched costs nothing
        x = torch.empty(size, dtype=dz.dtype, device=dz.device, memory_format=format)
    dx, dw, db = torch.ops.aten.convolution_backward(
        dz, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, needs
    )
    return (
        output(dx, format) if needs[0] else dz.new_empty(0),
        torch.empty_like(weight).copy_(dw) if needs[1] else dz.new_empty(0),
        db if needs[2] else dz.new_empty(0),
    )


def _backward_reference(
    dy: Tensor, y_or_mask: Tensor, x: Tensor | None, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dz = torch.where(_passes(dy, y_or_mask, x, args[1]), dy, 0)
    return _convolution_backward(dz, x, weight, *args)


def _passes(dy: Tensor, y_or_mask: Tensor, x: Tensor | None, channels_last: bool) -> Tensor:
    """Where ReLU passes the gradient, as bool; from the mask where the input was not kept."""
    return _unpack_bits(y_or_mask, dy.shape, channels_last) if x is None else ~(y_or_mask <= 0)


def _backward_cpu(
    dy: Tensor, y_or_mask: Tensor, x: Tensor | None, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *rest, needs = args
    dy = dense(dy, format_of(args[1]))
    mask, dz = y_or_mask if x is None else None, dy
    if mask is None:
        dz = kept(torch.empty_like(dy))
        torch.ops.aten.threshold_backward.grad_input(dy, y_or_mask, 0, grad_input=dz)
    dx = _input_gradient(dz, mask, weight, *rest) if needs[0] else None
    if dx is not None and not any(needs[1:]):
        return dx, dx.new_empty(0), dx.new_empty(0)
    if mask is not None:
        dz = _unmasked(dy, mask)
    grads = _convolution_backward(dz, x, weight, *rest, [needs[0] and dx is None, *needs[1:]])
    return grads if dx is None else (dx, *grads[1:])


def _unmasked(dy: Tensor, mask: Tensor) -> Tensor:
    dz = kept(torch.empty_like(dy))
    torch.ops.fastcnn_cpu.relu_mask_backward(dy, mask, dz)
    return dz


def _input_gradient(dy: Tensor, mask: Tensor | None, weight: Tensor, *args: Any) -> Tensor | None:
    """The gradient for the input, of that of the output where the mask passes it; None where nothing here is faster.

    With stride 1 it is a convolution too: each window turned round, input and output channels exchanged.
    """
    size, channels_last, stride, padding, dilation, groups = args
    padding = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    if stride != [1, 1] or min(padding) < 0 or not channels_last:
        return None
    frozen = contents_of(weight)
    if _winograd.runs(dy, weight, stride, padding, dilation, groups):
        dx = kept(torch.empty(size, dtype=dy.dtype, memory_format=torch.channels_last))
        run = partial(_winograd.convolve, frozen=frozen, turned=True, x_mask=mask)
        if run(dy, weight, None, dx, padding, groups) is not None:
            return dx
    if mask is None or frozen is None or not _onednn_runs(dy):
        return None

    def turned() -> Tensor:
        flipped = weight.detach().flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        return _pack(flipped.contiguous(), dy, stride, padding, dilation, groups)

    dx = torch.ops.mkldnn._convolution_pointwise(
        _unmasked(dy, mask), frozen.get("backward", turned), None, padding, stride, dilation, groups, "none", [], ""
    )
    return output(dx, format_of(channels_last))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, *ctx.conv, ctx.frozen = inputs
    y, mask = output
    ctx.frozen = ctx.frozen and not any(ctx.needs_input_grad[1:3])
    ctx.size, ctx.channels_last, ctx.has_bias = list(x.shape), is_channels_last(x), bias is not None
    ctx.save_for_backward(mask if ctx.frozen else y, None if ctx.frozen else x, weight)
    ctx.mark_non_differentiable(mask)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 5
    if dy is None:
        return None, None, None, *rest
    y_or_mask, x, weight = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = conv_relu_backward(dy, y_or_mask, x, weight, ctx.size, ctx.channels_last, *ctx.conv, needs)
    return *(g if wanted else None for g, wanted in zip(grads, needs, strict=True)), *rest


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, y_or_mask, x, weight, *ctx.args = inputs
    ctx.save_for_backward(dy, y_or_mask, x, weight)
    ctx.set_materialize_grads(False)


def _backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    # ReLU is piecewise linear: given its mask, backward is bilinear in (dy, weight) and (dy, x).
    # Written out, because torch 2.11 cannot differentiate a convolution twice when its sizes are symbols.
    dy, y_or_mask, x, weight = ctx.saved_tensors
    _, channels_last, *conv, needs = ctx.args
    ddx, ddweight, ddbias = (c if need else None for c, need in zip(cotangents, needs, strict=True))
    passes = _passes(dy, y_or_mask, x, channels_last)
    dz = torch.where(passes, dy, 0)

    def gradients(x: Tensor, weight: Tensor, *wanted: bool) -> tuple[Tensor, ...]:
        stride, padding, dilation, groups = conv
        return torch.ops.aten.convolution_backward(
            dz, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*wanted, False]
        )

    ddz, dx, dweight = [], None, None
    if ddx is not None:
        ddz.append(F.conv2d(ddx, weight, None, *conv))
        dweight = gradients(ddx, weight, False, True)[1] if ctx.needs_input_grad[3] else None
    if ddweight is not None:
        ddz.append(F.conv2d(x, ddweight, None, *conv))
        dx = gradients(x, ddweight, True, False)[0] if ctx.needs_input_grad[2] else None
    if ddbias is not None:
        ddz.append(ddbias.view(-1, 1, 1))
    return torch.where(passes, sum(ddz), 0) if ddz else None, None, dx, dweight, *(None,) * 7


def _vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Any:
    op = torch.ops.fastcnn.conv2d_relu
    if in_dims[1] is None and in_dims[2] is None and not args[-1]:
        y, mask = op(fold_batch(x, in_dims[0], info.batch_size), weight, bias, *args)
        return (unfold_batch(y, info.batch_size), mask), (0, None)
    return _one_by_one(op, info, in_dims, (x, weight, bias, *args))


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return _one_by_one(torch.ops.fastcnn.conv2d_relu_backward, info, in_dims, args)


def _one_by_one(op: Any, info: Any, in_dims: Any, args: tuple[Any, ...]) -> Any:
    def element(i: int) -> tuple[Tensor, ...]:
        return op(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)))

    columns = zip(*(element(i) for i in range(info.batch_size)), strict=True)
    results = tuple(torch.stack(column) for column in columns)
    return results, (0,) * len(results)


def _engine(backend: str, device: torch.device) -> str:
    """What computes the convolutions, forward and backward: rarely a kernel of ours."""
    if device.type == "cuda" and backend != "reference":
        return on_gpu.engine(backend)
    if backend != "cpu":
        return backend
    library = "oneDNN" if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled else "aten"
    return library if backends.cpu_capability() == "baseline" else f"{library}, 3x3 also Winograd"


_CONV = "int[] stride, int[] padding, int[] dilation, int groups"
conv_relu_backward = define(
    "conv2d_relu_backward(Tensor grad, Tensor output_or_mask, Tensor? input, Tensor weight, SymInt[] input_size, "
    f"bool channels_last, {_CONV}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    implementations={
        "reference": _backward_reference,
        "cpu": _backward_cpu,
        "triton": on_gpu.backward,
        "cuda": _backward_reference,
    },
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    vmap=_backward_vmap,
    engine=lambda backend, device: "cuDNN" if device.type == "cuda" else _engine(backend, device),
)
conv_relu = define(
    f"conv2d_relu(Tensor input, Tensor weight, Tensor? bias, {_CONV}, bool with_mask) -> (Tensor, Tensor)",
    implementations={"reference": _reference, "cpu": _cpu, "triton": on_gpu.forward, "cuda": compiled.forward},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    engine=_engine,
)
