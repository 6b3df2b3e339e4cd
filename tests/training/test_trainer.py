"""Steps: that each field of a recipe does what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcnn.data.dataset import Arrays
from fastcnn.models.layers import PaperDropout
from fastcnn.training import RECIPES, Recipe
from fastcnn.training.job import new_job
from fastcnn.training.trainer import Trainer

from .data import CLASSES, splits


def trainer_of(recipe: str | Recipe = "plain", model: str = "alexnet", **fields: Any) -> Trainer:
    chosen = replace(RECIPES[recipe] if isinstance(recipe, str) else recipe, batch=8, **fields)
    size = 32 if model.startswith("vgg") else 67
    return Trainer(new_job(model, chosen, splits(), width=0.02, input_size=size), splits())


def test_groups_of_parameters_have_their_own_learning_rates() -> None:
    recipe = replace(RECIPES["alexnet-as-run"], drops=(1,), slow_conv1=1, stop_conv1=2)
    job = new_job("alexnet", recipe, splits(), width=0.02, input_size=67)
    trainer = Trainer(job, splits())
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}

    def rates() -> dict[str, tuple[float, float]]:
        trainer._set_learning_rates()
        groups = trainer.optimizer.param_groups
        return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}

    assert rates()["features.conv1.weight"] == rates()["classifier.fc8.weight"] == (0.01, 5e-4)
    assert rates()["features.conv1.bias"] == rates()["classifier.fc8.bias"] == (0.02, 0.0)
    trainer.epoch = 1
    assert rates()["features.conv2.weight"] == (pytest.approx(1e-3), 5e-4)
    assert rates()["features.conv1.weight"] == (pytest.approx(1e-4), 5e-4)
    assert rates()["features.conv2.bias"] == (0.02, 0.0)  # not dropped in the authors' files
    trainer.epoch = 2
    assert rates()["features.conv1.weight"][0] == rates()["features.conv1.bias"][0] == 0


def test_accumulated_gradients_are_those_of_the_batch() -> None:
    found = []
    for accumulate in (1, 3):
        recipe = replace(RECIPES["plain"], dropout_p=0.0, precision="fp64", accumulate=accumulate, batch=8)
        trainer = Trainer(new_job("alexnet", recipe, splits(), width=0.02, input_size=67), splits())
        loss = trainer.update(next(trainer.rest_of_epoch()))
        found.append((loss, [parameter.grad.clone() for parameter in trainer.model.parameters()]))
    (loss, gradients), (other, others) = found
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)
    for gradient, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-9, atol=1e-12)


def test_dropout_is_a_function_of_seed_and_step() -> None:
    job = new_job("alexnet", replace(RECIPES["plain"], batch=8), splits(), width=0.02, input_size=67)

    def loss(seed: int, step: int, generator: int) -> float:
        trainer = Trainer(job, splits())
        trainer.job = replace(job, seed=seed)
        batch = next(trainer.rest_of_epoch())
        trainer.step = step
        torch.manual_seed(generator)  # of no consequence
        return float(trainer.update(batch))

    assert loss(0, 0, 5) == loss(0, 0, 6)
    assert len({loss(0, 0, 5), loss(1, 0, 5), loss(0, 1, 5)}) == 3


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64)]
)
def test_the_precision_is_that_of_the_convolutions(precision: str, dtype: torch.dtype) -> None:
    trainer, found = trainer_of(precision=precision), list[Tensor]()
    for name, module in trainer.model.named_modules():
        if name == "features.conv2":
            module.register_forward_hook(lambda module, inputs, output: found.append(output))
    trainer.update(next(trainer.rest_of_epoch()))
    assert [output.dtype for output in found] == [dtype]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float64 if precision == "fp64" else torch.float32}


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_memory_format_is_that_of_images_and_weights(channels_last: bool) -> None:
    trainer = trainer_of(channels_last=channels_last)
    (conv1, *_) = (module for module in trainer.model.modules() if isinstance(module, nn.Conv2d))
    for tensor in (next(trainer.rest_of_epoch()).images, conv1.weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert tensor.is_contiguous() == (not channels_last)


def test_noise_ends_when_the_recipe_says() -> None:
    trainer = trainer_of("alexnet-as-run", noise_until=2)
    noise = []
    for trainer.epoch in range(4):
        next(trainer.rest_of_epoch())
        assert trainer.batches.augment is not None
        noise.append(trainer.batches.augment.noise)
    assert noise == [0.1, 0.1, 0, 0]


def test_jitter_is_in_proportion_to_the_crop() -> None:
    trainer = trainer_of("vgg-paper", "vgg_a")
    next(trainer.rest_of_epoch())
    assert trainer.batches.augment is not None
    assert trainer.batches.augment.jitter == (37, 73)  # 32 / 224 of 256 and 512


@pytest.mark.parametrize("mirror", [True, False])
def test_half_of_the_pictures_are_mirrored_or_none(mirror: bool) -> None:
    rising = (torch.arange(77) * 3).to(torch.uint8).view(1, 1, 77, 1).expand(64, 77, 77, 3).contiguous()
    data = {"train": Arrays("rising", "train", "all", CLASSES, torch.arange(64) % 4, [rising])}
    recipe = replace(RECIPES["plain"], mirror=mirror, batch=64)
    images = next(Trainer(new_job("alexnet", recipe, data, width=0.02, input_size=67), data).rest_of_epoch()).images
    mirrored = int((images[:, 0, 0, 0] > images[:, 0, 0, -1]).sum())
    assert (16 < mirrored < 48) if mirror else mirrored == 0


def test_pixels_are_divided_by_their_deviation_or_stay_raw() -> None:
    raw, unit = (next(trainer_of(pixels=pixels).rest_of_epoch()).images for pixels in ("raw", "unit"))
    deviations = torch.tensor(trainer_of().job.statistics.std).view(1, 3, 1, 1)
    assert float(raw.std()) > 20
    torch.testing.assert_close(unit, raw / deviations, rtol=1e-4, atol=1e-4)


def test_the_optimizer_has_the_momentum_of_the_recipe() -> None:
    sgd, adam = (trainer_of(optimizer=name, momentum=0.8).optimizer for name in ("sgd", "adam"))
    assert isinstance(sgd, torch.optim.SGD)
    assert {group["momentum"] for group in sgd.param_groups} == {0.8}
    assert isinstance(adam, torch.optim.Adam)
    assert {group["betas"] for group in adam.param_groups} == {(0.8, 0.999)}


@pytest.mark.parametrize(("dropout", "kind"), [("inverted", nn.Dropout), ("paper", PaperDropout)])
def test_dropout_is_of_the_kind_and_probability_of_the_recipe(dropout: str, kind: type[nn.Module]) -> None:
    model = trainer_of(dropout=dropout, dropout_p=0.3).model
    found = [module for module in model.modules() if isinstance(module, nn.Dropout | PaperDropout)]
    assert [(type(module), module.p) for module in found] == [(kind, 0.3)] * 2


def test_weights_are_drawn_as_the_recipe_says() -> None:
    paper, as_run = (trainer_of(f"alexnet-{name}").model.state_dict() for name in ("paper", "as-run"))
    for layer, ratio in (("features.conv2", 1.0), ("features.conv4", 3.0)):
        stds = [weights[f"{layer}.weight"].std() for weights in (as_run, paper)]
        assert float(stds[0] / stds[1]) == pytest.approx(ratio, rel=1e-4)
