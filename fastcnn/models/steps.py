"""A network as a list of steps - convolutions, norms, pools, fully connected layers - so that two can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..nn import ReLULRNMaxPool2d
from ..params import LRNParams, PoolParams
from .layers import ConvReLULRNMaxPool2d, PaperDropout

Pair = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Window:
    """Of a convolution or a pool; ``padding`` in front of the map, ``padding_end`` behind it."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    padding_end: Pair
    ceil_mode: bool = False

    def rounding(self, ceil_mode: bool) -> Window:
        """The same but for ``ceil_mode``."""
        return replace(self, ceil_mode=ceil_mode)

    def map_size(self, size: int) -> int:
        """The height of the map behind it, by torch's rule."""
        span = size + self.padding[0] + self.padding_end[0] - self.dilation[0] * (self.kernel[0] - 1) - 1
        steps = -(-span // self.stride[0]) if self.ceil_mode else span // self.stride[0]
        # rounding up starts no window in the padding behind
        return steps + (not self.ceil_mode or steps * self.stride[0] < size + self.padding[0])


@dataclass(frozen=True)
class Step:
    """One step of a network.

    Args:
        kind: "convolution", "batch norm", "LRN", "max-pool" or "fully connected".
        name: of the module, or of the node in a file.
        tensors: parameters and running statistics by their names in torch.
        window, groups: of a convolution; of a pool its window.
        pad, pad_end: of a convolution, the module that adds zeros behind its input, and how many.
        lrn: of an LRN.
        input_scale: the factor that its input is multiplied by, as the paper's dropout does at test.
    """

    kind: str
    name: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    window: Window | None = None
    groups: int = 1
    pad: str = ""
    pad_end: int = 0
    lrn: LRNParams | None = None
    input_scale: float = 1.0


def steps_of(model: nn.Module) -> list[Step]:
    """The steps of a network, in the order in which its layers are registered."""
    steps: list[Step] = []
    pad, pad_end, scale = "", 0, 1.0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.ZeroPad2d):
            pad, pad_end = name, layer.padding[3]
        elif isinstance(layer, PaperDropout):
            scale *= 1 - layer.p
        elif isinstance(layer, nn.Conv2d):
            window = _window(layer, pad_end)
            steps.append(Step("convolution", name, _tensors(layer), window, layer.groups, pad, pad_end, None, scale))
            pad, pad_end, scale = "", 0, 1.0
        elif isinstance(layer, nn.Linear):
            steps.append(Step("fully connected", name, _tensors(layer), input_scale=scale))
            scale = 1.0
        elif isinstance(layer, nn.BatchNorm2d):
            steps.append(Step("batch norm", name, _tensors(layer)))
        elif isinstance(layer, nn.MaxPool2d):
            steps.append(Step("max-pool", name, window=_window(layer)))
        lrn = lrn_of(layer)
        if lrn is not None:
            steps.append(Step("LRN", name, lrn=lrn))
        if isinstance(layer, ConvReLULRNMaxPool2d | ReLULRNMaxPool2d) and layer.pool is not None:
            steps.append(Step("max-pool", name, window=_window(layer.pool)))
    return steps


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in layer.state_dict().items() if key != "num_batches_tracked"}


def lrn_of(layer: nn.Module) -> LRNParams | None:
    """The parameters of the layer's LRN, None if it has none."""
    if isinstance(layer, nn.LocalResponseNorm):
        return LRNParams(layer.size, layer.alpha, layer.beta, layer.k, getattr(layer, "groups", 1))
    return layer.lrn if isinstance(layer, ConvReLULRNMaxPool2d | ReLULRNMaxPool2d) else None


def set_lrn(layer: nn.Module, lrn: LRNParams) -> None:
    """Give the layer's LRN other parameters."""
    if isinstance(layer, ConvReLULRNMaxPool2d | ReLULRNMaxPool2d):
        layer.lrn = lrn
        return
    for name in ("size", "alpha", "beta", "k", "groups"):
        if hasattr(layer, name):  # torch's own has no groups
            setattr(layer, name, getattr(lrn, name))


def set_ceil_mode(layer: nn.Module, ceil_mode: bool) -> None:
    """Let the layer's pool round up, or down."""
    if isinstance(layer, ConvReLULRNMaxPool2d | ReLULRNMaxPool2d):
        assert layer.pool is not None
        layer.pool = replace(layer.pool, ceil_mode=ceil_mode)
    else:
        layer.ceil_mode = ceil_mode  # type: ignore[assignment]


def _window(layer: nn.Conv2d | nn.MaxPool2d | PoolParams, pad_end: int = 0) -> Window:
    kernel, padding = pair(layer.kernel_size), pair(layer.padding)
    stride = kernel if layer.stride is None else pair(layer.stride)
    end = (padding[0] + pad_end, padding[1] + pad_end)
    return Window(kernel, stride, padding, pair(layer.dilation), end, getattr(layer, "ceil_mode", False))


def pair(value: Any) -> Pair:
    """One int or two as a pair of ints."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
