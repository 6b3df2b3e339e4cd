"""``fastcnn train`` and ``fastcnn eval``: what they print and write, and how they refuse."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from fastcnn.cli import app
from fastcnn.models import create_model
from fastcnn.training import Recipe, checkpoints
from fastcnn.training.logs import read_events
from fastcnn.training.plots import _filters

TINY = ["--data", "digits", "--model", "alexnet", "--width", "0.02", "--input-size", "67", "--batch", "256"]
PLOTS = ("loss.png", "accuracy.png", "filters.png")


def command(*arguments: object, columns: int = 200) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(columns), "TERM": "dumb"})


def test_every_field_of_a_recipe_is_an_option_with_its_help() -> None:
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", command("train", "--help", columns=300).output).split())
    for field in fields(Recipe):
        if field.name == "name":
            continue
        flag = f"--{field.name.replace('_', '-')}"
        assert flag in shown
        assert field.metadata["help"][1:] in shown
        assert field.type != "bool" or f"--no-{flag[2:]}" in shown


def test_train_then_eval(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = command("train", *TINY, "--epochs", 2, "--lr", 0.05, "--no-mirror", "--drops", "none", "--out", run)
    assert result.exit_code == 0, result.output
    for told in ("alexnet on digits, 10 classes", "weight_decay", "epoch 2/2: top-1", "pictures/s", "plots: loss.png"):
        assert told in result.output
    assert all((run / name).stat().st_size > 1000 for name in PLOTS)
    found = json.loads(command("eval", run, "--json").stdout)
    last = [event.validation for event in read_events(run) if hasattr(event, "validation")]
    best = max((found for found in last if found), key=lambda found: found.top1)
    assert (found["pictures"], found["top1"], found["top5"]) == (360, best.top1, best.top5)
    assert found["loss"] == pytest.approx(best.loss)
    assert f"{best.top1:.2%}" in command("eval", run, "--checkpoint", found["checkpoint"]).output
    other = command("eval", run, "--split", "train", "--batch", 100, "--json")
    assert json.loads(other.stdout)["pictures"] == 1437


@pytest.mark.parametrize(("model", "titles"), [("alexnet", ["tower 1", "tower 2"]), ("vgg_a", [""])])
def test_the_filters_of_towers_are_apart(model: str, titles: list[str]) -> None:
    network = create_model(model, width=0.25, input_size=67)
    figure = _filters(network)
    assert [axes.get_title() for axes in figure.axes] == titles
    weight = next(network.parameters()).detach()
    scaled = 0.5 + 0.5 * weight / weight.abs().max()
    size = weight.shape[-1]
    for axes, filters in zip(figure.axes, scaled.chunk(len(titles)), strict=True):
        shown = torch.as_tensor(axes.images[0].get_array())
        torch.testing.assert_close(shown[1 : size + 1, 1 : size + 1], filters[0].permute(1, 2, 0))
        assert shown.shape[1] == min(16, len(filters)) * (size + 2)


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    from data.pictures import write_folder

    run = tmp_path / "run"
    assert command("train", *TINY, "--epochs", 1, "--out", run).exit_code == 0
    write_folder(tmp_path / "two" / "val", {"a": 2, "b": 2})
    for arguments, named in (
        (("train", *TINY, "--out", run), "has a run of 5 steps"),
        (("train", "--resume", "--out", run, "--lr", 3), "lr is 0.02, not 3"),
        (("train", "--resume", "--out", tmp_path / "no"), "no run"),
        (("train", *TINY, "--out", tmp_path / "no", "--drops", "x"), "--drops"),
        (("train", *TINY, "--out", tmp_path / "no", "--recipe", "x"), "recipe must be one of"),
        (("train", *TINY, "--out", "/proc/no"), "/proc/no"),
        (("train", "--data", "digits", "--out", tmp_path / "no"), "missing: model"),
        (("eval", tmp_path / "no"), "no run"),
        (("eval", run, "--data", "nowhere"), "nowhere"),
        (("eval", run, "--data", tmp_path / "two"), "has 2 classes, and the network was trained for 10"),
        (("eval", run, "--checkpoint", "step-3"), "step-3"),
    ):
        result = command(*arguments)
        assert result.exit_code == 2, result.output
        assert named in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())
    assert not (tmp_path / "no").exists()
    model = run / "step-5" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:1000])
    for arguments in (("eval", run), ("train", "--resume", "--out", run)):
        result = command(*arguments)
        assert result.exit_code == 1
        assert "model.safetensors: is damaged" in result.output


def test_ctrl_c_saves_and_stops(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastcnn", "train", *TINY, "--epochs", "100000", "--out", str(run)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    told = ""
    for line in process.stderr:
        told += line
        if "epoch 1/" in line:
            process.send_signal(signal.SIGINT)
            break
    told += process.stderr.read()
    assert process.wait() == 130, told
    newest = max(checkpoints.list_checkpoints(run))
    assert f"interrupted and saved in {run}/step-{newest}" in told
    assert max(event.step for event in read_events(run)) == newest
