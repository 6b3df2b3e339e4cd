"""The README: examples that run as they stand, and figures that are those of the result files."""

import re

import pytest
import torch

from fastcnn.bench.environment import sources_digest
from fastcnn.bench.rows import Row
from tools import readme
from tools.readme import README


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


def test_figures_are_those_of_the_results():
    """``make readme`` writes them; where sources have changed since the figures were taken, it also says so."""
    text = README.read_text()
    assert re.findall(r"<!-- figures: (\w+) -->", text) == list(readme.TABLES)
    assert text == readme.rewritten(text, sources_digest())


@pytest.mark.parametrize("name", readme.TABLES)
def test_figures_of_other_sources_say_so(name):
    documents = readme.documents(name)
    for document in documents:
        document["header"]["sources"] = "0123"
    said = "The sources have changed since these figures were measured."
    assert said not in readme.figures(name, documents, "0123")
    assert said in readme.figures(name, documents, "4567")
    del documents[-1]["header"]["sources"]
    assert said in readme.figures(name, documents, "0123")


def test_tables_quote_the_best_rival_and_say_where_it_is_faster():
    def row(provider, ms, **options):
        return Row(
            *("alexnet", (8, 3, 227, 227), "fp32", "any format", "inference", "fresh"),
            provider,
            median_ms=ms,
            **options,
        )

    rows = [row("fastcnn", 4.0), row("torch.eager", 9.0), row("torch.eager channels_last", 5.0), row("openvino", 2.0)]
    rows.append(row("torch.compile", None, failure="logits: error 1.0e+00, allowed is 1.0e-05"))
    for r in rows:
        r.images_per_s = r.median_ms and 8e3 / r.median_ms
    *_, line, _, told, _ = readme.networks(rows)
    assert line == "| AlexNet, inference of 8 | 2000 | 1600 |  |  | **4000** |"
    assert told == "fastcnn is not the fastest at: AlexNet, inference of 8 (0.50 of OpenVINO)."
