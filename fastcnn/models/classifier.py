"""The fully connected part: two hidden layers with dropout, and the logits."""

from collections import OrderedDict

from torch import nn

from .layers import Linear, PaperDropout

DROPOUTS: dict[str, type[nn.Module]] = {"paper": PaperDropout, "inverted": nn.Dropout}


def build_classifier(
    in_features: int,
    num_classes: int,
    dropout: str,
    hidden: tuple[int, int] = (4096, 4096),
    *,
    plain: bool,
    dropout_first: bool = False,
    numbered: bool = False,
) -> nn.Sequential:
    """``fc6 -> relu6 -> drop6 -> fc7 -> relu7 -> drop7 -> fc8``, layers of torch if ``plain``.

    ``dropout`` is a key of DROPOUTS; ``dropout_first`` has each dropout in front of its layer, as torchvision's
    AlexNet; ``numbered`` counts the layers instead of naming them.
    """
    layers: list[tuple[str, nn.Module]] = []
    fully_connected = nn.Linear if plain else Linear
    for name, before, width in (("6", in_features, hidden[0]), ("7", *hidden)):
        drop = [(f"drop{name}", DROPOUTS[dropout](0.5))]
        full = [(f"fc{name}", fully_connected(before, width)), (f"relu{name}", nn.ReLU())]
        layers += drop + full if dropout_first else full + drop
    layers.append(("fc8", fully_connected(hidden[1], num_classes)))
    return nn.Sequential(OrderedDict((str(i) if numbered else name, layer) for i, (name, layer) in enumerate(layers)))
