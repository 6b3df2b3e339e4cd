"""Broken ONNX files: refused, or computed as onnxruntime computes them. ``make fuzz`` breaks many more."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tools.fuzz import BYTES, Outcome, image, in_a_process, judged
from tools.fuzz_files import FILES, MUTATIONS, mutated

ROOT = Path(__file__).parents[2]


def test_broken_files():
    command = [sys.executable, "-m", "tools.fuzz", "--files", "100"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"(\w+ +[a-z, ]+?) +(\d+) *$", done.stdout, re.M))
    for function in ("from_onnx", "load_weights"):
        files = {what.split(maxsplit=1)[1]: int(n) for what, n in counts.items() if what.startswith(function)}
        assert sum(files.values()) == 100
        assert files["refused"] > 40
        assert files["loaded, and equal"] > 5


def test_a_seed_breaks_a_file_in_one_way():
    assert mutated(7) == mutated(7)
    broken = [mutated(seed) for seed in range(300)]
    assert {name for name, _, _ in broken} == set(FILES)
    assert {how.partition(",")[0] for _, how, _ in broken} == set(MUTATIONS)
    whole = {name: make().SerializeToString() for name, make in FILES.items()}
    assert all(len(data) < 1 << 20 for data in whole.values())
    assert sum(data != whole[name] for name, _, data in broken) > 290


def output(value, shape=(2,)):
    return Outcome("output", output=torch.full(shape, value))


REFUSED, DIED, RAISED, LOADED = (Outcome(what) for what in ("refused", "died", "raised", "loaded"))


@pytest.mark.parametrize(
    ("theirs", "ours", "is_right"),
    [
        (output(1.0), output(1.00001), True),
        (output(1.0), output(1.001), False),
        (output(1.0), output(1.0, (1, 2)), False),
        (output(1.0), output(float("nan")), False),
        (output(float("nan")), output(float("nan")), True),
        (output(1.0), REFUSED, True),
        (output(1.0), RAISED, False),
        (output(1.0), DIED, False),
        (REFUSED, REFUSED, True),
        (DIED, REFUSED, True),
        (REFUSED, output(1.0), False),
        (REFUSED, LOADED, False),
        (DIED, LOADED, False),
        (RAISED, RAISED, True),
        (RAISED, output(1.0), False),
        (Outcome("skipped"), LOADED, True),
        (Outcome("skipped"), DIED, False),
    ],
)
def test_judgements(theirs, ours, is_right):
    assert ("WRONG" not in judged(theirs, ours)) == is_right


def test_processes_that_come_to_an_end_are_told_apart():
    assert in_a_process(lambda: Outcome("refused", "why")) == Outcome("refused", "why")
    assert in_a_process(lambda: os.kill(os.getpid(), signal.SIGKILL)).what == "died"
    assert in_a_process(lambda: os._exit(0)).what == "died"
    assert in_a_process(lambda: Outcome(bytes(2 * BYTES)[:1].hex())) == Outcome("died", "out of memory")


def test_images():
    assert image(["batch", 3, 8, None], [None, 3, 20, 20]).shape == (2, 3, 8, 20)
    assert image([1, 3, 1 << 20, 1 << 20], [1, 3, 20, 20]) is None
