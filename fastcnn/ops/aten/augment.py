"""Augmentation in plain PyTorch."""

from torch import Tensor

from ... import reference
from ...params import AugmentParams


def forward(
    x: Tensor, offsets: Tensor, mirror: Tensor, mean: Tensor, sizes: Tensor | None, params: AugmentParams
) -> Tensor:
    params.check_values(x.shape, offsets, sizes)
    return reference.augmented(x, offsets, mirror, mean, sizes, params)
