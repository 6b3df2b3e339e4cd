"""How weights and biases are drawn, a layer at a time."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

Layer = nn.Conv2d | nn.Linear
Initializer = Callable[[str, Layer], None]  # given the layer's name in the paper: conv1, fc6


@dataclass(frozen=True)
class Gaussian:
    """Weights from N(0, std^2); the biases of ``biased`` start at ``bias``, so that their ReLUs begin with positive
    inputs, and all others at 0. ``stds`` are the deviations of layers that have another one."""

    std: float = 0.01
    bias: float = 0.0
    biased: Collection[str] = ()
    stds: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, name: str, layer: Layer) -> None:
        nn.init.normal_(layer.weight, std=self.stds.get(name, self.std))
        _set_bias(layer, self.bias if name in self.biased else 0.0)

    def times(self, factor: float) -> "Gaussian":
        """The same with deviations ``factor`` times as large."""
        stds = {name: std * factor for name, std in self.stds.items()}
        return replace(self, std=self.std * factor, stds=stds)


def kaiming(name: str, layer: Layer) -> None:
    """He's normal initialization (fan in), biases 0."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    _set_bias(layer, 0.0)


def glorot(name: str, layer: Layer) -> None:
    """Glorot's uniform initialization, biases 0."""
    nn.init.xavier_uniform_(layer.weight)
    _set_bias(layer, 0.0)


@dataclass(frozen=True)
class CaffeXavier:
    """Caffe's filler of this name, of variance 1 / fan in; biases ``bias``, those of ``logits`` 0."""

    bias: float
    logits: Collection[str]

    def __call__(self, name: str, layer: Layer) -> None:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
        _set_bias(layer, 0.0 if name in self.logits else self.bias)


def _set_bias(layer: Layer, value: float) -> None:
    if layer.bias is not None:
        torch.nn.init.constant_(layer.bias, value)
