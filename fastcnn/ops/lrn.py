"""Local response normalization across channels: ``s = k + alpha/size * sum(x**2)``, ``y = x * s**-beta``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..params import LRNParams, check_input, opmath
from ._layout import dense, empty_output, is_channels_last, kept, output, output_format
from ._operator import define, double_backward, fold_batch, unfold_batch
from ._triton import acc_dtype, cdiv, check_same, index_dtype, kernels, launch, vector


def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, groups: int = 1
) -> Tensor:
    r"""Local response normalization across channels, as :func:`torch.nn.functional.local_response_norm`.

    .. math:: y_c = x_c \Big(k + \frac{\alpha}{size} \sum_{c'} x_{c'}^2\Big)^{-\beta}, \quad
        c' = c - \lfloor size/2 \rfloor \dots c + \lfloor (size-1)/2 \rfloor

    The window ends at the borders of the channels, and of each group; the divisor stays ``size``. AlexNet as its
    authors ran it is ``size=5, alpha=1e-4, beta=0.75, k=2`` (the paper prints the plain sum: its formula needs
    ``alpha=5e-4``). :class:`fastcnn.nn.LocalResponseNorm` converts other conventions.

    Args:
        input: shape (N, C, *) with at least one dimension after the channels; float16, bfloat16, float32 or float64.
            Contiguous and channels_last tensors are read in place, others are copied first.
        size: window length in channels, at least 1; may exceed C.
        alpha: factor of the window's mean square.
        beta: exponent; 0.5, 0.75 and 1 are fast, others cost a ``pow`` an element.
        k: additive constant.
        groups: normalize within each of this many equal parts of the channels (2: inside AlexNet's towers).

    Returns:
        Tensor of the input's shape, dtype and memory format. 16-bit input is computed in float32. Unlike torch's,
        the result keeps the input's dtype under autocast.

    Raises:
        TypeError: an argument is of the wrong type.
        NotImplementedError: ``input`` is not of a supported dtype or layout.
        RuntimeError: ``size`` is not positive.
        ValueError: ``input`` has fewer than three dimensions, or ``groups`` is not positive or does not divide C.

    Source: Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural networks", 2012, 3.3.
    """
    check_input("local_response_norm", input)
    params = LRNParams(size, alpha, beta, k, groups)
    params.check_shape(input.shape)
    return lrn(input, *params.op_args())


def _reference(x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    y = reference.local_response_norm(x, size, alpha, beta, k, groups=groups)
    return output(y, output_format(x))


def _compiled(library: str, x: Tensor, *lrn: Any) -> Tensor:
    format = output_format(x)
    y = kept(empty_output(x))
    getattr(torch.ops, library).lrn(dense(x, format), y, is_channels_last(x), *lrn)
    return y


def _backward_reference(dy: Tensor, x: Tensor, *lrn: Any) -> Tensor:
    wide = opmath(x.dtype)
    dx = reference.lrn_backward(dy.to(wide), x.to(wide), LRNParams(*lrn))
    return output(dx.to(x.dtype), output_format(x))


def _backward_compiled(library: str, dy: Tensor, x: Tensor, *lrn: Any) -> Tensor:
    format = output_format(x)
    dx = kept(empty_output(x))
    getattr(torch.ops, library).lrn_backward(dense(dy, format), dense(x, format), dx, is_channels_last(x), *lrn)
    return dx


# Of the Triton kernels: lanes in a program, warps that they are spread over, and about how many channels a lane owns.
# The first is for channels_last, the second for NCHW; the others are what a GPU test checks too.
FORWARD_CONFIGS = [(256, 4, 8), (128, 4, 24), (128, 4, 16), (256, 8, 8)]
BACKWARD_CONFIGS = [(128, 4, 8), (128, 4, 16), (128, 4, 24), (256, 8, 8)]

# The longest window that a Triton program keeps in registers.
LONGEST_NEAR = 16


def triton_window(channels: int, size: int, alpha: float, beta: float, k: float, groups: int) -> dict[str, Any]:
    """The parameters of the normalization as the Triton kernels take them; ``channels`` of the input, not 0."""
    channels //= groups
    quarters = int(max(-32, min(32, 4 * beta)))
    return {
        "CHANNELS": channels,
        "BEFORE": min(size // 2, channels - 1),
        "AFTER": min((size - 1) // 2, channels - 1),
        "SCALE": alpha / size,
        "K": k,
        "QUARTERS": quarters,
        "REST": beta - quarters / 4,
    }


def is_near(window: dict[str, Any]) -> bool:
    """Whether this window of :func:`triton_window` fits into registers."""
    return window["BEFORE"] + 1 + window["AFTER"] <= LONGEST_NEAR


def share(x: Tensor, channels: int, most: int) -> tuple[int, int]:
    """How many of so many channels a lane owns, at most about ``most``, and how many of them it loads at once.

    Where they are vectors, all lanes own as many.
    """
    if not is_channels_last(x):
        return cdiv(channels, cdiv(channels, most)), 1
    width = vector(channels, x)
    vectors = max(n for n in range(1, max(1, most // width) + 1) if channels // width % n == 0)
    return vectors * width, width


def _run(x: Tensor, window: dict[str, Any], config: tuple[int, int, int], kernel: Any, *args: Any) -> None:
    """Launch one of the near kernels."""
    block, num_warps, most = config
    channels, channels_last = window["CHANNELS"], is_channels_last(x)
    v, width = share(x, channels, most)
    pixels = x.numel() // x.shape[1]
    parts = x.shape[1] // channels * cdiv(channels, v)
    launch(
        kernel,
        cdiv(pixels * parts, block) if channels_last else cdiv(pixels, block) * parts,
        *args,
        pixels,
        pixels // x.shape[0],
        C=x.shape[1],
        CHANNELS_LAST=channels_last,
        V=v,
        VECTOR=width,
        BLOCK=block,
        INDEX=index_dtype(pixels * parts if channels_last else pixels * parts // min(parts, block)),
        ACC=acc_dtype(x.dtype),
        num_warps=num_warps,
        **window,
    )


def _run_far(x: Tensor, window: dict[str, Any], kernel: Any, *args: Any, **constants: Any) -> None:
    stride = 1 if is_channels_last(x) else x[0, 0].numel()
    before, after = window["BEFORE"], window["AFTER"]
    constants |= {name: window[name] for name in ("CHANNELS", "SCALE", "K", "QUARTERS", "REST")}
    launch(
        kernel,
        cdiv(x.numel(), 256),
        *(*args, x.numel(), stride, before, after),
        BLOCK=256,
        ACC=acc_dtype(x.dtype),
        num_warps=4,
        **constants,
    )


def triton(x: Tensor, *lrn: Any, config: tuple[int, int, int] | None = None) -> Tensor:
    x, y = dense(x, output_format(x)), empty_output(x)
    if x.numel() == 0:
        return y
    window = triton_window(x.shape[1], *lrn)
    if is_near(window):
        _run(x, window, config or FORWARD_CONFIGS[not is_channels_last(x)], kernels("lrn").forward, x, y)
    else:
        _run_far(x, window, kernels("lrn").forward_far, x, x, y, GRADIENT=False)
    return y


def triton_backward(dy: Tensor, x: Tensor, *lrn: Any, config: tuple[int, int, int] | None = None) -> Tensor:
    check_same("lrn_backward", "grad", dy, x)
    dy, x, dx = dense(dy, output_format(x)), dense(x, output_format(x)), empty_output(x)
    if x.numel() == 0:
        return dx
    window = triton_window(x.shape[1], *lrn)
    if is_near(window):
        _run(x, window, config or BACKWARD_CONFIGS[not is_channels_last(x)], kernels("lrn").backward, dy, x, dx)
    else:
        terms = torch.empty_like(x, dtype=opmath(x.dtype))
        _run_far(x, window, kernels("lrn").forward_far, x, dy, terms, GRADIENT=True)
        _run_far(x, window, kernels("lrn").backward_far, dy, x, terms, dx)
    return dx


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.lrn = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return lrn_backward(dy, x, *ctx.lrn), None, None, None, None, None


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, *ctx.lrn = inputs
    ctx.save_for_backward(dy, x)


def _backward_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    dy, x = ctx.saved_tensors
    size, alpha, beta, k, groups = ctx.lrn

    def forward(x: Tensor) -> Tensor:
        return reference.local_response_norm(x, size, alpha, beta, k, groups=groups)

    return (*double_backward(forward, (x,), dy, (ddx,)), None, None, None, None, None)


def _vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *lrn_args: Any) -> tuple[Tensor, int]:
    return unfold_batch(
        torch.ops.fastcnn.lrn(fold_batch(x, in_dims[0], info.batch_size), *lrn_args), info.batch_size
    ), 0


def _backward_vmap(
    info: Any, in_dims: tuple[int | None, ...], dy: Tensor, x: Tensor, *lrn_args: Any
) -> tuple[Tensor, int]:
    dy, x = (fold_batch(t, dim, info.batch_size) for t, dim in zip((dy, x), in_dims, strict=False))
    return unfold_batch(torch.ops.fastcnn.lrn_backward(dy, x, *lrn_args), info.batch_size), 0


lrn_backward = define(
    "lrn_backward(Tensor grad, Tensor input, int size, float alpha, float beta, float k, int groups) -> Tensor",
    implementations={
        "reference": _backward_reference,
        "cpu": partial(_backward_compiled, "fastcnn_cpu"),
        "triton": triton_backward,
        "cuda": partial(_backward_compiled, "fastcnn_cuda"),
    },
    fake=lambda dy, x, *lrn: empty_output(x),
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    vmap=_backward_vmap,
)
lrn = define(
    "lrn(Tensor input, int size, float alpha, float beta, float k, int groups) -> Tensor",
    implementations={
        "reference": _reference,
        "cpu": partial(_compiled, "fastcnn_cpu"),
        "triton": triton,
        "cuda": partial(_compiled, "fastcnn_cuda"),
    },
    fake=lambda x, *lrn: empty_output(x),
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
)
