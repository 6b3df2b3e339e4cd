"""The networks that are measured: a record for each, and the usual cases.

Their modes: "inference" is a forward without gradients; "training step" forward, loss, backward and an update by SGD;
"input gradient" a loss on the features of a network whose weights are frozen, and its gradient for the images.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import models
from ..optimize import optimize
from .cases import ANY_FORMAT, Case

NETWORK_MODES = ("inference", "training step", "input gradient")
NETWORK_DTYPES = ("fp32", "bf16")
_QUICK = (("alexnet", "inference", 32), ("alexnet", "training step", 32), ("vgg16-features", "input gradient", 4))


@dataclass(frozen=True)
class Network:
    """What the benchmark knows of a network.

    Args:
        name: of the network.
        make: (height and width of the images, plain) -> the network, of torch's layers if ``plain``, else fastcnn's.
        size: the usual height and width.
        smallest: of smaller images nothing would be left.
        batches: the usual ones, of inference.
        batch: of the other modes.
        modes: those of ``NETWORK_MODES`` that make sense for it.
    """

    name: str
    make: Callable[[int, bool], nn.Module]
    size: int
    smallest: int
    batches: tuple[int, ...]
    batch: int
    modes: tuple[str, ...] = NETWORK_MODES[:2]


class Features(nn.Module):
    """VGG-16 up to conv5_3, its weights frozen: images -> the loss of each, as perceptual losses such as LPIPS have it.

    First all features are computed, those after the ReLUs 1_2, 2_2, 3_3, 4_3 and 5_3, then the sum of their squares.
    """

    TAPPED = ("3", "8", "15", "22", "29")

    def __init__(self) -> None:
        super().__init__()
        vgg: Any = models.create_model("vgg16", init="kaiming", input_size=32, plain=True)  # its smallest classifier
        self.layers: nn.Sequential = vgg.features[:30].requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        features = []
        for name, layer in self.layers.named_children():
            input = layer(input)
            if name in self.TAPPED:
                features.append(input)
        return torch.stack([feature.square().sum((1, 2, 3)) for feature in features]).sum(0)


def _features(size: int, plain: bool) -> nn.Module:
    return Features() if plain else optimize(Features(), inplace=True)


def _registered(name: str, size: int, plain: bool) -> nn.Module:
    return models.create_model(name, init="kaiming", input_size=size, plain=plain)


NETWORKS = {
    network.name: network
    for network in (
        Network("alexnet", partial(_registered, "alexnet"), 227, 64, (1, 8, 32, 128), 32),
        Network("vgg16", partial(_registered, "vgg16"), 224, 32, (1, 8), 4),
        Network("inception_v1", partial(_registered, "inception_v1"), 224, 32, (1, 8, 32), 8),
        Network("vgg16-features", _features, 224, 16, (4,), 4, NETWORK_MODES[2:]),
    )
}


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
