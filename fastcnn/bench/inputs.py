"""The numbers that are computed with: random ones, or photographs and their feature maps."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import data, reference
from .augmentations import MEAN
from .cases import Case, Shape
from .operators import CONVOLUTIONS, LRN, OPERATORS, POOL, SHAPES, Convolution, he_weight

SOURCES = ("random", "photographs")


def check_source(case: Case, source: str) -> None:
    """Raise ValueError where the photographs give no input of this case."""
    if not OPERATORS[case.op].takes_pictures:
        _check_maps(case.shape, source)


def _check_maps(shape: Shape, source: str) -> None:
    if source == "photographs" and shape[1:] not in [usual[1:] for usual in SHAPES.values()]:
        maps = " or ".join(f"N,{c},{h},{w}" for _, c, h, w in SHAPES.values())
        raise ValueError(f"the photographs' feature maps are {maps}, not {','.join(map(str, shape))}")


@lru_cache(maxsize=4)
def features(shape: Shape, source: str, device: str) -> Tensor:
    """Input of an operator in float32: normal values, or feature maps of the photographs in AlexNet."""
    if source == "random":
        # the scale of conv1's outputs on raw pixels
        return torch.randn(shape, generator=seeded(0, device), device=device) * 64
    _check_maps(shape, source)
    with torch.no_grad():
        x = _convolved(images(shape[0]), CONVOLUTIONS["AlexNet conv1"])
        if shape[1:] != SHAPES["stage1"][1:]:
            x = reference.relu_lrn_max_pool2d(x, lrn=LRN, pool=POOL)
        if shape[1:] == SHAPES["stage2"][1:]:
            x = _convolved(x, CONVOLUTIONS["AlexNet conv2"])
    return x.to(device)


def _convolved(x: Tensor, layer: Convolution) -> Tensor:
    return F.conv2d(x, he_weight(layer.weight_shape), None, *layer.params.op_args())


def images(batch: int, size: int = 227) -> Tensor:
    """Raw pixels minus their mean: the four photographs' corners, then the mirror images, repeated at need."""
    photographs = data.photographs(size + 29).float() - torch.tensor(MEAN).view(3, 1, 1)
    corners = [photographs[..., top : top + size, left : left + size] for top in (0, 29) for left in (0, 29)]
    crops = torch.cat([*corners, *(corner.flip(-1) for corner in corners)])
    return crops.repeat(-(-batch // len(crops)), 1, 1, 1)[:batch]


def seeded(seed: int, device: str = "cpu") -> torch.Generator:
    """A generator that always gives the same numbers."""
    return torch.Generator(device).manual_seed(seed)
