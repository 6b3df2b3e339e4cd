"""AlexNet as published.

Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural networks" (2012).
"""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor, nn

from ..params import LRNParams, PoolParams
from ._checks import check_choice, check_positive
from .classifier import DROPOUTS, build_classifier
from .registry import register_model
from .stages import Stage, build_features, map_sizes

# All but kaiming draw weights from N(0, .01^2), with another deviation in the layers named here. The biases of POSITIVE
# start at the value given here, so that these ReLUs have positive inputs from the start; every other bias starts at 0.
STD: dict[str, dict[str, float]] = {
    "paper": {},
    "as_run": {"conv3": 0.03, "conv4": 0.03, "conv5": 0.03},
    "caffe": {"fc6": 0.005, "fc7": 0.005},
}
BIAS = {"paper": 1.0, "as_run": 1.0, "caffe": 0.1}
POSITIVE = ("conv2", "conv4", "conv5", "fc6", "fc7")


@register_model
def alexnet(
    *,
    num_classes: int = 1000,
    input_size: int = 227,
    dropout: str = "paper",
    init: str = "paper",
    plain: bool = False,
    lrn_groups: int = 2,
) -> AlexNet:
    """AlexNet as published; see :class:`AlexNet` for the arguments."""
    return AlexNet(num_classes, input_size, dropout, init, plain=plain, lrn_groups=lrn_groups)


class AlexNet(nn.Module):
    """AlexNet as published: two towers (``groups=2``), LRN, overlapping pools; 60,965,224 parameters.

    Each of its first, second and last stages is convolution -> ReLU -> LRN (not the last) -> max-pool, in this order.

    Args:
        num_classes: number of logits.
        input_size: height and width of the images, at least 64: 227; or 224 as the paper says. As in the authors' code
            the convolutions of conv1 go on to the last pixel: where their stride does not lead there, zeros are added
            on the right and at the bottom (3 for 224, none for 227), so that both sizes give 55x55 maps.
        dropout: "paper" masks in training and multiplies by 0.5 at test; "inverted" is torch's: it multiplies by 2 in
            training. Both on fc6 and fc7, p=0.5.
        init: "paper": weights N(0, .01^2), bias 1 in conv2, conv4, conv5, fc6 and fc7 and 0 elsewhere. "as_run", the
            authors' configuration: conv3 to conv5 from N(0, .03^2). "caffe": as the paper but fc6 and fc7 from
            N(0, .005^2), and .1 in place of the bias 1. "kaiming": He's normal initialization (fan in), biases 0.
            All but the last need pixels on their raw scale, 0 to 255 minus the mean: with inputs of unit variance the
            logits hardly depend on the image (they differ by less than 1e-4 in "paper"), and training sticks at a loss
            of ln(num_classes).
        plain: build it from the layers of torch, none fused.
        lrn_groups: 2 normalizes within each tower, as the published network ran on two GPUs; 1 across both, as Caffe's
            single-GPU port does (so for weights trained there).

    Shape: (N, 3, input_size, input_size), in the parameters' dtype, contiguous or channels_last -> (N, num_classes).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a value that is not allowed; an ``input_size`` at which nothing is left of the map
            names the layer where it vanishes.
        RuntimeError: in ``forward``, the input has another shape.

    Source: Krizhevsky et al. (2012), 3.2 (towers), 3.3 (LRN), 3.4 (pooling), 3.5 (layers), 4.2 (dropout) and 5
    (initialization). LRN has ``alpha=1e-4`` times the window's *mean* square, as in the authors' code.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        input_size: int = 227,
        dropout: str = "paper",
        init: str = "paper",
        *,
        plain: bool = False,
        lrn_groups: int = 2,
    ) -> None:
        super().__init__()
        num_classes = check_positive("alexnet", "num_classes", num_classes)
        self.input_size = check_positive("alexnet", "input_size", input_size)
        check_choice("alexnet", "dropout", dropout, DROPOUTS)
        check_choice("alexnet", "plain", plain, (False, True))
        check_choice("alexnet", "lrn_groups", lrn_groups, (1, 2))
        layer, size = _last_map(self.input_size)
        if size < 1:
            smallest = next(size for size in count(self.input_size + 1) if _last_map(size)[1] > 0)
            raise ValueError(
                f"alexnet(): input_size must be at least {smallest}, but got input_size={self.input_size}: "
                f"nothing is left of the map at {layer}"
            )
        stages = _stages(self.input_size, lrn_groups)
        self.features = build_features(stages, plain=plain)
        self.classifier = build_classifier(stages[-1].out_channels * size**2, num_classes, dropout)
        self.reset_parameters(init)

    def reset_parameters(self, init: str) -> None:
        """Draw weights and biases anew; ``init`` as for the class."""
        check_choice("alexnet", "init", init, [*STD, "kaiming"])
        for name, layer in (*self.features.named_children(), *self.classifier.named_children()):
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                continue
            assert layer.bias is not None
            if init == "kaiming":
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
            else:
                nn.init.normal_(layer.weight, std=STD[init].get(name, 0.01))
                nn.init.constant_(layer.bias, BIAS[init] if name in POSITIVE else 0.0)

    def forward(self, input: Tensor) -> Tensor:
        features = self.features(_checked(input, self.input_size))
        return self.classifier(features.flatten(1))


def _stages(input_size: int, lrn_groups: int = 2) -> list[Stage]:
    lrn = LRNParams(5, alpha=1e-4, beta=0.75, k=2.0, groups=lrn_groups)
    pool = PoolParams(3, 2)
    to_last_pixel = -(input_size - 11) % 4
    return [
        Stage("1", 3, 96, 11, stride=4, pad_end=to_last_pixel, lrn=lrn, pool=pool),
        Stage("2", 96, 256, 5, padding=2, groups=2, lrn=lrn, pool=pool),
        Stage("3", 256, 384, 3, padding=1),
        Stage("4", 384, 384, 3, padding=1, groups=2),
        Stage("5", 384, 256, 3, padding=1, groups=2, pool=pool),
    ]


def _last_map(input_size: int) -> tuple[str, int]:
    """The layer at which the map vanishes, or else the last, and the map's size behind it."""
    return list(map_sizes(_stages(input_size), input_size).items())[-1]


@torch.fx.wrap  # a step of its own where the network is traced: it looks at shapes, which tracing has none of
def _checked(input: Tensor, size: int) -> Tensor:
    """``input``, if it is a batch of images of this size."""
    if not isinstance(input, Tensor):
        raise TypeError(f"alexnet(): argument 'input' must be Tensor, not {type(input).__name__}")
    if input.dim() == 4 and input.shape[1:] == (3, size, size):
        return input
    message = f"alexnet(): expected an input of shape (N, 3, {size}, {size}), but got {tuple(input.shape)}"
    if input.dim() == 4 and input.shape[1] == 3:
        layer, left = _last_map(min(input.shape[2:]))
        message += (
            f": nothing would be left of the map at {layer}"
            if left < 1
            else "; resize or crop the images, or create the model with their input_size"
        )
    raise RuntimeError(message)
