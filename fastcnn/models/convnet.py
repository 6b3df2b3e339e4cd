"""The networks that are a row of convolutional stages and three fully connected layers."""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_images, check_input_size, check_positive, check_width, smallest_images
from .classifier import DROPOUTS, build_classifier
from .initialize import Gaussian, Initializer, Layer
from .preprocessing import Preprocessing
from .stages import Stage, build_features, map_sizes, scaled_channels, scaled_stages

torch.fx.wrap("check_images")


class ConvNet(nn.Module):
    """Stages, then two hidden fully connected layers and the logits; :func:`create_model` builds it by name.

    Args:
        name: of the model, for messages.
        stages: the stages for images of a given size.
        num_classes, input_size, dropout, init, plain: as for :func:`create_model`.
        width: factor of all numbers of channels and hidden units, each rounded to an even number. Where ``init`` draws
            from fixed deviations, those of a layer grow by the root of what its inputs have lost, so that its outputs
            stay as large as in the full network.
        inits: how ``init`` draws each layer.
        preprocessing: what images go through that the published weights were trained on.
        numbered: number the layers in the keys, as torchvision does, instead of naming them.
        dropout_first: dropout in front of the hidden layers instead of behind them.
        average: average the last map over its positions.
        hidden: units of fc6 and fc7.

    Attributes:
        input_size: height and width of the images.
        preprocessing: a :class:`Preprocessing`. Yours to set: the network itself does not apply it.
        features, classifier: the two parts, as in torchvision.

    Shape: (N, 3, input_size, input_size), in the parameters' dtype, contiguous or channels_last -> (N, num_classes).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a value that is not allowed; an ``input_size`` at which nothing is left of the map
            names the layer where it vanishes.
        RuntimeError: in ``forward``, the input has another shape.
    """

    def __init__(
        self,
        name: str,
        stages: Callable[[int], Sequence[Stage]],
        *,
        num_classes: int,
        input_size: int,
        dropout: str,
        init: str,
        width: float,
        plain: bool,
        inits: Mapping[str, Initializer],
        preprocessing: Preprocessing,
        numbered: bool = False,
        dropout_first: bool = False,
        average: bool = False,
        hidden: tuple[int, int] = (4096, 4096),
    ) -> None:
        super().__init__()
        num_classes = check_positive(name, "num_classes", num_classes)
        width = check_width(name, width)
        check_choice(name, "dropout", dropout, DROPOUTS)
        check_choice(name, "plain", plain, (False, True))
        smallest = smallest_images(lambda size: map_sizes(stages(size), size))
        self.input_size = check_input_size(name, input_size, smallest)
        self.preprocessing = preprocessing
        self._name, self._smallest, self._inits = name, smallest, dict(inits)
        full = list(stages(self.input_size))
        built = scaled_stages(full, width)
        units = [scaled_channels(number, width) for number in hidden]
        size = 1 if average else list(map_sizes(built, self.input_size).values())[-1]
        self.features = build_features(built, plain=plain, numbered=numbered)
        self.avgpool = nn.AdaptiveAvgPool2d(1) if average else nn.Identity()
        self.classifier = build_classifier(
            built[-1].out_channels * size**2,
            num_classes,
            dropout,
            (units[0], units[1]),
            plain=plain,
            dropout_first=dropout_first,
            numbered=numbered,
        )
        inputs = [*(stage.in_channels for stage in full), full[-1].out_channels, *hidden]
        left = [*(stage.in_channels for stage in built), built[-1].out_channels, *units]
        self._gains = [sqrt(before / after) for before, after in zip(inputs, left, strict=True)]
        self._layer_names = [*(f"conv{stage.name}" for stage in built), "fc6", "fc7", "fc8"]
        self.reset_parameters(init)

    def weighted_layers(self) -> dict[str, Layer]:
        """The convolutional and fully connected layers by their names in the papers: conv1, ..., fc8."""
        layers = [layer for layer in self.modules() if isinstance(layer, Layer)]
        return dict(zip(self._layer_names, layers, strict=True))

    def reset_parameters(self, init: str) -> None:
        """Draw weights and biases anew; ``init`` as for the model."""
        check_choice(self._name, "init", init, self._inits)
        for (name, layer), gain in zip(self.weighted_layers().items(), self._gains, strict=True):
            initializer = self._inits[init]
            (initializer.times(gain) if isinstance(initializer, Gaussian) else initializer)(name, layer)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        images = check_images(input, self._name, self.input_size, self._smallest)
        return self.classifier(self.avgpool(self.features(images)).flatten(1))
