"""Augmentation by the C++ kernel."""

from typing import Any

import torch
from torch import Tensor

from ...params import AugmentParams, opmath
from .. import outputs
from .memory import kept

CPU = torch.ops.fastcnn_cpu


def forward(
    x: Tensor,
    offsets: Tensor,
    mirror: Tensor,
    mean: Tensor,
    sizes: Tensor | None,
    params: AugmentParams,
    library: Any = CPU,
) -> Tensor:
    params.check_values(x.shape, offsets, sizes)
    _, scale, dtype, channels_last = params.op_args()
    y = kept(outputs.augmented(x, params))
    choices = (None if t is None else t.to(x.device).contiguous() for t in (offsets, mirror, sizes))
    offsets, mirror, sizes = choices
    mean = mean.to(x.device, opmath(dtype)).contiguous()
    library.augment(x.contiguous(), offsets, mirror, mean, sizes, y, channels_last, *scale)
    return y
