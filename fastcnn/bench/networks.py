"""The networks that are measured: what they are built from, what is asked of them, how much they compute.

Their modes: "inference" is a forward without gradients; "training step" forward, loss, backward and an update by SGD;
"input gradient" a loss on the features of a network whose weights are frozen, and its gradient for the images.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import models
from .. import nn as layers
from .cases import ANY_FORMAT, Case

NETWORKS = ("alexnet", "vgg16-features")
NETWORK_MODES = ("inference", "training step", "input gradient")
NETWORK_DTYPES = ("fp32", "bf16")

_SIZES = {"alexnet": 227, "vgg16-features": 224}
_SMALLEST = {"alexnet": 64, "vgg16-features": 16}
_BATCHES = {"alexnet": 32, "vgg16-features": 4}
_MODES = {"alexnet": NETWORK_MODES[:2], "vgg16-features": NETWORK_MODES[2:]}
_FIRST_LAYERS = {"alexnet": "conv1", "vgg16-features": "conv1_1"}
_VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions of each stage
_TAPPED = ("conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3")


@dataclass
class Laps:
    """Seconds of the parts of a training step, a list of each, filled in as it runs."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    def clear(self) -> None:
        for part in (self.forward, self.backward, self.update):
            part.clear()


class ConvThenReLU2d(nn.Conv2d):
    """The two of torch."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class Features(nn.Sequential):
    """VGG-16 up to conv5_3, its weights frozen: images -> the loss of each, as perceptual losses have it.

    The loss is the sum of the Euclidean norms of the features behind the ReLUs 1_2, 2_2, 3_3, 4_3 and 5_3.
    """

    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        convolution, pool = (ConvThenReLU2d, nn.MaxPool2d) if plain else (layers.ConvReLU2d, layers.MaxPool2d)
        before = 3
        for stage, (channels, depth) in enumerate(_VGG16, 1):
            if stage > 1:
                self.add_module(f"pool{stage - 1}", pool(2, 2))
            for i in range(1, depth + 1):
                self.add_module(f"conv{stage}_{i}", convolution(before, channels, 3, padding=1))
                before = channels
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.kaiming_normal_(parameter)
            parameter.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        loss = input.new_zeros(len(input))
        for name, layer in self.named_children():
            input = layer(input)
            if name in _TAPPED:
                loss = loss + torch.linalg.vector_norm(input, dim=(1, 2, 3))
        return loss


def select_networks(
    *,
    networks: Collection[str] = (),
    modes: Collection[str] = (),
    batches: Collection[int] = (),
    dtypes: Collection[str] = (),
    size: int | None = None,
    quick: bool = False,
) -> list[Case]:
    """The cases to run. Each network runs in its own modes, and only inference in another dtype than fp32.

    Usual are AlexNet's inference in fp32 and bf16 and its training step, both with 32 images, and VGG-16's input
    gradient with 4; ``quick`` leaves bf16 out.
    """

    def cases() -> Iterator[Case]:
        for network, dtype in product(
            networks or NETWORKS, dtypes or (NETWORK_DTYPES[:1] if quick else NETWORK_DTYPES)
        ):
            for mode in _MODES[network]:
                if (modes and mode not in modes) or (dtype != "fp32" and mode != "inference"):
                    continue
                side = size or _SIZES[network]
                for batch in batches or [_BATCHES[network]]:
                    yield Case(network, (batch, 3, side, side), dtype, ANY_FORMAT, mode)

    return list(cases())


def check_size(network: str, size: int) -> None:
    """Raise ValueError where nothing would be left of an image of this size."""
    if size < _SMALLEST[network]:
        raise ValueError(f"{size}: {network} needs at least {_SMALLEST[network]}")


def make_network(case: Case, *, plain: bool) -> nn.Module:
    """Built in evaluation mode, with He's initialization."""
    if case.op == "alexnet":
        return models.create_model("alexnet", init="kaiming", input_size=case.shape[-1], plain=plain).eval()
    return Features(plain=plain).eval()


def count_flop(case: Case, network: nn.Module) -> int:
    """Multiplications and additions that the case needs, of a network of torch's layers.

    The backward of a convolution or a linear layer computes as much for its input as the forward, and as much again for
    its weights; the images' gradient is not wanted in training. (Of the backward of a grouped convolution torch's
    counter counts too much.)
    """
    n, *image = case.shape
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *image))
    forward = counter.get_total_flops()
    counts = counter.get_flop_counts()
    first = sum(next(c for name, c in counts.items() if name.endswith(f".{_FIRST_LAYERS[case.op]}")).values())
    return n * {"inference": forward, "training step": 3 * forward - first, "input gradient": 2 * forward}[case.mode]
