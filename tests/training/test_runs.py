"""Runs: what they write, that they are resumed to the bit, and what is refused without anything being lost."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastcnn.data import ImageError
from fastcnn.data.dataset import Encoded
from fastcnn.training import RECIPES, Diverged, checkpoints, load_model, train
from fastcnn.training.events import Begun, Epoch, Event, Saved, Step
from fastcnn.training.logs import Logs, read_events
from fastcnn.training.saved import choose_checkpoint

from .data import CLASSES, SMALL, splits


class Interrupt:
    """A listener that asks the run to stop after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step) and event.step == self.steps:
            os.kill(os.getpid(), signal.SIGINT)


def tensors(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = checkpoints.list_checkpoints(run)
    return {file.name: load_file(file) for file in sorted(found[max(found)].glob("*.safetensors"))}


def assert_same(run: Path, other: Path) -> None:
    ours, theirs = tensors(run), tensors(other)
    states = [checkpoints.read_state(choose_checkpoint(r, "newest")) for r in (run, other)]
    assert len({json.dumps({**state, "environment": None}, sort_keys=True) for state in states}) == 1
    assert ours.keys() == theirs.keys() == {"model.safetensors", "optimizer.safetensors"}
    for file in ours:
        assert ours[file].keys() == theirs[file].keys()
        for name in ours[file]:
            assert torch.equal(ours[file][name], theirs[file][name]), name
    steps = [[(event.step, event.loss) for event in read_events(r) if isinstance(event, Step)] for r in (run, other)]
    assert steps[0] == steps[1]
    assert [step for step, _ in steps[0]] == list(range(1, len(steps[0]) + 1))


def test_a_run_writes_checkpoints_metrics_and_tensorboards_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    heard: list[Event] = []
    result = train(splits(), **SMALL, out=tmp_path / "run", listeners=[heard.append])
    assert result.complete
    assert result.checkpoint == tmp_path / "run" / "step-15"
    assert len(result.validations) == 3
    assert isinstance(heard[0], Begun)
    kinds = [type(event) for event in heard]
    assert (kinds.count(Step), kinds.count(Epoch), kinds.count(Saved)) == (15, 3, 4)
    assert [event for event in heard if isinstance(event, Step | Epoch)] == read_events(tmp_path / "run")
    kept = list(checkpoints.list_checkpoints(tmp_path / "run"))
    assert kept[-3:] == [5, 10, 15]
    state = json.loads((result.checkpoint / "state.json").read_text())
    assert (state["epoch"], state["step"], state["steps_done"]) == (3, 0, 15)
    assert state["environment"]["threads"] == torch.get_num_threads()
    assert state["environment"]["torch"] == torch.__version__
    board = EventAccumulator(str(tmp_path / "run")).Reload()
    losses = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in board.Scalars("train/loss")]
    assert losses == [(event.step, event.loss) for event in heard if isinstance(event, Step)]
    assert {path.name for path in (tmp_path / "run").iterdir()} - {"metrics.jsonl"} == {
        *(f"step-{step}" for step in kept),
        *(path.name for path in (tmp_path / "run").glob("events.out.tfevents.*")),
    }


def test_the_best_and_the_newest_three_are_kept(tmp_path: Path) -> None:
    result = train(splits(), **{**SMALL, "epochs": 8}, out=tmp_path / "run", dropout_p=0.0)
    assert result.best is not None
    best = max(found.top1 for found in result.validations if found)
    first = next(epoch for epoch, found in enumerate(result.validations) if found and found.top1 == best)
    assert result.best.name == f"step-{5 * (first + 1)}"
    assert set(checkpoints.list_checkpoints(tmp_path / "run")) == {5 * (first + 1), 30, 35, 40}
    images = torch.rand(2, 3, 67, 67)
    wanted = load_file(result.best / "model.safetensors")
    assert all(torch.equal(wanted[name], value) for name, value in load_model(tmp_path / "run").state_dict().items())
    assert load_model(tmp_path / "run", "newest")(images).shape == (2, 4)


