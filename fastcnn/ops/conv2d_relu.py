"""Convolution, bias and ReLU in one pass; where the weights are frozen, one bit per output is saved for backward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..memory_format import is_channels_last
from ..params import ConvBackwardParams, ConvParams, IntOrPair, autocast
from . import outputs, relu_mask
from . import select_conv2d_relu as select
from .aten import conv2d_relu as aten
from .cpu import conv2d_relu as cpu
from .cuda import conv2d_relu as cuda
from .cudnn import conv2d_relu as cudnn
from .overridable import overridable
from .register import define, fold_batch, needs_grad, one_by_one, unfold_batch
from .triton import conv2d_relu as triton


@overridable("input", "weight", "bias", composite=reference.conv2d_relu)
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
    saved for backward instead of input and output.

    On CPU 3x3 windows with stride 1 and float32 take 16 products for 4 outputs instead of 36, 5x5 windows 49 instead of
    100, and so do the gradients of input and weight: in channels_last, to which NCHW is converted where that pays.

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
    with_mask = needs_grad(input) and not needs_grad(weight, bias)
    y = conv_op(batched, weight, bias, conv, with_mask)[0]
    return y if input.dim() == 4 else y.squeeze(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.conv, with_mask = inputs
    y, mask = output
    masked = with_mask and not any(ctx.needs_input_grad[1:3])
    ctx.size, ctx.channels_last, ctx.has_bias = list(x.shape), is_channels_last(x), bias is not None
    ctx.save_for_backward(mask if masked else y, None if masked else x, weight)
    ctx.mark_non_differentiable(mask)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    y_or_mask, x, weight = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    params = ConvBackwardParams(ctx.size, ctx.channels_last, ctx.conv, needs)
    grads = conv_backward_op(dy, y_or_mask, x, weight, params)
    return tuple(g if wanted else None for g, wanted in zip(grads, needs, strict=True))


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.params = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    # ReLU is piecewise linear: given its mask, backward is bilinear in (dy, weight) and (dy, x).
    # Written out, because torch 2.11 cannot differentiate a convolution twice when its sizes are symbols.
    dy, y_or_mask, x, weight = ctx.saved_tensors
    ddx, ddweight, ddbias = (c if need else None for c, need in zip(cotangents, ctx.params.needs, strict=True))
    passes = relu_mask.passes(dy, y_or_mask, x, ctx.params.channels_last)
    dz = torch.where(passes, dy, 0)

    conv = ctx.params.conv.op_args()

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
    return torch.where(passes, sum(ddz), 0) if ddz else None, None, dx, dweight


def _vmap(
    info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvParams, with_mask: bool
) -> Any:
    op = torch.ops.fastcnn.conv2d_relu
    if in_dims[1] is None and in_dims[2] is None and not with_mask:
        x = fold_batch(x, in_dims[0], info.batch_size)
        y, mask = op(x, weight, bias, *conv.op_args(), with_mask)
        return (unfold_batch(y, info.batch_size), mask), (0, None)
    return one_by_one(lambda *tensors: op(*tensors, *conv.op_args(), with_mask), info, in_dims, (x, weight, bias))


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    *tensors, params = args
    op = torch.ops.fastcnn.conv2d_relu_backward
    return one_by_one(lambda *element: op(*element, *params.op_args()), info, in_dims, tensors)


BACKENDS = {"reference": aten, "cpu": cpu, "cudnn": cudnn, "triton": triton, "cuda": cuda}

# Gradients of convolutions are those of oneDNN and cuDNN; on GPUs a Triton kernel takes care of ReLU and bias.
conv_backward_op = define(
    "conv2d_relu_backward(Tensor grad, Tensor output_or_mask, Tensor? input, Tensor weight, {params})"
    " -> (Tensor, Tensor, Tensor)",
    ConvBackwardParams,
    implementations={
        "reference": aten.backward,
        "cpu": cpu.backward,
        "cudnn": cudnn.backward,
        "triton": cudnn.backward,
        "cuda": aten.backward,
    },
    fake=lambda dy, y_or_mask, x, weight, params: outputs.convolution_gradients(dy, weight, params),
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    vmap=_backward_vmap,
    select={"cudnn": select.select_backward},
    engine=select.backward_engine,
)
conv_op = define(
    "conv2d_relu(Tensor input, Tensor weight, Tensor? bias, {params}, bool with_mask) -> (Tensor, Tensor)",
    ConvParams,
    implementations={name: backend.forward for name, backend in BACKENDS.items()},
    fake=lambda x, weight, bias, conv, with_mask: outputs.convolved(x, weight, conv, with_mask),
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    select={"cudnn": select.select, "triton": select.select},
    engine=select.engine,
)
