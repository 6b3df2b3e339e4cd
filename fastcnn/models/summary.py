"""The layers of a model as a table: shapes, parameters, multiply-adds, and what runs each."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..nn import ConvReLU2d, LocalResponseNorm, MaxPool2d, ReLULRNMaxPool2d
from .layers import ConvReLULRNMaxPool2d
from .registry import create_model

# The operator that runs the first step of a fused layer, and the one that runs the others; None is torch, "conv2d" the
# convolution by itself.
OPERATORS: dict[type[nn.Module], tuple[str | None, str | None]] = {
    ConvReLU2d: ("conv2d_relu", "conv2d_relu"),
    ConvReLULRNMaxPool2d: ("conv2d", "relu_lrn_max_pool2d"),
    ReLULRNMaxPool2d: ("relu_lrn_max_pool2d", "relu_lrn_max_pool2d"),
    LocalResponseNorm: ("lrn", None),
    MaxPool2d: ("max_pool2d", None),
}


@dataclass(frozen=True)
class LayerRow:
    """One step of a network.

    Attributes:
        name: the module of the plain network.
        kind: its class.
        output: the shape of what it gives for one image: channels, height, width.
        parameters: how many.
        multiply_adds: for one image, as torchinfo counts them: of weights and biases.
        operator: of fastcnn that runs it, alone or fused with its neighbours; "conv2d" for the convolution of a layer
            whose rest is one operator; None for torch.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int
    operator: str | None


def layer_table(name: str, **options: Any) -> list[LayerRow]:
    """The layers of a model, in the order in which they run; nothing is computed or allocated.

    Args:
        name, options: as for :func:`create_model`, ``plain`` excepted.

    Raises:
        TypeError, ValueError: as :func:`create_model`.
        ImportError: torchinfo is not installed (it comes with ``fastcnn[models]``).
    """
    try:
        import torchinfo
    except ImportError:
        raise ImportError("the layer table needs the package torchinfo: pip install fastcnn[models]") from None
    with torch.device("meta"):
        plain, fused = (create_model(name, **options, plain=plain).eval() for plain in (True, False))
        size = plain.input_size
        assert isinstance(size, int)
        statistics = torchinfo.summary(plain, (1, 3, size, size), device="meta", verbose=0, depth=9)
    operators = _operators(plain, fused)
    names = {module: name for name, module in plain.named_modules()}
    return [
        LayerRow(
            names[layer.module],
            layer.class_name,
            tuple(layer.output_size[1:]),
            max(layer.num_params, 0),
            layer.macs,
            operators[names[layer.module]],
        )
        for layer in statistics.summary_list
        if layer.is_leaf_layer and not isinstance(layer.module, nn.Identity)
    ]


def _operators(plain: nn.Module, fused: nn.Module) -> dict[str, str | None]:
    """What runs each layer of the plain network: a layer that the fused one does not have is part of the one before."""
    layers = dict(fused.named_modules())
    operators: dict[str, str | None] = {}
    rest: str | None = None
    for name, _ in plain.named_modules():
        if name in layers:
            operators[name], rest = OPERATORS.get(type(layers[name]), (None, None))
        else:
            operators[name] = rest
    return operators
