"""What :func:`fastcnn.optimize` puts in the place of calls in a row: a convolution or a linear layer and more."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory_format import as_new, output_format
from ..ops.cpu import onednn
from ..ops.linear import linear
from ..ops.packed import unchanged
from ..ops.register import needs_grad
from ..ops.stage import fastest_stage, fastest_tail, rectifies_by_itself, run_norm, run_tail
from ..params import ConvParams, LRNParams, PoolParams, TailParams
from .inference import Convolution, Linear, Tail, normalized

Run = Callable[..., Tensor]
# A convolution that is trained runs in NCHW, as its weight is, where reordering the weight takes longer than reordering
# the maps: with more weights than _WEIGHTS, and _WEIGHTS_PER_ELEMENT more for each element of the input.
_WEIGHTS, _WEIGHTS_PER_ELEMENT = 100_000, 8


class Stage:
    """Convolution? -> batch norm? -> sum? -> ReLU? -> LRN? -> max-pool? as one function.

    Args:
        conv: stride, padding, dilation and groups, as of :func:`torch.nn.functional.conv2d`; None for no convolution.
        eps: of a batch norm in evaluation mode; None for none.
        relu: whether to rectify.
        lrn: the normalization, None for none.
        pool: the pooling, None for none.
        inference: pack weights.
    """

    __name__ = "stage"  # torch.fx writes the calls of functions by name

    def __init__(
        self,
        conv: tuple[Any, ...] | None = None,
        eps: float | None = None,
        relu: bool = False,
        lrn: LRNParams | None = None,
        pool: PoolParams | None = None,
        *,
        inference: bool = False,
    ) -> None:
        self.conv, self.eps, self.relu, self.lrn, self.pool, self.inference = conv, eps, relu, lrn, pool, inference

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        norm: tuple[Tensor | None, ...] = (),
        addend: Tensor | None = None,
    ) -> Tensor:
        """``norm``: scale, shift, running mean and running variance of the batch norm."""
        if weight is None or self.conv is None:
            return run_tail(x, relu=self.relu, lrn=self.lrn, pool=self.pool)
        return self._way(x, weight, bias, norm, addend)(x, weight, bias, norm, addend)

    def _way(self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: tuple[Any, ...], addend: Tensor | None) -> Run:
        assert self.conv is not None
        format = _best_format(x, weight)
        if format == torch.channels_last and x.is_contiguous(memory_format=format):
            format = None
        x = x if format is None else x.contiguous(memory_format=format)
        if norm or addend is not None:
            return partial(self._composed, format)
        run = fastest_stage(x, weight, bias, *self.conv, relu=self.relu, lrn=self.lrn, pool=self.pool)
        return run if format is None else partial(_in_format, format, run)

    def _composed(
        self,
        format: torch.memory_format | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm: tuple[Any, ...],
        addend: Tensor | None,
    ) -> Tensor:
        assert self.conv is not None
        x = x if format is None else x.contiguous(memory_format=format)
        y = F.conv2d(x, weight, bias, *self.conv)
        if norm:
            scale, shift, mean, variance = norm
            y = F.batch_norm(y, mean, variance, scale, shift, eps=self.eps)  # type: ignore[arg-type]
        if addend is not None:
            y = y + addend
        if not self.relu:  # then nothing follows
            return y
        return run_tail(y, relu=True, lrn=self.lrn, pool=self.pool)

    def planned(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        norm: tuple[Any, ...] = (),
        addend: Tensor | None = None,
    ) -> Run | None:
        """What runs on arguments like these; None if there is nothing better than the stage itself.

        For inference that packs the parameters, which then have to stay as they are.
        """
        tail = TailParams(self.relu, self.lrn, self.pool)
        if weight is None or self.conv is None:
            if self.inference:
                return Tail.of(x, tail) if x.is_cpu and x.numel() else None
            return fastest_tail(x, relu=self.relu, lrn=self.lrn, pool=self.pool)
        if not self.inference:
            return self._way(x, weight, bias, norm, addend)
        if x.numel() == 0 or not _are_alike(x, weight, bias, *norm):
            return None
        if self.eps is not None:
            weight, bias = normalized(self.eps, weight, bias, *norm)
        if not x.is_cpu:
            run = self._way(x, weight, bias, (), addend)
            return partial(_with_parameters, run, weight, bias) if norm else run
        if not onednn.runs(x) or not unchanged(weight).get("is finite", lambda: bool(weight.isfinite().all())):
            return None  # zeros around a map would make NaN of infinite weights
        conv, asymmetric = ConvParams.of(x, weight, bias, *self.conv)
        if asymmetric:
            return None
        if addend is not None and not (
            _are_alike(x, addend) and list(addend.shape) == conv.output_shape(x.shape, weight.shape)
        ):
            return None
        return Convolution(self, x, weight, bias, conv, tail)


class NormStage(Stage):
    """Convolution? -> ReLU? -> batch norm -> ReLU? -> LRN? -> max-pool?, with gradients, and one ReLU at most.

    Args:
        conv: as of :class:`Stage`.
        norm: of the batch norm, whether it trains, momentum and eps.
        relu_first: whether the ReLU is the first.
        relu, lrn, pool: as of :class:`Stage`.
    """

    __name__ = "norm_stage"

    def __init__(
        self,
        conv: tuple[Any, ...] | None,
        norm: tuple[bool, float, float],
        relu: bool,
        relu_first: bool,
        lrn: LRNParams | None,
        pool: PoolParams | None,
    ) -> None:
        super().__init__(conv, None, relu, lrn, pool)
        self.norm, self.relu_first = norm, relu_first

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        norm: tuple[Tensor | None, ...] = (),
        addend: Tensor | None = None,
    ) -> Tensor:
        return self.planned(x, weight, bias)(x, weight, bias, norm)

    def planned(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        norm: tuple[Any, ...] = (),
        addend: Tensor | None = None,
    ) -> Run:
        if weight is None or self.conv is None:
            return partial(self._normalized, None, self.relu)
        convolution = Stage(self.conv, relu=self.relu_first and rectifies_by_itself(x, weight, bias, *self.conv))
        return partial(
            self._normalized, convolution._way(x, weight, bias, (), None), self.relu and not convolution.relu
        )

    def _normalized(
        self,
        convolve: Run | None,
        relu: bool,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        norm: tuple[Tensor | None, ...] = (),
    ) -> Tensor:
        scale, shift, mean, variance = norm
        y = x if convolve is None else convolve(x, weight, bias)
        parts: dict[str, Any] = {"relu_first": self.relu_first, "lrn": self.lrn, "pool": self.pool}
        return run_norm(y, (mean, variance), (scale, shift), *self.norm, relu=relu, **parts)


def _are_alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether they are of one dtype, and on one device."""
    return all(t is None or (t.device, t.dtype) == (x.device, x.dtype) for t in others)