OTHER_RUNS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adam": {"optimizer": "adam", "lr": 1e-3},
    "accumulated": {"accumulate": 3, "dropout": "paper"},
    "bf16": {"precision": "bf16"},
    "fp64": {"precision": "fp64"},
    "contiguous": {"channels_last": False},
    "as_run": {
        "recipe": replace(RECIPES["alexnet-as-run"], drops=(1, 2), slow_conv1=1, stop_conv1=2, noise_until=2),
        "lr": 1e-3,
    },
    "vgg": {"model": "vgg_a", "recipe": "vgg-paper", "input_size": 32, "lr": 1e-5, "patience": 1},
    "batch_norm": {"model": "alexnet_bn"},
    "bf16_adam_accumulated": {"precision": "bf16", "optimizer": "adam", "lr": 1e-3, "accumulate": 3},
    "no_momentum": {"momentum": 0.0},
    "auxiliary_heads": {"model": "inception_v1", "options": {"aux": True}, "width": None, "input_size": 96},
    "squeezenet": {"model": "squeezenet1_1", "width": None},
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_an_interrupted_run_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    given = {**SMALL, **OTHER_RUNS[name]}
    train(splits(), **given, out=tmp_path / "alone")
    result = train(splits(), **given, out=tmp_path / "run", listeners=[Interrupt(3)])
    assert not result.complete
    assert result.checkpoint.name == "step-3"
    for stop in (5, 12):
        assert not train(splits(), out=tmp_path / "run", resume=True, listeners=[Interrupt(stop)]).complete
    generator = torch.get_rng_state()
    assert train(splits(), out=tmp_path / "run", resume=True).complete
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same(tmp_path / "run", tmp_path / "alone")


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        calls.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    tensors = {name: {"weight": torch.zeros(2)} for name in ("model", "optimizer")}
    checkpoints.save(tmp_path, 7, tensors, {"steps_done": 7})
    files = ("model.safetensors", "optimizer.safetensors", "state.json", "step-7.partial")
    assert calls == [*(("fsync", file) for file in files), ("rename", "step-7"), ("fsync", tmp_path.name)]


def test_lines_after_the_checkpoint_are_not_there_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    run = tmp_path / "run"
    train(splits(), **SMALL, out=run)
    shutil.rmtree(run / "step-15")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # a crash in the middle of a line
    train(out=run, data=splits(), resume=True)
    steps = [event.step for event in read_events(run) if isinstance(event, Step)]
    assert steps == list(range(1, 16))
    assert [event.epoch for event in read_events(run) if isinstance(event, Epoch)] == [0, 1, 2]
    (file_of_board,) = run.glob("events.out.tfevents.*")
    losses = [
        event.step
        for event in EventFileLoader(str(file_of_board)).Load()
        if any(value.tag == "train/loss" for value in event.summary.value)
    ]
    assert losses == list(range(1, 16))


