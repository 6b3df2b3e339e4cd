"""Augmentation by the C++ kernel."""

from typing import Any

import torch
from torch import Tensor

from ...params import AugmentParams
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
    _, scale, _, channels_last = params.op_args()
    tensors, y = params.dense(x, offsets, mirror, mean, sizes), kept(outputs.augmented(x, params))
    library.augment(*tensors, y, channels_last, *scale)
    return y
