"""SqueezeNet: Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters" (2016)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import ConvReLU2d, MaxPool2d
from ..params import PoolParams, pooled_size
from ._checks import check_choice, check_images, check_input_size, check_positive, smallest_images
from .classifier import DROPOUTS
from .initialize import CaffeXavier, Gaussian, Initializer, Layer, kaiming
from .preprocessing import TORCHVISION, Preprocessing
from .registry import register_model
from .stages import Stage, build_features, map_sizes

torch.fx.wrap("check_images")

POOL = PoolParams(3, 2, ceil_mode=True)
STEMS = {  # the first convolution and its pool
    "1_0": Stage("1", 3, 96, 7, stride=2, pool=POOL),
    "1_1": Stage("1", 3, 64, 3, stride=2, pool=POOL),
}
FIRES = {
    "2": 16,
    "3": 16,
    "4": 32,
    "5": 32,
    "6": 48,
    "7": 48,
    "8": 64,
    "9": 64,
}  # feature maps they squeeze to
POOLED = {"1_0": ("5", "9"), "1_1": ("4", "6")}  # the fire modules in front of which a pool lies


def _caffe(name: str, layer: Layer) -> None:
    """Caffe's train_val.prototxt of the authors: xavier, and N(0, .01) for the logits."""
    (Gaussian(0.01) if name == "classifier.1" else CaffeXavier(0.0, ()))(name, layer)


INITS: dict[str, Initializer] = {"caffe": _caffe, "kaiming": kaiming}


@register_model(input_size=224, dropout="inverted", init="caffe")
def squeezenet1_0(**common: Any) -> SqueezeNet:
    """SqueezeNet as published; see :class:`SqueezeNet` for the arguments."""
    return SqueezeNet("1_0", **common)


@register_model(input_size=224, dropout="inverted", init="caffe")
def squeezenet1_1(**common: Any) -> SqueezeNet:
    """The authors' second version, as accurate, in 2.4 times fewer operations; see :class:`SqueezeNet`."""
    return SqueezeNet("1_1", **common)


class SqueezeNet(nn.Module):
    """A network without fully connected layers: 1,248,424 parameters (1_0) or 1,235,496 (1_1).

    Keys, sizes of the maps and preprocessing are torchvision's. The authors' weights, of Caffe, expect Caffe's images
    of 227 pixels: ``create_model("squeezenet1_1", input_size=227)``, ``load_weights(..., preprocessing="caffe")``.

    Args:
        version: "1_0", as published, or "1_1".
        num_classes: number of logits.
        input_size: height and width of the images.
        dropout: "inverted" or "paper", see :func:`alexnet`; of 50% in front of the last convolution.
        init: "caffe", that of the authors: uniform weights of variance 1 / fan in, those of the logits N(0, .01^2),
            biases 0. "kaiming": He's normal initialization.
        plain: build it from the layers of torch, none fused.

    Attributes:
        input_size, preprocessing: as in :class:`fastcnn.models.ConvNet`.

    Shape: (N, 3, input_size, input_size), in the parameters' dtype, contiguous or channels_last -> (N, num_classes).

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`fastcnn.models.ConvNet`.

    Source: Iandola et al. (2016), table 1; the authors' SqueezeNet_v1.1.
    """

    def __init__(
        self,
        version: str,
        num_classes: int = 1000,
        input_size: int = 224,
        dropout: str = "inverted",
        init: str = "caffe",
        *,
        plain: bool = False,
    ) -> None:
        super().__init__()
        self._name = f"squeezenet{version}"
        num_classes = check_positive(self._name, "num_classes", num_classes)
        check_choice(self._name, "dropout", dropout, DROPOUTS)
        check_choice(self._name, "plain", plain, (False, True))
        self._smallest = smallest_images(lambda size: _map_sizes(version, size))
        self.input_size = check_input_size(self._name, input_size, self._smallest)
        self.preprocessing: Preprocessing = TORCHVISION
        stem = STEMS[version]
        self.features = build_features([stem], plain=plain, numbered=True)
        before, step = stem.out_channels, 3
        for name, squeezed in FIRES.items():
            if name in POOLED[version]:
                self.features.add_module(str(step), (nn.MaxPool2d if plain else MaxPool2d)(**asdict(POOL)))
                step += 1
            self.features.add_module(str(step), Fire(before, squeezed, plain=plain))
            before, step = 8 * squeezed, step + 1
        convolution, relu = (nn.Conv2d, nn.ReLU) if plain else (ConvReLU2d, nn.Identity)
        logits = convolution(before, num_classes, 1)
        self.classifier = nn.Sequential(DROPOUTS[dropout](0.5), logits, relu(), nn.AdaptiveAvgPool2d(1))
        self.reset_parameters(init)

    def reset_parameters(self, init: str) -> None:
        """Draw weights and biases anew; ``init`` as for the class."""
        check_choice(self._name, "init", init, INITS)
        for name, layer in self.named_modules():
            if isinstance(layer, Layer):
                INITS[init](name, layer)

    def forward(self, input: Tensor) -> Tensor:
        images = check_images(input, self._name, self.input_size, self._smallest)
        return self.classifier(self.features(images)).flatten(1)


class Fire(nn.Module):
    """A 1x1 squeeze convolution, then parallel 1x1 and 3x3 expand convolutions, concatenated; each with its ReLU.

    Shape: (N, in_channels, H, W) -> (N, 8 * squeezed, H, W), the feature maps of the 1x1 convolution first.
    """

    def __init__(self, in_channels: int, squeezed: int, *, plain: bool) -> None:
        super().__init__()
        convolution, relu = (nn.Conv2d, nn.ReLU) if plain else (ConvReLU2d, nn.Identity)
        self.squeeze = convolution(in_channels, squeezed, 1)
        self.expand1x1 = convolution(squeezed, 4 * squeezed, 1)
        self.expand3x3 = convolution(squeezed, 4 * squeezed, 3, padding=1)
        self.relu = relu()

    def forward(self, input: Tensor) -> Tensor:
        squeezed = self.relu(self.squeeze(input))
        return torch.cat([self.relu(self.expand1x1(squeezed)), self.relu(self.expand3x3(squeezed))], 1)


def _map_sizes(version: str, input_size: int) -> dict[str, int]:
    """As :func:`map_sizes`, of the whole network."""
    sizes = map_sizes([STEMS[version]], input_size)
    for name in POOLED[version]:
        size = list(sizes.values())[-1]
        if size >= 1:
            sizes[f"the pool before fire{name}"] = pooled_size([size] * 2, *POOL.op_args())[0]
    return sizes
