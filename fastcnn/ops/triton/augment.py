"""Launcher of the augmentation kernel."""

import torch
from torch import Tensor

from ...params import AugmentParams
from ..outputs import augmented
from .launch import acc_dtype, cdiv, kernels, launch
from .parameters import Augmentation

# Rows of a crop that a program goes through, how many it loads at once, elements of a row that it has, and its warps.
# The first is used, the others are what a GPU test checks too.
FORWARD_CONFIGS = [(64, 16, 128, 4), (64, 8, 128, 4), (32, 8, 64, 2)]


def forward(
    x: Tensor,
    offsets: Tensor,
    mirror: Tensor,
    mean: Tensor,
    sizes: Tensor | None,
    params: AugmentParams,
    *,
    config: tuple[int, int, int, int] | None = None,
) -> Tensor:
    (crop_h, crop_w), (red, green, blue), dtype, channels_last = params.op_args()
    x, offsets, mirror, mean, sizes = params.dense(x, offsets, mirror, mean, sizes)
    (rows, at_once, block, num_warps), y = config or FORWARD_CONFIGS[0], augmented(x, params)
    row_blocks, blocks = cdiv(crop_h, rows), cdiv(3 * crop_w, block)
    launch(
        kernels("augment").augment_kernel,
        len(x) * row_blocks * blocks,
        *(x, offsets, mirror.view(torch.uint8), mean, sizes, y),
        height=x.shape[1],
        width=x.shape[2],
        crop_h=crop_h,
        crop_w=crop_w,
        row_blocks=row_blocks,
        blocks=blocks,
        layout=Augmentation(red, green, blue, channels_last, sizes is not None, rows, at_once, block, acc_dtype(dtype)),
        num_warps=num_warps,
    )
    return y
