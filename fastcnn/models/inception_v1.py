"""InceptionV1, the GoogLeNet with LRN: Szegedy et al., "Going deeper with convolutions" (2015)."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn import MaxPool2d
from ..params import LRNParams, PoolParams, pooled_size
from ._checks import check_choice, check_images, check_input_size, check_positive, smallest_images
from .classifier import DROPOUTS
from .initialize import CaffeXavier, Initializer, Layer, kaiming
from .layers import Linear
from .preprocessing import CAFFE, Preprocessing
from .registry import register_model
from .stages import Stage, build_features, map_sizes

torch.fx.wrap("check_images")

# table 1: maps of 1x1; of the reduction and of 3x3; of the reduction and of 5x5; of the projection behind the pool
INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
INITS: dict[str, Initializer] = {"caffe": CaffeXavier(0.2, ("fc", "aux1.fc2", "aux2.fc2")), "kaiming": kaiming}


@register_model(input_size=224, dropout="inverted", init="caffe")
def inception_v1(*, aux: bool = False, ceil_mode: bool = True, **common: Any) -> InceptionV1:
    """GoogLeNet as published, with LRN and without batch norm; see :class:`InceptionV1` for the arguments."""
    return InceptionV1(**common, aux=aux, ceil_mode=ceil_mode)


class InceptionOutputs(NamedTuple):
    """What a network with auxiliary heads gives in training, each (N, num_classes); the paper weighs both heads 0.3."""

    logits: Tensor
    aux2: Tensor
    aux1: Tensor


class InceptionV1(nn.Module):
    """GoogLeNet as published: LRN, no batch norm; 6,998,552 parameters, 13,378,280 with its auxiliary heads.

    Layers and keys are named as in torchvision, whose network has batch norm instead of LRN and biases.

    Args:
        num_classes: number of logits.
        input_size: height and width of the images, 224 in the paper.
        dropout: "inverted" or "paper", see :func:`alexnet`; of 40% in front of the logits, of 70% in the heads.
        init: "caffe", that of Caffe's GoogLeNet: uniform weights of variance 1 / fan in, biases .2, those of logits 0.
            "kaiming": He's normal initialization.
        plain: build it from the layers of torch, none fused.
        aux: have the two auxiliary heads, which see 4a and 4d. They take part in training only, where the network then
            gives :class:`InceptionOutputs`.
        ceil_mode: let the last window of a pool end outside of the map, as published: maps of 112, 56, 28, 14 and 7.
            The conversion to ONNX of the published weights rounds down: 112, 55, 27, 13 and 6.

    Attributes:
        input_size, preprocessing: as in :class:`fastcnn.models.ConvNet`.

    Shape: (N, 3, input_size, input_size), in the parameters' dtype, contiguous or channels_last -> (N, num_classes).

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`fastcnn.models.ConvNet`.

    Source: Szegedy et al. (2015), table 1 and section 5; Caffe, models/bvlc_googlenet (LRN, initialization).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        input_size: int = 224,
        dropout: str = "inverted",
        init: str = "caffe",
        *,
        plain: bool = False,
        aux: bool = False,
        ceil_mode: bool = True,
    ) -> None:
        super().__init__()
        num_classes = check_positive("inception_v1", "num_classes", num_classes)
        check_choice("inception_v1", "dropout", dropout, DROPOUTS)
        for option, value in (("plain", plain), ("aux", aux), ("ceil_mode", ceil_mode)):
            check_choice("inception_v1", option, value, (False, True))
        pool = PoolParams(3, 2, ceil_mode=ceil_mode)
        self._smallest = smallest_images(lambda size: _map_sizes(size, pool, aux))
        self.input_size = check_input_size("inception_v1", input_size, self._smallest)
        self.preprocessing: Preprocessing = CAFFE
        for stage in _stem(pool):
            self.add_module(f"conv{stage.name}", build_features([replace(stage, name="")], plain=plain))
        before = 192
        for name, channels in INCEPTIONS.items():
            if name in ("4a", "5a"):
                self.add_module(f"maxpool{int(name[0]) - 1}", _pool(pool, plain))
            block = Inception(before, *channels, plain=plain)
            self.add_module(f"inception{name}", block)
            before = block.out_channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = DROPOUTS[dropout](0.4)
        self.fc = (nn.Linear if plain else Linear)(before, num_classes)
        if aux:
            side = _map_sizes(self.input_size, pool, aux)["aux1"]
            self.aux1 = AuxiliaryHead(512, side, num_classes, dropout, plain=plain)
            self.aux2 = AuxiliaryHead(528, side, num_classes, dropout, plain=plain)
        self.reset_parameters(init)

    def reset_parameters(self, init: str) -> None:
        """Draw weights and biases anew; ``init`` as for the class."""
        check_choice("inception_v1", "init", init, INITS)
        for name, layer in self.named_modules():
            if isinstance(layer, Layer):
                INITS[init](name, layer)

    def forward(self, input: Tensor) -> Tensor | InceptionOutputs:
        x = check_images(input, "inception_v1", self.input_size, self._smallest)
        heads = {"inception4a": "aux1", "inception4d": "aux2"} if self.training and hasattr(self, "aux1") else {}
        auxiliary = {}
        for name, layer in self.named_children():
            if name == "avgpool":
                break
            x = layer(x)
            if name in heads:
                auxiliary[heads[name]] = self.get_submodule(heads[name])(x)
        logits = self.fc(self.dropout(self.avgpool(x).flatten(1)))
        return InceptionOutputs(logits, **auxiliary) if auxiliary else logits


