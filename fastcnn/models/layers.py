"""Layers that only the networks need."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import convolution_arguments
from ..ops.linear import linear
from ..ops.stage import run_stage
from ..params import LRNParams, PoolParams


class ConvReLULRNMaxPool2d(nn.Conv2d):
    """A whole stage as one layer: a :class:`torch.nn.Conv2d` whose ``forward`` goes on to ReLU, LRN and max-pool.

    Of what lies between the convolution and the output as little as can be is written to memory.

    Args:
        args: those of :class:`torch.nn.Conv2d`.
        lrn: the normalization, None for none.
        pool: the pooling, None for none.
        options: those of :class:`torch.nn.Conv2d`.

    Shape: (N, C, H, W) -> (N, out_channels, OH, OW). See :func:`fastcnn.functional.relu_lrn_max_pool2d` for dtypes
    and errors.
    """

    def __init__(
        self, *args: Any, lrn: LRNParams | None = None, pool: PoolParams | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.lrn, self.pool = lrn, pool

    def forward(self, input: Tensor) -> Tensor:
        input, *arguments = convolution_arguments(self, input)
        return run_stage(input, *arguments, lrn=self.lrn, pool=self.pool)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lrn={self.lrn}, pool={self.pool}"


class Linear(nn.Linear):
    """A :class:`torch.nn.Linear` that on CPU trains in less time.

    Shape: (N, in_features) -> (N, out_features).
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class GroupedLocalResponseNorm(nn.LocalResponseNorm):
    """LRN within each of ``groups`` parts of the channels, in torch's own operators.

    They are those of :func:`torch.nn.functional.local_response_norm`, with the groups in the place of a singleton
    dimension. So it takes torch's time and memory and keeps channels_last, which calling torch's function on each
    group, or on a view with the groups in the batch, would not.
    """

    def __init__(self, size: int, alpha: float, beta: float, k: float, groups: int) -> None:
        super().__init__(size, alpha, beta, k)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        squares = input.mul(input).unflatten(1, (self.groups, -1))
        padded = F.pad(squares, (0, 0, 0, 0, self.size // 2, (self.size - 1) // 2))
        mean = F.avg_pool3d(padded, (self.size, 1, 1), stride=1).flatten(1, 2)
        return input / mean.mul(self.alpha).add(self.k).pow(self.beta)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


class PaperDropout(nn.Module):
    """Dropout as AlexNet's authors published it: mask in training, multiply by ``1 - p`` at test.

    :class:`torch.nn.Dropout` divides by ``1 - p`` in training instead and does nothing at test. It is no base class of
    this one, so that nothing that removes dropout layers for inference removes the factor.

    Args:
        p: probability of dropping a unit.

    Shape: any -> the same.

    Source: Krizhevsky et al. (2012), 4.2.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        # in training the factor takes back the rescaling of torch, which for p=0.5 is exact
        return (1 - self.p) * F.dropout(input, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"
