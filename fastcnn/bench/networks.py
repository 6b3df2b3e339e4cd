"""The networks that are measured: what they are built from, what is asked of them, how much they compute.

Their modes: "inference" is a forward without gradients; "training step" forward, loss, backward and an update by SGD;
"input gradient" a loss on the features of a network whose weights are frozen, and its gradient for the images.
"""

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

NETWORK_MODES = ("inference", "training step", "input gradient")
NETWORK_DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Network:
    """What is usual for a network; ``model`` is its name in the registry, None for one of this file."""

    model: str | None
    size: int
    smallest: int
    batches: tuple[int, ...]  # of inference
    batch: int  # of the other modes
    modes: tuple[str, ...] = NETWORK_MODES[:2]


NETWORKS = {
    "alexnet": Network("alexnet", 227, 64, (1, 8, 32, 128), 32),
    "vgg16": Network("vgg16", 224, 32, (1, 8), 4),
    "inception_v1": Network("inception_v1", 224, 32, (1, 8, 32), 8),
    "vgg16-features": Network(None, 224, 16, (4,), 4, NETWORK_MODES[2:]),
}
_QUICK = (("alexnet", "inference", 32), ("alexnet", "training step", 32), ("vgg16-features", "input gradient", 4))
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
    """VGG-16 up to conv5_3, its weights frozen: images -> the loss of each, as perceptual losses such as LPIPS have it.

    First all features are computed, those behind the ReLUs 1_2, 2_2, 3_3, 4_3 and 5_3, then the sum of their squares.
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
        features = []
        for name, layer in self.named_children():
            input = layer(input)
            if name in _TAPPED:
                features.append(input)
        return torch.stack([feature.square().sum((1, 2, 3)) for feature in features]).sum(0)


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

    ``quick`` are AlexNet's inference and training with 32 images and VGG-16's input gradient with 4, in fp32; what is
    asked for beside it is run instead.
    """

    def cases() -> Iterator[Case]:
        for name, dtype in product(networks or NETWORKS, dtypes or (NETWORK_DTYPES[:1] if quick else NETWORK_DTYPES)):
            network = NETWORKS[name]
            for mode in network.modes:
                if (modes and mode not in modes) or (dtype != "fp32" and mode != "inference"):
                    continue
                side = size or network.size
                for batch in batches or (network.batches if mode == "inference" else (network.batch,)):
                    if not quick or networks or batches or (name, mode, batch) in _QUICK:
                        yield Case(name, (batch, 3, side, side), dtype, ANY_FORMAT, mode)

    return list(cases())


def check_size(network: str, size: int) -> None:
    """Raise ValueError where nothing would be left of an image of this size."""
    if size < NETWORKS[network].smallest:
        raise ValueError(f"{size}: {network} needs at least {NETWORKS[network].smallest}")


def make_network(case: Case, *, plain: bool) -> nn.Module:
    """Built in evaluation mode, with He's initialization."""
    model = NETWORKS[case.op].model
    if model is None:
        return Features(plain=plain).eval()
    return models.create_model(model, init="kaiming", input_size=case.shape[-1], plain=plain).eval()


def count_flop(case: Case, network: nn.Module) -> int:
    """Multiplications and additions that the case needs, of a network of torch's layers.

    The backward of a convolution or a linear layer computes as much for its input as the forward, and as much again for
    its weights; the images' gradient is not wanted in training. (Of the backward of a grouped convolution torch's
    counter counts too much.)
    """
    n, *image = case.shape
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *image, device=next(network.parameters()).device))
    forward = counter.get_total_flops()
    counts = counter.get_flop_counts()
    first_layer = next(name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d))
    first = sum(next(c for name, c in counts.items() if name.endswith(f".{first_layer}")).values())
    return n * {"inference": forward, "training step": 3 * forward - first, "input gradient": 2 * forward}[case.mode]