def _with_parameters(
    run: Run,
    normalized_weight: Tensor,
    normalized_bias: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Any, ...] = (),
    addend: Tensor | None = None,
) -> Tensor:
    return run(x, normalized_weight, normalized_bias, (), addend)


def _best_format(x: Tensor, weight: Tensor) -> torch.memory_format | None:
    """The memory format in which a convolution is fastest; None: that of the input."""
    device = x.device.type
    if x.dim() != 4 or (device == "cpu" and torch.compiler.is_compiling()):
        return None
    if device != "cpu":  # a GPU's tensor cores read 16-bit maps in channels_last
        autocasts = device == "cuda" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocasts else x.dtype
        return torch.channels_last if dtype in (torch.float16, torch.bfloat16) else None
    if not weight.requires_grad or weight.numel() <= _WEIGHTS + _WEIGHTS_PER_ELEMENT * x.numel():
        return torch.channels_last
    # Without oneDNN, which torch uses neither for a single image this small nor, with one thread, for pointwise windows
    # and few images, a pointwise weight is fine in either format, and NCHW is slow with 2 to 15 pixels.
    is_small = len(x) == 1 and x.numel() <= 20480 and max(weight.shape[2:]) <= 3
    has_one_thread = torch.get_num_threads() == 1
    if weight.shape[2:] == (1, 1):
        gains_nothing = is_small or (has_one_thread and len(x) < 16)
    else:
        gains_nothing = is_small and 1 < x.shape[2:].numel() < 16 and (has_one_thread or weight.numel() < 1 << 20)
    return torch.channels_last if gains_nothing else torch.contiguous_format


def _in_format(
    format: torch.memory_format, run: Run, x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any
) -> Tensor:
    x = InFormat.apply(x, format, weight) if needs_grad(x) else as_new(x, format)
    # Between stages maps stay channels_last: one NCHW map would make every sum and concatenation after it NCHW.
    return run(x, weight, bias).contiguous(memory_format=torch.channels_last)


class InFormat(torch.autograd.Function):
    """``contiguous`` before a convolution, with the gradient in the format in which torch's convolution has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, format: torch.memory_format, weight: Tensor) -> Tensor:
        channels = weight.shape[1]
        by_weight = weight.is_contiguous(memory_format=torch.channels_last) and weight.stride(3) == channels > 1
        ctx.format = torch.channels_last if by_weight else output_format(x)
        return as_new(x, format)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy.contiguous(memory_format=ctx.format), None, None


class LinearStage:
    """Linear layer -> ReLU? -> factor, for inference.

    Args:
        relu: whether to rectify.
        factor: of the output.
    """

    __name__ = "linear_stage"

    def __init__(self, relu: bool = False, factor: float = 1.0) -> None:
        self.relu, self.factor = relu, factor

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weight, bias)
        y = y.relu() if self.relu else y
        return y if self.factor == 1 else y * self.factor

    def planned(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Run | None:
        """As of :class:`Stage`."""
        if not x.is_cpu or not _are_alike(x, weight, bias) or not onednn.runs(x):
            return None
        return Linear(x, weight, self.relu, self.factor)
