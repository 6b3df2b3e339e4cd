"""Tuning: nothing wrong is ever chosen, choices last, and a broken file or a lack of memory costs only speed."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from promises import FORMATS, ident, randn
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastcnn
from fastcnn.ops import select_conv2d_relu
from fastcnn.ops.aten import conv2d_relu as aten
from fastcnn.ops.autotune import Memory, Tuner, agree, cache_folder
from fastcnn.ops.cudnn import conv2d_relu as cudnn
from fastcnn.ops.triton import conv2d_relu
from fastcnn.params import ConvParams

NAN = float("nan")


def right(x: Tensor) -> Tensor:
    return torch.where(x <= 0, 0, x)


def drops_nan(x: Tensor) -> Tensor:
    return right(x).nan_to_num()


def one_element_off(x: Tensor) -> Tensor:
    y = right(x)
    y[-1, -1] += y.max()
    return y


def no_memory(x: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_compiler(x: Tensor) -> Tensor:
    raise RuntimeError("out of resource: shared memory")


WRONG = {
    "drops_nan": drops_nan,
    "one_element_off": one_element_off,
    "imprecise": lambda x: right(x) * 1.01,
    "other_shape": lambda x: right(x)[:-1],
    "other_dtype": lambda x: right(x).double(),
    "all_nan": lambda x: right(x) * NAN,
    "no_memory": no_memory,
    "no_compiler": no_compiler,
}


def inputs() -> list[tuple[Tensor]]:
    return [(randn(200, 300),), (torch.full((2, 3), NAN),)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "tuning.json"


@pytest.fixture
def tuner(file: Path) -> Callable[..., Tuner]:
    """Makes one, as a new process would, for which the candidates take the given times."""

    def make(**times: float) -> Tuner:
        return Tuner(Memory(lambda: file), lambda run: times[run.func.__name__])

    return make


def named(name: str, run: Callable[[Tensor], Tensor] = right) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        return run(x)

    call.__name__ = name
    return call


def choose(tuner: Tuner, candidates: dict[str, Callable[[Tensor], Tensor]], key: str = "key", **options: object) -> str:
    return tuner.choose(key, {name: named(name, run) for name, run in candidates.items()}, inputs, 1e-3, **options)


def test_the_fastest_of_those_that_are_right_is_chosen(tuner):
    candidates = {"truth": right, "slow": right, "fast": right, "slower": right}
    assert choose(tuner(truth=3.0, slow=2.0, fast=1.0, slower=4.0), candidates) == "fast"


def test_the_truth_is_a_candidate(tuner):
    assert choose(tuner(truth=1.0, slow=2.0), {"truth": right, "slow": right}) == "truth"


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("timed", [True, False], ids=["timed", "untimed"])
def test_what_is_wrong_or_fails_is_never_chosen(tuner, name, timed):
    candidates = {"truth": right, "wrong": WRONG[name], "slow": right}
    one = tuner(truth=3.0, wrong=0.1, slow=2.0)
    assert choose(one, candidates, timed=timed, only=["wrong", "slow"]) == "slow"
    assert choose(one, {"truth": right, "wrong": WRONG[name]}, "another key", only=["wrong"], timed=timed) == "truth"


def test_untimed_the_first_that_is_right_is_chosen(tuner):
    candidates = {"truth": right, "wrong": drops_nan, "first": right, "second": no_compiler}
    assert choose(tuner(), candidates, only=["wrong", "first", "second"], timed=False) == "first"


def test_without_memory_for_the_inputs_the_truth_runs(tuner, file):
    one = tuner(truth=1.0, other=0.5)
    candidates = {"truth": right, "other": right}
    assert one.choose("key", candidates, partial(no_memory, torch.empty(0)), 1e-3) == "truth"
    assert not file.exists()  # the next process may have more


def test_memory_is_given_back_before_the_next_candidate(tuner, file):
    taken: list[weakref.ref[Tensor]] = []

    def greedy(x: Tensor) -> Tensor:
        big = torch.empty(1000)
        taken.append(weakref.ref(big))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def modest(x: Tensor) -> Tensor:
        gc.collect()
        assert taken[0]() is None
        return right(x)

    candidates = {"truth": right, "greedy": greedy, "modest": modest}
    one = tuner(truth=2.0, modest=1.0)
    assert choose(one, candidates) == "modest"
    assert choose(one, candidates) == "modest"  # is not tried again in this process,
    assert len(taken) == 1
    assert not file.exists()  # but in the next


def test_a_choice_is_remembered_by_the_next_process(tuner, file):
    candidates = {"truth": right, "fast": right}
    assert choose(tuner(truth=2.0, fast=1.0), candidates) == "fast"
    calls = []
    again = {name: lambda x, name=name: calls.append(name) for name in candidates}
    assert choose(tuner(), again) == "fast"
    assert not calls
    assert json.loads(file.read_text()) == {"key": "fast"}


def test_another_key_is_tuned_anew_and_both_are_remembered(tuner, file):
    candidates = {"truth": right, "other": right}
    assert choose(tuner(truth=2.0, other=1.0), candidates) == "other"
    assert choose(tuner(truth=1.0, other=2.0), candidates, "another key") == "truth"
    assert json.loads(file.read_text()) == {"key": "other", "another key": "truth"}


def test_what_is_no_candidate_any_more_is_tuned_anew(tuner):
    choose(tuner(truth=2.0, old=1.0), {"truth": right, "old": right})
    assert choose(tuner(truth=2.0, new=1.0), {"truth": right, "new": right}) == "new"


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"key": 3}', '{"key": ["fast"]}', '"key"', "\x00\xff"])
def test_a_damaged_file_is_replaced(tuner, file, content):
    file.parent.mkdir()
    file.write_bytes(content.encode("latin-1"))
    assert choose(tuner(truth=2.0, fast=1.0), {"truth": right, "fast": right}) == "fast"
    assert json.loads(file.read_text())["key"] == "fast"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("obstacle", ["folder is a file", "file is a folder", "no home"])
def test_where_nothing_can_be_written_the_choice_lasts_as_long_as_the_process(tuner, file, obstacle):
    if obstacle == "folder is a file":
        file.parent.write_text("")
    elif obstacle == "file is a folder":
        file.mkdir(parents=True)
    one = tuner(truth=2.0, fast=1.0)
    if obstacle == "no home":

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        one = Tuner(Memory(no_home), lambda run: {"truth": 2.0, "fast": 1.0}[run.func.__name__])
    candidates = {"truth": right, "fast": right}
    with pytest.warns(RuntimeWarning, match="cannot remember what it tuned"):
        assert choose(one, candidates) == "fast"
    assert choose(one, dict.fromkeys(candidates, no_memory)) == "fast"


def test_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FASTCNN_CACHE_DIR", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "fastcnn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder() == tmp_path / "caches" / "fastcnn"
    monkeypatch.setenv("FASTCNN_CACHE_DIR", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"


def test_agreement_counts_nan_and_single_elements():
    truth = torch.tensor([1.0, NAN, 0.0, 100.0])
    assert agree(truth.clone(), truth, 1e-3)
    assert agree(truth + torch.tensor([0.05, 0, 0, 0]), truth, 1e-3)
    assert not agree(truth + torch.tensor([0.5, 0, 0, 0]), truth, 1e-3)
    assert not agree(truth.nan_to_num(), truth, 1e-3)
    assert not agree(torch.full((4,), NAN), truth, 1e-3)
    assert agree(torch.empty(0), torch.empty(0), 1e-3)


# -- conv2d_relu ------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one: tensors without memory, and a tuner that tells what it was asked."""
    asked = []

    def choose(key, candidates, inputs, tolerance, *, only=(), timed=True):
        asked.append(SimpleNamespace(key=key, candidates=list(candidates), only=list(only), timed=timed))
        return (only or list(candidates))[-1]

    monkeypatch.setattr(
        select_conv2d_relu, "_tuner", lambda: SimpleNamespace(choose=choose, known=lambda key, names: None)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with FakeTensorMode():
        yield asked


def choice(x=None, weight=None, bias=None, conv=([1, 1], [1, 1], [1, 1], 2), with_mask=False):
    conv = ConvParams(*conv)
    x = torch.empty(2, 8, 9, 9, device="cuda") if x is None else x
    weight = torch.empty(32, 4, 3, 3, device="cuda") if weight is None else weight
    runs = select_conv2d_relu.candidates(x, weight, conv)
    return select_conv2d_relu.choose(runs, x, weight, bias, conv, with_mask)


def test_cudnn_runs_where_nothing_is_tuned(gpu):
    assert choice() == "cudnn"
    assert not gpu


def test_only_a_tuned_or_forced_convolution_runs_another_candidate(gpu, monkeypatch):
    x, weight = torch.empty(2, 8, 9, 9, device="cuda"), torch.empty(32, 4, 3, 3, device="cuda")
    given = x, weight, None, ConvParams([1, 1], [1, 1], [1, 1], 2), False

    def selected():
        return select_conv2d_relu.select(cudnn.forward, *given)

    missing = {"triton": "it is not installed"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(fastcnn.backends, "why_not", lambda name, device: missing.get(name, ""))
    assert selected() is aten.forward
    assert select_conv2d_relu.select_backward(cudnn.backward, x) is aten.backward
    missing.clear()
    assert selected() is cudnn.forward
    assert select_conv2d_relu.select_backward(cudnn.backward, x) is cudnn.backward
    assert not gpu
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("FASTCNN_TUNE", "1")
    assert selected().func is conv2d_relu.forward


def test_benchmark_mode_tunes_among_all(gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert choice().startswith("triton")
    (asked,) = gpu
    assert asked.candidates[0] == "cudnn"
    assert asked.timed
    assert not asked.only


@pytest.mark.parametrize("tuned", [False, True])
def test_the_forced_backend_runs_only_its_own_kernel_after_its_check(gpu, monkeypatch, tuned):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", tuned)
    monkeypatch.setattr(fastcnn.backends, "_forced", "triton")
    assert choice().startswith("triton")
    (asked,) = gpu
    assert asked.timed == tuned
    assert all(name.startswith("triton") for name in asked.only)


def test_nothing_is_tuned_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choice() == "cudnn"
    assert not gpu


def test_keys_differ_in_all_that_decides(gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    choice()
    choice(torch.empty(3, 8, 9, 9, device="cuda"))
    choice(torch.empty(2, 8, 9, 9, device="cuda", memory_format=torch.channels_last))
    choice(weight=torch.empty(32, 4, 3, 3, device="cuda", memory_format=torch.channels_last))
    choice(torch.empty(2, 8, 9, 9, device="cuda").half(), torch.empty(32, 4, 3, 3, device="cuda").half())
    choice(bias=torch.empty(32, device="cuda"))
    choice(with_mask=True)
    choice(conv=([1, 1], [0, 0], [1, 1], 2))
    with torch.backends.cudnn.flags(benchmark=True, allow_tf32=False):
        choice()
    with monkeypatch.context() as patched:
        patched.setattr(fastcnn.backends, "_forced", "triton")
        choice()
    for owner, name, value in (
        (torch, "__version__", "9.9"),
        (torch.version, "cuda", "99.0"),
        (torch.cuda, "get_device_name", lambda device=None: "another GPU"),
        (torch.backends.cudnn, "version", lambda: 99),
        (select_conv2d_relu, "_triton_version", lambda: "9.9"),
        (select_conv2d_relu, "__version__", "9.9"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, value)
            choice()
    keys = [asked.key for asked in gpu]
    assert len(set(keys)) == len(keys) == 16
    choice()
    assert gpu[-1].key == keys[0]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("weight", [(96, 3, 11, 11), (64, 3, 3, 3), (256, 48, 5, 5), (2, 1, 1, 1)], ids=ident)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_blocks_are_powers_of_two_that_tensor_cores_take(format, dtype, weight, groups):
    for ieee in (False, True):
        with torch.backends.cudnn.flags(allow_tf32=not ieee):
            x = torch.empty(2, groups * weight[1], 8, 8, dtype=dtype, device="meta", memory_format=format)
            configs = conv2d_relu.configurations(x, torch.empty(weight, dtype=dtype, device="meta"), groups)
        assert len({str(c) for c in configs}) == len(configs)
        for c in configs:
            assert all(size >= 16 and size & (size - 1) == 0 for size in (c.pixels, c.outputs, c.k))
            assert c.outputs < 2 * max(16, weight[0] // groups)
            assert c.k < 2 * max(16, weight[1] * weight[2] * weight[3])


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_checked_inputs_are_random_and_then_nan(format):
    x, weight, bias = torch.zeros(2, 3, 5, 5).to(memory_format=format), torch.zeros(4, 3, 3, 3), torch.zeros(4)
    state = torch.get_rng_state()
    random, nan = select_conv2d_relu._check_inputs(x, weight, bias)
    assert torch.equal(torch.get_rng_state(), state)
    for made, given in zip(random, (x, weight, bias), strict=True):
        assert made.stride() == given.stride()
        assert made.std() > 0.1
    assert nan[1].isnan().all()
    assert not x.any()  # those given are left alone
