"""Convolutional stages, convolution -> batch norm? -> ReLU -> LRN? -> max-pool?, fused or from layers of torch."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

from torch import nn

from ..nn import ConvReLU2d, LocalResponseNorm, ReLULRNMaxPool2d
from ..params import LRNParams, PoolParams, pooled_size
from .layers import ConvReLULRNMaxPool2d, GroupedLocalResponseNorm


@dataclass(frozen=True)
class Stage:
    """One stage; its layers are ``pad``, ``conv``, ``bn``, ``relu``, ``norm`` and ``pool``, each followed by ``name``.

    ``pad_end`` zeros come on the right and at the bottom, before the ``padding`` of the convolution on every side.
    ``pool_first`` pools before it normalizes.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    pad_end: int = 0
    groups: int = 1
    bias: bool = True
    batch_norm: bool = False
    lrn: LRNParams | None = None
    pool: PoolParams | None = None
    pool_first: bool = False

    def convolution(self) -> dict[str, Any]:
        """The arguments of :class:`torch.nn.Conv2d`."""
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups", "bias")
        return {name: getattr(self, name) for name in names}


def scaled_channels(channels: int, width: float) -> int:
    """``width`` times as many, to the nearest even number but 0, so that two towers can share them."""
    return max(2, 2 * round(channels * width / 2))


def scaled_stages(stages: Sequence[Stage], width: float) -> list[Stage]:
    """The stages with all their channels scaled but those of the images."""
    scaled = [replace(stage, out_channels=scaled_channels(stage.out_channels, width)) for stage in stages]
    inputs = [stages[0].in_channels, *(stage.out_channels for stage in scaled)]
    return [replace(stage, in_channels=channels) for stage, channels in zip(scaled, inputs, strict=False)]


def build_features(stages: Sequence[Stage], *, plain: bool, numbered: bool = False) -> nn.Sequential:
    """The stages one after the other: a layer of torch for each step if ``plain``, otherwise few layers a stage.

    Parameters have the same keys and are drawn in the same order either way. ``numbered`` counts the steps, as
    torchvision's keys do, instead of naming them. A fused layer has the name or number of its first step.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    steps = 0
    for stage in stages:
        names = [f"{kind}{stage.name}" for kind in _steps(stage)]
        keys = {name: str(steps + i) if numbered else name for i, name in enumerate(names)}
        steps += len(names)
        for kind, layer in _plain_layers(stage) if plain else _fused_layers(stage):
            layers[keys[f"{kind}{stage.name}"]] = layer
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


def _steps(stage: Stage) -> list[str]:
    """The layers of torch that a stage consists of, in the order in which they run."""
    order = ("pad", "conv", "bn", "relu", *(("pool", "norm") if stage.pool_first else ("norm", "pool")))
    absent = {"pad": not stage.pad_end, "bn": not stage.batch_norm, "norm": not stage.lrn, "pool": not stage.pool}
    return [step for step in order if not absent.get(step)]


def _plain_layers(stage: Stage) -> Iterator[tuple[str, nn.Module]]:
    for step in _steps(stage):
        yield step, _plain_layer(stage, step)


def _plain_layer(stage: Stage, step: str) -> nn.Module:
    if step == "pad":
        return nn.ZeroPad2d((0, stage.pad_end, 0, stage.pad_end))
    if step == "conv":
        return nn.Conv2d(**stage.convolution())
    if step == "bn":
        return nn.BatchNorm2d(stage.out_channels)
    if step == "norm":
        assert stage.lrn is not None
        size, alpha, beta, k, groups = astuple(stage.lrn)
        one = nn.LocalResponseNorm(size, alpha, beta, k)
        return one if groups == 1 else GroupedLocalResponseNorm(size, alpha, beta, k, groups)
    if step == "pool":
        assert stage.pool is not None
        return nn.MaxPool2d(**asdict(stage.pool))
    return nn.ReLU()


def _fused_layers(stage: Stage) -> Iterator[tuple[str, nn.Module]]:
    """Each with its first step. LRN behind the pool stays a layer of its own."""
    norm_apart = stage.pool_first and stage.lrn is not None
    tail: dict[str, Any] = {"lrn": None if norm_apart else stage.lrn, "pool": stage.pool}
    has_tail = any(part is not None for part in tail.values())
    if stage.pad_end:
        yield "pad", _plain_layer(stage, "pad")
    if stage.batch_norm:
        yield "conv", _plain_layer(stage, "conv")
        yield "bn", _plain_layer(stage, "bn")
        yield "relu", ReLULRNMaxPool2d(**tail) if has_tail else nn.ReLU()
    elif has_tail:
        yield "conv", ConvReLULRNMaxPool2d(**stage.convolution(), **tail)
    else:
        yield "conv", ConvReLU2d(**stage.convolution())
    if norm_apart:
        assert stage.lrn is not None
        yield "norm", LocalResponseNorm(**asdict(stage.lrn))