def test_runs_that_are_killed_at_any_point_end_with_the_same_bits() -> None:
    done = subprocess.run([sys.executable, "-m", "tools.crashes"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed at 20 random moments in all" in done.stdout
    for name in ("write", "fsync", "rename", "unlink", "rmdir"):
        assert f"killed before {name}" in done.stdout
        assert f"killed after {name}" in done.stdout


def test_pictures_of_files_and_workers_give_the_same_bits(tmp_path: Path) -> None:
    from data.pictures import write_folder

    write_folder(tmp_path / "data" / "train", {"a": 9, "b": 9})
    write_folder(tmp_path / "data" / "val", {"a": 3, "b": 3}, 100)
    given: dict[str, Any] = {**SMALL, "data": str(tmp_path / "data"), "epochs": 2}
    for workers in (0, 2):
        assert train(**given, out=tmp_path / f"run{workers}", workers=workers).complete
    assert_same(tmp_path / "run0", tmp_path / "run2")


def test_what_differs_on_resuming_is_said(tmp_path: Path) -> None:
    train(splits(), **SMALL, out=tmp_path / "run", listeners=[Interrupt(3)])
    heard: list[Event] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        train(splits(), out=tmp_path / "run", resume=True, listeners=[heard.append])
    finally:
        torch.set_num_threads(threads)
    begun = heard[0]
    assert isinstance(begun, Begun)
    assert begun.step == 3
    (note,) = begun.notes
    assert f"threads is {threads + 1} and was {threads}" in note


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"lr": 0.5}, "lr is 0.02, not 0.5"),
        ({"lr": 0.02000000001}, "lr is 0.02, not 0.02000000001"),
        ({"batch": 2, "accumulate": 4}, "batch is 8, not 2; accumulate is 1, not 4"),
        ({"epochs": 9, "batch": 9}, "epochs is 3, not 9; batch is 8, not 9|batch is 8, not 9; epochs is 3, not 9"),
        ({"model": "caffenet"}, "model is alexnet, not caffenet"),
        ({"seed": 1}, "seed is 0, not 1"),
        ({"width": 0.5}, "width is 0.02, not 0.5"),
        ({"recipe": "alexnet-paper"}, "recipe is plain, not alexnet-paper"),
        ({"plain": True}, "plain is no, not yes"),
        ({"data": splits(train=44)}, "data='small' is not what .* train"),
        ({"data": splits(seed=5)}, "data='small' is not what .* train, validation"),
    ],
)
def test_other_settings_on_resuming_are_refused_and_named(given: dict[str, Any], named: str, tmp_path: Path) -> None:
    train(splits(), **SMALL, out=tmp_path / "run", listeners=[Interrupt(3)])
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(ValueError, match=named):
        train(**{"data": splits(), **given}, out=tmp_path / "run", resume=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert train(splits(), **SMALL, out=tmp_path / "run", resume=True).complete  # the run's own are allowed


def _cut(run: Path) -> None:
    file = run / "step-3" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _flip(run: Path) -> None:
    file = run / "step-3" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _half_state(run: Path) -> None:
    file = run / "step-3" / "state.json"
    file.write_text(file.read_text()[:200])


def _changed(**settings: Any) -> Callable[[Path], None]:
    """Of the run, in states that are whole otherwise."""

    def change(run: Path) -> None:
        for checkpoint in checkpoints.list_checkpoints(run).values():
            state = checkpoints.read_state(checkpoint)
            state["job"].update(settings)
            (checkpoint / "state.json").write_bytes(checkpoints._sealed(state))

    return change


def _without(file: str) -> Callable[[Path], None]:
    return lambda run: (run / "step-3" / file).unlink()


def _another_lr(run: Path) -> None:
    file = run / "step-3" / "state.json"
    file.write_text(file.read_text().replace('"lr": 0.02', '"lr": 0.07'))


def _renamed(run: Path) -> None:
    (run / "step-3").rename(run / "step-9")


def _of_another_run(run: Path) -> None:
    other = run.with_name("other")
    train(splits(), **{**SMALL, "seed": 1}, out=other, listeners=[Interrupt(4)])
    shutil.copytree(other / "step-4", run / "step-4")


def _no_checkpoints(run: Path) -> None:
    for path in run.glob("step-*"):
        shutil.rmtree(path)


@pytest.mark.parametrize(
    ("damage", "error", "named"),
    [
        (_cut, RuntimeError, "model.safetensors: is damaged .* resumes from step 0"),
        (_flip, RuntimeError, "optimizer.safetensors: is damaged"),
        (
            _without("state.json"),
            FileNotFoundError,
            "state.json: is missing. Without step-3 the run",
        ),
        (_without("model.safetensors"), FileNotFoundError, "model.safetensors: is missing. Without step-3"),
        (_half_state, RuntimeError, "state.json: cannot be read"),
        (_another_lr, RuntimeError, "state.json: .* was changed"),
        (_changed(recipe=5), RuntimeError, "state.json: cannot be read"),
        (_changed(model="lenet"), RuntimeError, "step-3: does not fit"),
        (_changed(model="vgg_a"), RuntimeError, "does not fit"),
        (_changed(classes=[*CLASSES, "more"]), RuntimeError, "does not fit"),
        (_no_checkpoints, FileNotFoundError, "no checkpoint"),
        (_renamed, RuntimeError, "step-9.*it was saved as step-3. Without step-9 the run resumes from step 0"),
        (_of_another_run, RuntimeError, "step-4 and step-0 are of different runs"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_named(
    damage: Callable[[Path], None], error: type[Exception], named: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(splits(), **SMALL, out=run, listeners=[Interrupt(3)])
    damage(run)
    with pytest.raises(error, match=named):
        train(splits(), out=run, resume=True)
    if damage in (_flip, _of_another_run):  # of the optimizer, which the network does not need; a network of its own
        load_model(run, "step-3")
        return
    with pytest.raises(error, match=named):
        load_model(run, "newest")


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    write = checkpoints._write

    def full(file: Path, content: bytes) -> str:
        if "step-10" in str(file) and file.suffix == ".safetensors":
            file.write_bytes(content[:100])
            raise OSError(28, "No space left on device", str(file))
        return write(file, content)

    monkeypatch.setattr(checkpoints, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        train(splits(), **SMALL, out=run)
    assert list(checkpoints.list_checkpoints(run)) == [0, 5]
    assert not list(run.glob("*.partial"))
    monkeypatch.undo()
    assert train(splits(), out=run, resume=True).complete
    train(splits(), **SMALL, out=tmp_path / "alone")
    assert_same(run, tmp_path / "alone")


def test_a_log_that_cannot_grow_ends_the_run_and_is_named(tmp_path: Path) -> None:
    run, limit = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event: Event) -> None:
        if isinstance(event, Step) and event.step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((run / "metrics.jsonl").stat().st_size + 10, limit[1]))

    try:
        with pytest.raises(OSError, match=r"File too large: .*metrics\.jsonl"):
            train(splits(), **SMALL, out=run, listeners=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(checkpoints.list_checkpoints(run)) == [0, 5]
    assert train(splits(), out=run, resume=True).complete
    train(splits(), **SMALL, out=tmp_path / "alone")
    assert_same(run, tmp_path / "alone")


def test_a_full_disk_is_an_error_of_the_log_that_it_names(tmp_path: Path) -> None:
    step = Step(step=1, epoch=0, loss=1.0, lr=0.1, pictures=1, seconds=1.0, waiting=0.0, time=0.0)
    for attribute, mode in (("lines", "w"), ("board", "wb")):
        logs = Logs(tmp_path, 0, 0)
        setattr(logs, attribute, open("/dev/full", mode))  # noqa: SIM115
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            logs(step)
        logs.close()


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"at step \d+, at a learning rate of .*step-\d") as caught:
        train(splits(), **{**SMALL, "lr": 1e30, "warmup": 0, "checkpoint_minutes": 0}, out=tmp_path / "run")
    assert caught.value.checkpoint.is_dir()
    model = load_file(caught.value.checkpoint / "model.safetensors")
    assert all(value.isfinite().all() for value in model.values())


def test_a_validation_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"The loss of validation is (nan|inf) at step 1,.*step-0"):
        train(splits(train=8), **{**SMALL, "lr": 1e10, "warmup": 0}, out=tmp_path / "run")
    assert list(checkpoints.list_checkpoints(tmp_path / "run")) == [0]


@pytest.mark.parametrize("stop", [5, 10, 15])
def test_the_best_is_known_after_an_interruption_at_the_end_of_an_epoch(stop: int, tmp_path: Path) -> None:
    given = {**SMALL, "dropout_p": 0.0}
    alone = train(splits(), **given, out=tmp_path / "alone")
    result = train(splits(), **given, out=tmp_path / "run", listeners=[Interrupt(stop)])
    assert (result.complete, result.checkpoint.name) == (False, f"step-{stop}")
    result = train(splits(), out=tmp_path / "run", resume=True)
    assert alone.best is not None
    assert result.best is not None
    assert checkpoints.read_state(result.checkpoint)["best"] == checkpoints.read_state(alone.checkpoint)["best"]
    assert choose_checkpoint(tmp_path / "run") == result.best
    assert result.best.name == alone.best.name
    assert_same(tmp_path / "run", tmp_path / "alone")


def test_a_best_checkpoint_that_was_deleted_is_missed(tmp_path: Path) -> None:
    result = train(splits(), **SMALL, out=tmp_path / "run")
    assert result.best is not None
    shutil.rmtree(result.best)
    if result.best == result.checkpoint:
        pytest.fail("the newest is the best")
    with pytest.raises(FileNotFoundError, match=f"no checkpoint '{result.best.name}'"):
        load_model(tmp_path / "run")


def test_another_run_in_this_process_is_refused(tmp_path: Path) -> None:
    errors: list[str] = []

    def second(event: Event) -> None:
        if isinstance(event, Begun):
            with pytest.raises(RuntimeError, match="this process is training already") as caught:
                train(splits(), **SMALL, out=tmp_path / "other")
            errors.append(str(caught.value))

    assert train(splits(), **SMALL, out=tmp_path / "run", listeners=[second]).complete
    assert len(errors) == 1
    assert not (tmp_path / "other").exists()
    assert train(splits(), **SMALL, out=tmp_path / "other").complete


def test_what_is_not_of_the_run_stays(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(splits(), **SMALL, out=run, listeners=[Interrupt(3)])
    (run / "thesis.tmp").touch()
    (run / "step-notes.partial").mkdir()
    for name in ("step-8.partial", "metrics.jsonl.77.tmp", "step-3/state.json.77.tmp"):
        (run / name).mkdir() if name.endswith("partial") else (run / name).touch()
    assert train(splits(), out=run, resume=True).complete
    assert (run / "thesis.tmp").exists()
    assert (run / "step-notes.partial").exists()
    assert not list(run.glob("step-8*"))
    assert not list(run.glob("**/*.77.tmp"))


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "step", "st',
        "[" * 100_000,
        '"seconds": 0,',
        '"seconds": NaN,',
        '"step": "3",',
        f'"pictures": {"9" * 400},',
        "twice",
    ],
)
def test_a_log_that_was_changed_costs_no_other_line(line: str, tmp_path: Path, logged: list[str]) -> None:
    run = tmp_path / "run"
    train(splits(), **SMALL, out=run, listeners=[Interrupt(7)])
    lines = (run / "metrics.jsonl").read_text().splitlines()
    if line == "twice":
        lines = lines * 2
    elif line.endswith(","):
        name = line.partition(":")[0]
        lines[2] = re.sub(rf"{name}: [^,]+,", line, lines[2])
    else:
        lines[2] = line
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert train(splits(), out=run, resume=True).complete
    steps = [event.step for event in read_events(run) if isinstance(event, Step)]
    wanted = [step for step in range(1, 16) if line == "twice" or step != 3]
    assert steps == wanted
    missing = f"{run / 'metrics.jsonl'}: the lines of 1 steps and 0 epochs are missing"
    assert (missing in logged) == (line != "twice")


def test_a_line_of_the_log_that_cannot_be_written_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, call, failed = tmp_path / "run", Logs.__call__, []

    def once(logs: Logs, event: Event) -> None:
        if isinstance(event, Step | Epoch) and event.step == 5 and type(event) not in failed:
            failed.append(type(event))
            raise OSError(28, "No space left on device")
        call(logs, event)

    monkeypatch.setattr(Logs, "__call__", once)
    for resume in (False, True):
        with pytest.raises(OSError, match="No space left"):
            train(splits(), **SMALL, out=run, resume=resume)
    assert train(splits(), out=run, resume=True).complete
    monkeypatch.undo()
    assert [event.epoch for event in read_events(run) if isinstance(event, Epoch)] == [0, 1, 2]
    train(splits(), **SMALL, out=tmp_path / "alone")
    assert_same(run, tmp_path / "alone")


def test_an_error_after_ctrl_c_is_not_lost(tmp_path: Path) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, Step) and event.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            raise KeyError("of the listener")

    with pytest.raises(KeyError, match="of the listener"):
        train(splits(), **SMALL, out=tmp_path / "run", listeners=[fail])
    assert train(splits(), out=tmp_path / "run", resume=True).complete


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(splits(), **SMALL, out=run)
    before = tensors(run)
    with pytest.raises(FileExistsError, match="has a run of 15 steps"):
        train(splits(), **SMALL, out=run)
    assert tensors(run).keys() == before.keys()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        train(splits(), **SMALL, out=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no run"):
        train(splits(), **SMALL, out=tmp_path / "nowhere", resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        train(splits(), **SMALL, out=tmp_path / "file")
    assert not (tmp_path / "nowhere").exists()


def test_two_processes_in_one_folder_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def second(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            before = sorted(run.iterdir())
            code = f"from fastcnn.training import train; train(out={str(run)!r}, resume=True)"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            assert "BlockingIOError" in done.stderr
            assert "another process holds it" in done.stderr
            assert sorted(run.iterdir()) == before

    assert train(splits(), **SMALL, out=run, listeners=[second]).complete


def test_a_folder_that_cannot_be_written_is_refused_before_the_pictures_are_measured(tmp_path: Path) -> None:
    class Unread(Fragile):
        def pixels(self, index: int) -> Any:
            raise AssertionError("it was read")

    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        train({"train": Unread("train", 8)}, **SMALL, out=tmp_path / "file" / "run", workers=0)


@pytest.mark.parametrize(
    ("given", "error", "named"),
    [
        ({"model": "lenet"}, ValueError, "lenet"),
        ({"recipe": "best"}, ValueError, "recipe must be one of"),
        ({"width": 0}, ValueError, "width"),
        ({"input_size": 60}, ValueError, "input_size"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"device": "tpu"}, ValueError, "device"),
        ({"checkpoint_minutes": -1.0}, ValueError, "checkpoint_minutes"),
        ({"learning_rate": 0.1}, TypeError, "learning_rate"),
        ({"name": "x"}, TypeError, "name"),
        ({"data": "nowhere"}, FileNotFoundError, "nowhere"),
        ({"data": None}, TypeError, "data"),
        ({"schedule": "plateau", "data": {"train": splits()["train"]}}, ValueError, "plateau"),
        ({"data": {"validation": splits()["validation"]}}, ValueError, "must be train and perhaps validation"),
        ({"data": {"train": splits()["train"], "val": splits()["validation"]}}, ValueError, "not train, val"),
        (
            {"data": {**splits(), "validation": splits(classes=("a", "b"))["train"]}},
            ValueError,
            "classes of validation",
        ),
        ({"data": 5}, TypeError, "data must be str"),
        ({"options": ["depth"]}, TypeError, "options must be a dictionary"),
        ({"width": 1e18}, ValueError, "width must be positive and at most 1000"),
        ({"epochs": 10**400}, ValueError, "epochs must be at least 1 and at most 1,000,000,000"),
        ({"lr": 10**400}, TypeError, "lr must be float"),
        ({"start_from": "nowhere"}, FileNotFoundError, "nowhere"),
        ({"options": {"depth": 3}}, TypeError, "depth"),
        ({"options": {"width": 3}}, TypeError, "setting of their own: width"),
        ({"options": {"lrn_groups": {1}}}, TypeError, "JSON"),
        ({"input_size": 0}, ValueError, "input_size=0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    given: dict[str, Any], error: type[Exception], named: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=named):
        train(**{"data": splits(), **SMALL, **given}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Unreadable(Encoded):
    """Pictures of which some cannot be read: two always, all while a file is missing."""

    def __init__(self, split: str, count: int, needed: Path) -> None:
        super().__init__("unreadable", split, "all", CLASSES, torch.arange(count) % 4)
        self.needed = needed
        needed.touch()

    def file(self, index: int) -> str:
        raise AssertionError

    def pixels(self, index: int) -> Any:
        if index in (1, 6) or not self.needed.exists():
            raise ImageError(f"picture {index} is damaged")
        return torch.full((80, 80, 3), 50 * (index % 4), dtype=torch.uint8).numpy()


def test_what_was_skipped_is_known_after_an_interruption(tmp_path: Path) -> None:
    data = {"train": Unreadable("train", 12, tmp_path / "file"), "validation": splits()["validation"]}
    given = {**SMALL, "batch": 4, "epochs": 2}
    assert train(data, **given, out=tmp_path / "alone", workers=0).skipped == 2
    train(data, **given, out=tmp_path / "run", workers=0, listeners=[Interrupt(2)])
    train(data, out=tmp_path / "run", resume=True, workers=0, listeners=[Interrupt(3)])
    result = train(data, out=tmp_path / "run", resume=True, workers=0)
    assert (result.complete, result.skipped) == (True, 2)
    assert_same(tmp_path / "run", tmp_path / "alone")
    for name in ("alone", "run"):
        assert [event.skipped for event in read_events(tmp_path / name) if isinstance(event, Epoch)] == [2, 2]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("step", [2, 6])
def test_pictures_that_are_gone_for_a_while_end_the_run_and_are_not_taken_for_trained(
    step: int, workers: int, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    data = {"train": Unreadable("train", 48, file), "validation": splits()["validation"]}
    given = {**SMALL, "batch": 12, "epochs": 3}
    train(data, **given, out=tmp_path / "alone", workers=0)

    def lose(event: Event) -> None:
        if isinstance(event, Step) and event.step == step:
            file.unlink()

    for settings in ({**given, "listeners": [lose]}, {"resume": True}):
        with pytest.raises(ImageError, match=r"step \d+: none of its pictures can be read. picture \d+ is damaged"):
            train(data, **settings, out=tmp_path / "run", workers=workers)
    reached = max(checkpoints.list_checkpoints(tmp_path / "run"))
    assert step <= reached <= step + 3  # what a worker has read before
    file.touch()
    result = train(data, out=tmp_path / "run", resume=True, workers=workers)
    assert (result.complete, result.skipped) == (True, 2)
    if not workers:
        assert reached == step
        assert_same(tmp_path / "run", tmp_path / "alone")
    assert [event.step for event in read_events(tmp_path / "run") if isinstance(event, Step)] == list(range(1, 13))


class Fragile(Encoded):
    """Pictures that a worker dies of."""

    def __init__(self, split: str, count: int) -> None:
        super().__init__("fragile", split, "all", CLASSES, torch.arange(count) % 4)

    def file(self, index: int) -> str:
        raise AssertionError

    def pixels(self, index: int) -> Any:
        if (Path(os.environ["FRAGILE"]) / "dies").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((80, 80, 3), 50 * (index % 4), dtype=torch.uint8).numpy()


def test_a_worker_that_dies_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAGILE", str(tmp_path))
    data = {"train": Fragile("train", 40), "validation": Fragile("validation", 4)}
    train(data, **SMALL, out=tmp_path / "alone", workers=1)

    def die(event: Event) -> None:
        if isinstance(event, Step) and event.step == 7:
            (tmp_path / "dies").touch()

    with pytest.raises(RuntimeError, match="worker"):
        train(data, **SMALL, out=tmp_path / "run", workers=1, listeners=[die])
    assert max(checkpoints.list_checkpoints(tmp_path / "run")) > 5  # the epoch's
    (tmp_path / "dies").unlink()
    assert train(out=tmp_path / "run", data=data, resume=True, workers=1).complete
    assert_same(tmp_path / "run", tmp_path / "alone")


def test_vgg_starts_from_the_layers_of_a(tmp_path: Path) -> None:
    given: dict[str, Any] = {"recipe": "vgg-paper", "width": 0.05, "input_size": 32, "batch": 8, "epochs": 1}
    train(splits(), "vgg_a", **given, out=tmp_path / "a", lr=1e-5)
    train(splits(), "vgg_b", **given, out=tmp_path / "b", lr=0.0, start_from=str(tmp_path / "a"))
    theirs, ours = (load_model(tmp_path / name).weighted_layers() for name in "ab")
    for layer in ("conv1_1", "conv2_1", "fc6", "fc7", "fc8"):
        assert torch.equal(ours[layer].weight, theirs[layer].weight)
    with pytest.raises(TypeError, match="start_from"):
        train(splits(), **SMALL, out=tmp_path / "c", start_from=str(tmp_path / "a"))


def test_fused_and_plain_layers_learn_alike(tmp_path: Path) -> None:
    given: dict[str, Any] = {**SMALL, "epochs": 10, "precision": "fp64", "dropout_p": 0.0, "lr": 0.05}
    for plain in (False, True):
        train(splits(), **given, out=tmp_path / f"{plain}", plain=plain)
    fused, plain_ = (
        [event.loss for event in read_events(tmp_path / f"{plain}") if isinstance(event, Step)]
        for plain in (False, True)
    )
    assert len(fused) == 50
    assert fused == pytest.approx(plain_, rel=1e-9, abs=0)
    assert sum(fused[-5:]) < 0.8 * sum(fused[:5])
