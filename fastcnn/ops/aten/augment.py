"""Augmentation in plain PyTorch."""

from torch import Tensor

from ... import reference
from ...params import AugmentParams


def forward(
    x: Tensor, offsets: Tensor, mirror: Tensor, mean: Tensor, sizes: Tensor | None, params: AugmentParams
) -> Tensor:
    return reference.augmented(*params.dense(x, offsets, mirror, mean, sizes), params)
