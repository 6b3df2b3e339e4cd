"""The numbers the cases run on: random ones, or the feature maps of real photographs."""

from functools import lru_cache
from math import prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import data, reference
from .cases import DTYPES, FORMATS, LRN, POOL, SHAPES, Case, Shape

SOURCES = ("random", "photographs")
CHECKED_IMAGES = 4  # LRN and pooling act on each image alone, so the first few stand for the batch

_MEAN = (123.68, 116.78, 103.94)  # of ImageNet's pixels: red, green, blue


def make_inputs(case: Case, source: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The input of the case and the gradient of its output, both in the case's dtype and memory format.

    Where the two largest values of a tail's pooling window are too close to tell apart after rounding, the gradient is
    zero: which of them gets it would depend on the last bit, and no comparison of input gradients could be exact. So it
    is where the sign of a convolution's sum is in doubt.
    """
    x = _features(case.shape, source, device).to(DTYPES[case.dtype], memory_format=FORMATS[case.format], copy=True)
    dy = torch.randn(case.output_shape, generator=_seeded(1, device), device=device)
    if case.op == "relu_lrn_max_pool2d" and case.mode != "forward":
        dy[:CHECKED_IMAGES] *= _decided(x[:CHECKED_IMAGES])
    if case.op == "conv2d_relu" and case.mode != "forward":
        weight, bias = make_parameters(case, x.float())
        z = F.conv2d(x.float(), weight, bias, *convolution_args(case))
        dy *= z.abs() > 1e-4 * z.std()
    return x, dy.to(x.dtype).contiguous(memory_format=FORMATS[case.format])


def make_parameters(case: Case, x: Tensor) -> tuple[Tensor, ...]:
    """Weight and bias, if the operator has them: of the case's precision and format, and of ``x``'s dtype."""
    if case.weight_shape is None:
        return ()
    weight, bias = _he_weight(case.weight_shape), torch.ones(case.weight_shape[0])
    weight = weight.to(DTYPES[case.dtype], memory_format=FORMATS[case.format])
    return weight.to(x), bias.to(x)


def convolution_args(case: Case) -> tuple[list[int], list[int], list[int], int]:
    """What follows weight and bias in a call of the case's convolution."""
    return case.convolution.params.op_args()


def check_source(shape: Shape, source: str) -> None:
    """Raise ValueError where the photographs give no feature maps of this shape."""
    if source == "photographs" and shape[1:] not in [usual[1:] for usual in SHAPES.values()]:
        maps = " or ".join(f"N,{c},{h},{w}" for _, c, h, w in SHAPES.values())
        raise ValueError(f"the photographs' feature maps are {maps}, not {','.join(map(str, shape))}")


@lru_cache(maxsize=4)
def _features(shape: Shape, source: str, device: str) -> Tensor:
    if source == "random":
        # the scale of conv1's outputs on raw pixels
        return torch.randn(shape, generator=_seeded(0, device), device=device) * 64
    check_source(shape, source)
    with torch.no_grad():
        x = F.conv2d(images(shape[0]), _he_weight((96, 3, 11, 11)), stride=4)
        if shape[1:] != SHAPES["stage1"][1:]:
            x = reference.relu_lrn_max_pool2d(x, lrn=LRN, pool=POOL)
        if shape[1:] == SHAPES["stage2"][1:]:
            x = F.conv2d(x, _he_weight((256, 48, 5, 5)), padding=2, groups=2)
    return x.to(device)


def images(batch: int, size: int = 227) -> Tensor:
    """Raw pixels minus their mean: the four photographs' corners, then the mirror images, repeated at need."""
    photographs = data.photographs(size + 29).float() - torch.tensor(_MEAN).view(3, 1, 1)
    corners = [photographs[..., top : top + size, left : left + size] for top in (0, 29) for left in (0, 29)]
    crops = torch.cat([*corners, *(corner.flip(-1) for corner in corners)])
    return crops.repeat(-(-batch // len(crops)), 1, 1, 1)[:batch]


def _he_weight(shape: Shape) -> Tensor:
    return torch.randn(shape, generator=_seeded(2)) * sqrt(2 / prod(shape[1:]))


def _decided(x: Tensor) -> Tensor:
    """Whether the maximum of each pooling window stands out by more than the rounding of ``x``'s dtype."""
    z = reference.relu_lrn_max_pool2d(x.double(), lrn=LRN)
    (kh, kw), (sh, sw), *_ = POOL.op_args()
    largest = z.unfold(2, kh, sh).unfold(3, kw, sw).flatten(-2).topk(2).values
    return largest[..., 0] - largest[..., 1] > 8 * torch.finfo(x.dtype).eps * largest[..., 0]


def _seeded(seed: int, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
