"""``width``: fewer channels, the same signal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastcnn.models import ConvNet, create_model


def conv_net(name: str, **options: Any) -> ConvNet:
    model = create_model(name, **options)
    assert isinstance(model, ConvNet)
    return model


@pytest.mark.parametrize("name", ["alexnet", "alexnet_one_tower", "caffenet", "alexnet_owt", "zfnet", "vgg_a"])
@pytest.mark.parametrize("width", [0.001, 0.1, 0.13, 1.5])
def test_channels_are_even_and_groups_divide_them(name: str, width: float) -> None:
    size = {"alexnet_owt": 63, "zfnet": 99, "vgg_a": 32}.get(name, 67)
    full, scaled = (conv_net(name, width=w, input_size=size, num_classes=7).weighted_layers() for w in (1.0, width))
    before = 3
    for layer, wide in full.items():
        narrow = scaled[layer]
        outputs, wanted = narrow.weight.shape[0], wide.weight.shape[0] * width
        if layer == "fc8":
            assert outputs == 7
        else:
            assert outputs % 2 == 0
            assert abs(outputs - wanted) <= 1 or outputs == 2
        if isinstance(narrow, torch.nn.Conv2d):
            assert (narrow.in_channels, narrow.groups) == (before, getattr(wide, "groups", 1))
            before = outputs
    model = conv_net(name, width=width, input_size=size, num_classes=7).eval()
    assert model(torch.rand(2, 3, size, size)).shape == (2, 7)


def test_fixed_deviations_keep_the_signal_of_the_full_network() -> None:
    torch.manual_seed(0)
    x = 60 * torch.randn(8, 3, 67, 67)
    signals = {1.0: torch.zeros(5), 0.25: torch.zeros(5)}
    for width in [1.0, 0.25] * 8:
        signal, stages = x, conv_net("alexnet", width=width, input_size=67, init="as_run").eval().features
        for i, layer in enumerate(stages):
            signal = layer(signal).detach()
            signals[width][i] += signal.std() / 8
    torch.testing.assert_close(signals[0.25], signals[1.0], rtol=0.2, atol=0)  # a deviation of .01 loses half per layer
    conv1, conv2 = (
        conv_net("alexnet", width=0.25, input_size=67).weighted_layers()[name] for name in ("conv1", "conv2")
    )
    assert float(conv1.weight.std()) == pytest.approx(0.01, rel=0.05)  # its inputs are the images' channels
    assert float(conv2.weight.std()) == pytest.approx(0.02, rel=0.05)


def test_width_one_draws_what_it_always_drew() -> None:
    torch.manual_seed(0)
    expected = 0.01 * torch.randn(96, 3, 11, 11)
    torch.manual_seed(0)
    # layers are made, with their own first weights, before they are drawn
    model = conv_net("alexnet", input_size=67, num_classes=2)
    torch.manual_seed(0)
    model.reset_parameters("paper")
    torch.testing.assert_close(model.weighted_layers()["conv1"].weight.detach(), expected)


@pytest.mark.parametrize(
    ("width", "error"),
    [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError), (True, TypeError)],
)
def test_a_width_that_is_none_is_refused(width: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="width"):
        create_model("alexnet", width=width, input_size=67)
    with pytest.raises(TypeError, match="width"):
        create_model("inception_v1", width=0.5)
