"""The examples of the README that run as they stand."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_frozen_features(best_backend):
    (code,) = re.findall(r"<!-- tests/test_readme.py runs this -->\n```python\n(.*?)```", README.read_text(), re.S)
    names: dict = {}
    torch.manual_seed(0)
    exec(code, names)
    image, vgg, features = names["image"], names["vgg"], names["features"]
    assert all(p.grad is None for p in features.parameters())
    assert [entry.what for entry in features.fastcnn_report.replaced].count("Conv2d -> ReLU -> MaxPool2d") == 2
    expected = torch.nn.functional.mse_loss(vgg(image), names["target"])
    torch.testing.assert_close(names["loss"], expected)
    torch.testing.assert_close(image.grad, torch.autograd.grad(expected, image)[0], rtol=1e-3, atol=1e-8)
