"""What :func:`fastcnn.optimize` puts in the place of calls in a row: a convolution or a linear layer and more."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.cpu.memory import kept
from ..ops.packed import unchanged
from ..ops.stage import run_stage, run_tail
from ..params import ConvParams, LRNParams, PoolParams, TailParams
from .inference import Convolution, linear, normalized, runs_packed

_KINDS = 64  # of input, for which it is remembered how a stage runs


class Stage:
    """Convolution? -> batch norm? -> ReLU? -> LRN? -> max-pool? as one function of the input and the parameters.

    Args:
        conv: stride, padding, dilation and groups, as of :func:`torch.nn.functional.conv2d`; None for no convolution.
        eps: of a batch norm in evaluation mode; None for none.
        relu: whether to rectify.
        lrn: the normalization, None for none.
        pool: the pooling, None for none.
        inference: compute from packed copies of the parameters where they are frozen, and in channels_last.
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
        self._tail = None if lrn is None and pool is None else TailParams(relu, lrn, pool)
        self._kinds: dict[Any, Convolution | None] = {}

    def __call__(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *norm: Tensor | None
    ) -> Tensor:
        """``norm``: scale, shift, running mean and running variance of the batch norm."""
        if weight is None or self.conv is None:
            return run_tail(x, relu=self.relu, lrn=self.lrn, pool=self.pool)
        if self.inference:
            if runs_packed(x, weight, bias, *norm):
                y = self._packed(x, weight, bias, *norm)
                if y is not None:
                    return y
            x = x.contiguous(memory_format=torch.channels_last)
            if not weight.requires_grad and not weight.is_contiguous(memory_format=torch.channels_last):
                weight = unchanged(weight).get("channels_last", partial(_to_channels_last, weight))
        if self.eps is None:
            return run_stage(x, weight, bias, *self.conv, relu=self.relu, lrn=self.lrn, pool=self.pool)
        scale, shift, mean, variance = norm
        y = F.batch_norm(F.conv2d(x, weight, bias, *self.conv), mean, variance, scale, shift, eps=self.eps)
        if not self.relu:  # then nothing follows
            return y
        return run_tail(y, relu=True, lrn=self.lrn, pool=self.pool)

    def _packed(self, x: Tensor, weight: Tensor, bias: Tensor | None, *norm: Any) -> Tensor | None:
        """None where the batch norm makes a weight that is not finite, or padding is uneven."""
        if self.eps is not None:
            weight, bias = normalized(self.eps, weight, bias, *norm)  # type: ignore[assignment]
            if weight is None:
                return None
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = kept(torch.empty_like(x, memory_format=torch.channels_last)).copy_(x)
        kind = x.shape, x.dtype, weight.shape, torch.get_num_threads()
        if kind not in self._kinds:
            assert self.conv is not None
            conv, asymmetric = ConvParams.of(x, weight, bias, *self.conv)
            if len(self._kinds) == _KINDS:
                self._kinds.clear()
            self._kinds[kind] = None if asymmetric else Convolution(x, weight, conv, self.relu, self._tail)
        run = self._kinds[kind]
        return None if run is None else run(x, weight, bias)


def _to_channels_last(weight: Tensor) -> Tensor:
    return weight.to(memory_format=torch.channels_last)


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
        if runs_packed(x, weight, bias):
            return linear(x, weight, bias, self.relu, self.factor)
        y = F.linear(x, weight, bias)
        y = y.relu() if self.relu else y
        return y if self.factor == 1 else y * self.factor