class Inception(nn.Module):
    """Four branches side by side: 1x1, 3x3 and 5x5 convolutions behind 1x1 reductions, and a projected max-pool.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H, W), the branches' maps in this order.
    """

    def __init__(
        self,
        in_channels: int,
        one: int,
        reduce3: int,
        three: int,
        reduce5: int,
        five: int,
        project: int,
        *,
        plain: bool,
    ) -> None:
        super().__init__()
        self.out_channels = one + three + five + project

        def convolution(before: int, channels: int, kernel: int) -> nn.Sequential:
            return build_features([Stage("", before, channels, kernel, padding=kernel // 2)], plain=plain)

        self.branch1 = convolution(in_channels, one, 1)
        self.branch2 = nn.Sequential(convolution(in_channels, reduce3, 1), convolution(reduce3, three, 3))
        self.branch3 = nn.Sequential(convolution(in_channels, reduce5, 1), convolution(reduce5, five, 5))
        self.branch4 = nn.Sequential(_pool(PoolParams(3, 1, 1), plain), convolution(in_channels, project, 1))

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([branch(input) for branch in self.children()], 1)


class AuxiliaryHead(nn.Module):
    """Logits of an intermediate map (section 5): 5x5/3 average, 128 1x1 filters, 1024 units, 70% dropout.

    Shape: (N, in_channels, H, W) -> (N, num_classes); ``size`` is the height and width of the averaged map.
    """

    def __init__(self, in_channels: int, size: int, num_classes: int, dropout: str, *, plain: bool) -> None:
        super().__init__()
        self.avgpool = nn.AvgPool2d(5, 3)
        self.conv = build_features([Stage("", in_channels, 128, 1)], plain=plain)
        fully_connected = nn.Linear if plain else Linear
        self.fc1 = fully_connected(128 * size**2, 1024)
        self.relu = nn.ReLU()
        self.dropout = DROPOUTS[dropout](0.7)
        self.fc2 = fully_connected(1024, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.fc1(self.conv(self.avgpool(input)).flatten(1))
        return self.fc2(self.dropout(self.relu(hidden)))


def _stem(pool: PoolParams) -> list[Stage]:
    lrn = LRNParams(5, alpha=1e-4, beta=0.75, k=1.0)
    return [
        Stage("1", 3, 64, 7, stride=2, padding=3, lrn=lrn, pool=pool, pool_first=True),
        Stage("2", 64, 64, 1),
        Stage("3", 64, 192, 3, padding=1, lrn=lrn, pool=pool),
    ]


def _map_sizes(input_size: int, pool: PoolParams, aux: bool) -> dict[str, int]:
    """As :func:`map_sizes`, of the whole network."""
    sizes = map_sizes(_stem(pool), input_size)
    size = list(sizes.values())[-1]
    for layer, window in (("maxpool3", pool), ("aux1", PoolParams(5, 3)), ("maxpool4", pool)):
        if size < 1 or (layer == "aux1" and not aux):
            continue
        sizes[layer] = pooled_size([size] * 2, *window.op_args())[0]
        size = size if layer == "aux1" and sizes[layer] > 0 else sizes[layer]
    return sizes


def _pool(params: PoolParams, plain: bool) -> nn.Module:
    return (nn.MaxPool2d if plain else MaxPool2d)(**asdict(params))
