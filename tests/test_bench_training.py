"""``fastcnn bench training``: both kinds of layers are compared before they are timed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastcnn.bench import training
from fastcnn.bench.training import PROVIDERS, Parity, compare, measure_training
from fastcnn.cli import app
from fastcnn.data import open_splits
from fastcnn.training import RECIPES
from fastcnn.training.job import new_job

TINY = ["--data", "digits", "--width", "0.02", "--size", "67", "--batch", "32", "--steps", "1", "--repeats", "3"]


def test_rates_are_written_after_both_have_learned_alike(tmp_path: Path) -> None:
    arguments = ["bench", "training", *TINY, "--check-steps", "30", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "training.json").read_text())
    assert [row["provider"] for row in document["rows"]] == list(PROVIDERS)
    for row in document["rows"]:
        assert row["q1"] <= row["pictures_per_s"] <= row["q3"]
        assert 0 < row["waiting"] < 1
    assert document["rows"][0]["speedup"] == 1
    assert Parity(**document["parity"]).passed
    assert document["parity"]["last"] < document["parity"]["first"]


def test_who_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_seed(job: training.Job, *, plain: bool, channels_last: bool) -> training.Job:
        recipe = replace(job.recipe, channels_last=channels_last)
        return replace(job, plain=plain, recipe=recipe, seed=int(channels_last))

    monkeypatch.setattr(training, "PROVIDERS", dict(list(PROVIDERS.items())[:3]))
    monkeypatch.setattr(training, "_with", other_seed)
    splits = open_splits("digits")
    job = new_job("alexnet", RECIPES["plain"], splits, width=0.02, input_size=67)
    with pytest.raises(ValueError, match="the logits of fastcnn are not"):
        measure_training(job, splits, steps=1, rounds=2, workers=0)


def test_who_learns_otherwise_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_ = training._with

    def other_seed(job: training.Job, *, plain: bool, **of_recipe: object) -> training.Job:
        return replace(with_(job, plain=plain, **of_recipe), seed=int(plain))

    monkeypatch.setattr(training, "_with", other_seed)
    splits = open_splits("digits")
    job = new_job("alexnet", RECIPES["plain"], splits, width=0.02, input_size=67)
    assert not compare(job, splits, 10).passed
    arguments = ["bench", "training", *TINY, "--check-steps", "10", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, arguments).exit_code == 1
    assert not list(tmp_path.iterdir())
