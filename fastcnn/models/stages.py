"""Convolutional stages, convolution -> ReLU -> LRN? -> max-pool?, from fused layers or from those of torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from torch import nn

from ..nn import ConvReLU2d
from ..params import LRNParams, PoolParams, pooled_size
from .layers import ConvReLULRNMaxPool2d, GroupedLocalResponseNorm


@dataclass(frozen=True)
class Stage:
    """One stage; its layers are ``pad``, ``conv``, ``relu``, ``norm`` and ``pool``, each followed by ``name``.

    ``pad_end`` zeros come on the right and at the bottom, before the ``padding`` of the convolution on every side.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    pad_end: int = 0
    groups: int = 1
    lrn: LRNParams | None = None
    pool: PoolParams | None = None

    def convolution(self) -> dict[str, Any]:
        """The arguments of :class:`torch.nn.Conv2d`."""
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
        return {name: getattr(self, name) for name in names}


def build_features(stages: Sequence[Stage], *, plain: bool) -> nn.Sequential:
    """The stages one after the other: a layer of torch for each step if ``plain``, otherwise one layer a stage.

    Parameters have the same keys and are drawn in the same order either way.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for stage in stages:
        if stage.pad_end:
            layers[f"pad{stage.name}"] = nn.ZeroPad2d((0, stage.pad_end, 0, stage.pad_end))
        layers.update(_plain_layers(stage) if plain else _fused_layers(stage))
    return nn.Sequential(layers)


def map_sizes(stages: Sequence[Stage], size: int) -> dict[str, int]:
    """Height and width of the map behind each convolution and pool, by the layer's name, for images of ``size``.

    The map vanishes at the first layer whose size is not positive; what would follow is left out.
    """
    sizes: dict[str, int] = {}
    for stage in stages:
        size += stage.pad_end
        for layer, window in _windows(stage):
            size = pooled_size([size] * 2, *window)[0]
            sizes[layer] = size
            if size < 1:
                return sizes
    return sizes


def _windows(stage: Stage) -> Iterator[tuple[str, Any]]:
    """Kernel size, stride, padding, dilation and ceil_mode of the convolution and the pool."""
    convolution = (stage.kernel_size, stage.stride, stage.padding, 1)
    yield f"conv{stage.name}", (*([value] * 2 for value in convolution), False)
    if stage.pool is not None:
        yield f"pool{stage.name}", stage.pool.op_args()


def _fused_layers(stage: Stage) -> Iterator[tuple[str, nn.Module]]:
    if stage.lrn is None and stage.pool is None:
        yield f"conv{stage.name}", ConvReLU2d(**stage.convolution())
    else:
        yield f"conv{stage.name}", ConvReLULRNMaxPool2d(**stage.convolution(), lrn=stage.lrn, pool=stage.pool)


def _plain_layers(stage: Stage) -> Iterator[tuple[str, nn.Module]]:
    yield f"conv{stage.name}", nn.Conv2d(**stage.convolution())
    yield f"relu{stage.name}", nn.ReLU()
    if stage.lrn is not None:
        size, alpha, beta, k, groups = astuple(stage.lrn)
        one = nn.LocalResponseNorm(size, alpha, beta, k)
        yield f"norm{stage.name}", one if groups == 1 else GroupedLocalResponseNorm(size, alpha, beta, k, groups)
    if stage.pool is not None:
        yield f"pool{stage.name}", nn.MaxPool2d(**asdict(stage.pool))
