"""Local response normalization across channels: ``s = k + alpha/size * sum(x**2)``, ``y = x * s**-beta``."""

from typing import Any

from torch import Tensor

from .. import reference
from ..params import LRNParams, check_input
from .aten import lrn as aten
from .cpu import lrn as cpu
from .cuda import lrn as cuda
from .onnx import local_response_norm as composite
from .outputs import empty_output
from .overridable import overridable
from .register import define, double_backward
from .triton import lrn as triton


@overridable("input", composite=composite)
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
    lrn = LRNParams(size, alpha, beta, k, groups)
    lrn.check_shape(input.shape)
    return lrn_op(input, lrn)


def _setup_context(ctx: Any, inputs: tuple[Tensor, LRNParams], output: Tensor) -> None:
    x, ctx.lrn = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor]:
    (x,) = ctx.saved_tensors
    return (lrn_backward_op(dy, x, ctx.lrn),)


def _backward_setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, LRNParams], output: Tensor) -> None:
    dy, x, ctx.lrn = inputs
    ctx.save_for_backward(dy, x)


def _backward_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor, ...]:
    dy, x = ctx.saved_tensors
    size, alpha, beta, k, groups = ctx.lrn.op_args()

    def forward(x: Tensor) -> Tensor:
        return reference.local_response_norm(x, size, alpha, beta, k, groups=groups)

    return double_backward(forward, (x,), dy, (ddx,))


BACKENDS = {"reference": aten, "cpu": cpu, "triton": triton, "cuda": cuda}

lrn_backward_op = define(
    "lrn_backward(Tensor grad, Tensor input, {params}) -> Tensor",
    LRNParams,
    implementations={name: backend.backward for name, backend in BACKENDS.items()},
    fake=lambda dy, x, lrn: empty_output(x),
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    vmap=2,
)
lrn_op = define(
    "lrn(Tensor input, {params}) -> Tensor",
    LRNParams,
    implementations={name: backend.forward for name, backend in BACKENDS.items()},
    fake=lambda x, lrn: empty_output(x),
    setup_context=_setup_context,
    backward=_backward,
    vmap=1,
)
