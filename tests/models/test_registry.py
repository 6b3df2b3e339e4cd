"""The registry: models by name, and what is said about names and options it does not know."""

import inspect
import re

import pytest
import torch
from torch import nn

from fastcnn import models
from fastcnn.models import registry


@pytest.fixture
def tiny(monkeypatch):
    """A registered model that only keeps its options."""
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))

    @models.register_model
    def tiny(*, num_classes=1000, input_size=8, dropout="none", plain=False, depth=1):
        model = nn.Identity()
        model.options = {"num_classes": num_classes, "input_size": input_size, "dropout": dropout}
        model.options |= {"plain": plain, "depth": depth}
        return model

    return tiny


def test_list_models_is_sorted_and_knows_alexnet(tiny):
    names = models.list_models()
    assert names == sorted(names)
    assert {"alexnet", "tiny"} <= set(names)


def test_decorator_leaves_the_function_as_it_is(tiny):
    assert tiny(depth=3).options["depth"] == 3


def test_options_reach_the_model_and_those_not_given_stay_its_own(tiny):
    defaults = {"num_classes": 1000, "input_size": 8, "dropout": "none", "plain": False, "depth": 1}
    assert models.create_model("tiny").options == defaults
    given = {"num_classes": 7, "input_size": 9, "dropout": "some", "plain": True, "depth": 2}
    assert models.create_model("tiny", **given).options == given


def test_a_name_is_registered_once(tiny):
    with pytest.raises(ValueError, match="'tiny' is already registered"):
        models.register_model(tiny)


def test_unknown_name_lists_the_names(tiny):
    with pytest.raises(ValueError, match=r"no model is named 'alexnett'; the names are: alexnet, .*tiny"):
        models.create_model("alexnett")


@pytest.mark.parametrize("name", [None, 3, ["alexnet"]], ids=str)
def test_name_that_is_no_string(name):
    with pytest.raises(TypeError, match=f"argument 'name' must be str, not {type(name).__name__}"):
        models.create_model(name)


@pytest.mark.parametrize("option", [{"width": 3}, {"init": "paper"}], ids=str)
def test_option_the_model_does_not_take_lists_those_it_takes(tiny, option):
    ((name, value),) = option.items()
    allowed = "num_classes, input_size, dropout, plain, depth"
    with pytest.raises(TypeError, match=re.escape(f"tiny(): got an unexpected option {name}={value!r}")) as error:
        models.create_model("tiny", **option)
    assert str(error.value).endswith(f"allowed are: {allowed}")


@pytest.mark.parametrize("name", models.list_models())
def test_every_model_takes_the_common_options_by_keyword(name):
    parameters = inspect.signature(registry._factories[name]).parameters
    assert {"num_classes", "input_size", "dropout", "init", "plain"} <= set(parameters)
    assert all(p.kind == p.KEYWORD_ONLY and p.default is not p.empty for p in parameters.values())
    with torch.device("meta"):
        assert models.create_model(name).training
