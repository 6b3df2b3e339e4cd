"""The mask of a ReLU, one bit for each element in the order of memory: whether it passes the gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory_format import flat


def pack(y: Tensor) -> Tensor:
    """The mask of a ReLU whose output is ``y``."""
    bits = F.pad(~(flat(y) <= 0), (0, -y.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, device=y.device)).sum(1).to(torch.uint8)


def unpack(mask: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """The mask as bool of this shape, (N, C, H, W)."""
    bits = ((mask.unsqueeze(1) >> torch.arange(8, device=mask.device)) & 1).bool().view(-1)[: shape.numel()]
    n, c, h, w = shape
    return bits.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else bits.view(shape)


def passes(dy: Tensor, y_or_mask: Tensor, x: Tensor | None, channels_last: bool) -> Tensor:
    """Where ReLU passes the gradient ``dy``, as bool: from the mask where the convolution's input was not saved."""
    return unpack(y_or_mask, dy.shape, channels_last) if x is None else ~(y_or_mask <= 0)
