"""Recipes: the papers' numbers, learning rates, and what is refused."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from fastcnn.training import RECIPES, Recipe


def test_a_recipe_prints_every_field_with_its_meaning() -> None:
    for recipe in RECIPES.values():
        lines = str(recipe).splitlines()
        assert [line.split()[0] for line in lines] == [field.name for field in fields(Recipe)]
        assert all(field.metadata["help"] in line for field, line in zip(fields(Recipe), lines, strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json_and_its_digest_tells_every_change(name: str) -> None:
    recipe = RECIPES[name]
    assert Recipe.from_json(recipe.to_json()) == recipe
    changed = [
        replace(recipe, lr=recipe.lr * 2),
        replace(recipe, drops=(1, 2)),
        replace(recipe, decay_biases=not recipe.decay_biases),
        replace(recipe, epochs=recipe.epochs + 1),
    ]
    assert len({recipe.digest(), *(other.digest() for other in changed)}) == 5
    with pytest.raises(ValueError, match="momentum"):
        Recipe.from_json({key: value for key, value in recipe.to_json().items() if key != "momentum"})


def test_the_learning_rate_falls_at_the_epochs_of_the_authors_log() -> None:
    recipe = RECIPES["alexnet-as-run"]
    rates = {epoch: recipe.lr * recipe.lr_factor(epoch, 0, 10, []) for epoch in (0, 24, 25, 50, 51, 78, 79, 90)}
    assert rates == pytest.approx({0: 1e-2, 24: 1e-2, 25: 1e-3, 50: 1e-3, 51: 1e-4, 78: 1e-4, 79: 1e-5, 90: 1e-5})
    assert [recipe.conv1_factor(epoch) for epoch in (0, 66, 67, 71, 72, 90)] == [1, 1, 0.1, 0.1, 0, 0]


def test_plateau_divides_when_validation_stalls_and_only_so_often() -> None:
    recipe = Recipe(schedule="plateau", patience=2, max_drops=2)

    def factor(*errors: float) -> float:
        return recipe.lr_factor(len(errors), 0, 10, errors)

    assert factor() == 1
    assert factor(0.5, 0.4, 0.45) == 1  # one epoch without a lower error
    assert factor(0.5, 0.4, 0.45, 0.4) == pytest.approx(0.1)  # equal is not lower
    assert factor(0.5, 0.4, 0.45, 0.4, 0.3) == pytest.approx(0.1)
    assert factor(0.5, 0.4, 0.45, 0.4, 0.4, 0.4) == pytest.approx(0.01)
    assert factor(*[0.5] * 50) == pytest.approx(0.01)


def test_linear_goes_to_zero_step_by_step_and_warms_up() -> None:
    recipe = Recipe(schedule="linear", epochs=2, warmup=4)
    factors = [recipe.lr_factor(epoch, step, 5, []) for epoch in range(2) for step in range(5)]
    assert factors == pytest.approx([1 - i / 10 for i in range(10)])
    assert [recipe.warmup_factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"lr": "0.1"}, TypeError),
        ({"lr": True}, TypeError),
        ({"epochs": 1.5}, TypeError),
        ({"mirror": 1}, TypeError),
        ({"drops": 5}, TypeError),
        ({"drops": (1.5,)}, TypeError),
        ({"lr": -1.0}, ValueError),
        ({"lr": float("nan")}, ValueError),
        ({"lr": float("inf")}, ValueError),
        ({"epochs": 0}, ValueError),
        ({"batch": 4, "accumulate": 5}, ValueError),
        ({"drops": (5, 3)}, ValueError),
        ({"jitter": (256,)}, ValueError),
        ({"jitter": (512, 256)}, ValueError),
        ({"jitter": (100, 200)}, ValueError),
        ({"momentum": 1.0}, ValueError),
        ({"dropout_p": 1.5}, ValueError),
        ({"optimizer": "lion"}, ValueError),
        ({"schedule": "cosine"}, ValueError),
        ({"precision": "fp16"}, ValueError),
    ],
)
def test_what_makes_no_sense_is_refused_and_named(given: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=list(given)[-1] if "accumulate" not in given else "4"):
        Recipe(**given)
