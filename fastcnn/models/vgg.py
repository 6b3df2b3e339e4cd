"""VGG: Simonyan, Zisserman, "Very deep convolutional networks for large-scale image recognition" (2015)."""

from typing import Any

import torch

from ..params import LRNParams, PoolParams
from .convnet import ConvNet
from .initialize import Gaussian, Initializer, glorot, kaiming
from .preprocessing import RAW, TORCHVISION, Preprocessing
from .registry import register_model
from .stages import Stage

# table 1, a string a stage: 3 and 1 are convolutions of this size, L is LRN
CONFIGURATIONS = {
    "a": ("3", "3", "33", "33", "33"),
    "a_lrn": ("3L", "3", "33", "33", "33"),
    "b": ("33", "33", "33", "33", "33"),
    "c": ("33", "33", "331", "331", "331"),
    "d": ("33", "33", "333", "333", "333"),
    "e": ("33", "33", "3333", "3333", "3333"),
}
CHANNELS = (64, 128, 256, 512, 512)
INITS: dict[str, Initializer] = {"paper": Gaussian(std=0.1), "glorot": glorot, "kaiming": kaiming}
FROM_A = ("conv1_1", "conv2_1", "conv3_1", "conv3_2", "fc6", "fc7", "fc8")


def _register(name: str, configuration: str, preprocessing: Preprocessing, *, batch_norm: bool = False) -> None:
    stages = _stages(configuration, batch_norm)

    def vgg(*, start_from: ConvNet | None = None, **common: Any) -> ConvNet:
        model = ConvNet(name, lambda size: stages, inits=INITS, preprocessing=preprocessing, numbered=True, **common)
        if start_from is not None:
            _copy_layers_of_a(name, start_from, model)
        return model

    vgg.__name__ = vgg.__qualname__ = name
    vgg.__doc__ = f"""Configuration {configuration.upper().replace("_", "-")} of VGG{" with batch norm" * batch_norm}.

    Its ``state_dict`` has torchvision's keys, where torchvision has the network.

    Args:
        num_classes: number of logits.
        input_size: height and width of the images, at least 32. fc6 takes the map that is left of them (torchvision
            averages any map to 7x7, which 224 has).
        dropout: "inverted" or "paper", see :func:`alexnet`; p=0.5.
        init: "glorot": uniform, which trains every configuration. "paper": weights N(0, variance .01), biases 0, from
            which only A was trained. "kaiming": He's normal initialization.
        width: factor of all numbers of channels and hidden units, see :class:`ConvNet`.
        plain: build it from the layers of torch, none fused.
        start_from: a trained A, of as many classes and the same input size: its four first convolutions (to the layers
            of their names: conv1_1, conv2_1, conv3_1, conv3_2) and its fully connected layers are copied, as the paper
            does for the deeper configurations. ``init`` draws the others.

    Shape, errors: see :class:`fastcnn.models.ConvNet`.

    Source: Simonyan and Zisserman (2015), table 1 (layers) and 3.1 (initialization)."""
    register_model(input_size=224, dropout="inverted", init="glorot", width=1.0)(vgg)


def _stages(configuration: str, batch_norm: bool) -> list[Stage]:
    stages: list[Stage] = []
    before = 3
    for i, (layers, channels) in enumerate(zip(CONFIGURATIONS[configuration], CHANNELS, strict=True), 1):
        kernels = [int(k) for k in layers if k.isdigit()]
        for j, kernel in enumerate(kernels, 1):
            stages.append(
                Stage(
                    f"{i}_{j}",
                    before,
                    channels,
                    kernel,
                    padding=kernel // 2,
                    batch_norm=batch_norm,
                    lrn=LRNParams(5, alpha=1e-4, beta=0.75, k=2.0) if "L" in layers else None,
                    pool=PoolParams(2) if j == len(kernels) else None,
                )
            )
            before = channels
    return stages


@torch.no_grad()
def _copy_layers_of_a(name: str, trained: ConvNet, model: ConvNet) -> None:
    if not isinstance(trained, ConvNet):
        raise TypeError(f"{name}(): argument 'start_from' must be a VGG network, not {type(trained).__name__}")
    theirs, ours = trained.weighted_layers(), model.weighted_layers()
    wrong = []
    for layer in FROM_A:
        source, target = theirs.get(layer), ours[layer]
        if source is None:
            wrong.append(f"{layer} is missing")
        elif source.weight.shape != target.weight.shape:
            wrong.append(f"{layer} is {tuple(source.weight.shape)}, not {tuple(target.weight.shape)}")
    if wrong:
        raise ValueError(f"{name}(): start_from does not have the layers of A: {'; '.join(wrong)}")
    for layer in FROM_A:
        ours[layer].load_state_dict(theirs[layer].state_dict())


for _configuration in CONFIGURATIONS:
    _register(f"vgg_{_configuration}", _configuration, RAW)
for _depth, _configuration in (("11", "a"), ("13", "b"), ("16", "d"), ("19", "e")):
    _register(f"vgg{_depth}", _configuration, TORCHVISION)
    _register(f"vgg{_depth}_bn", _configuration, TORCHVISION, batch_norm=True)
