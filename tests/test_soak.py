"""``make soak``: what grew is noticed, and an optimized model leaves nothing behind."""

import gc
import linecache
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import nn
from torch.fx import graph_module

import fastcnn
from tools.soak import SAMPLES, Sample, grown, soak
from tools.soak_calls import Calls

FLAT = [
    Sample(2000 * i, 600.0, 100.0, 150.0, 4, {"bounded": (i, 128), "container": (3, None)})
    for i in range(1, SAMPLES + 1)
]


def rising(what, per_call):
    """Samples in which something grows from the first call on."""
    return [replace(s, **{what: getattr(s, what) + per_call * s.calls}) for s in FLAT]


def test_nothing_grew():
    assert grown(FLAT) == []


@pytest.mark.parametrize(("what", "most"), [("in_use", 16), ("resident", 32)])
def test_memory_that_grows_with_the_calls(what, most):
    assert grown(rising(what, 0.9 * most / 80_000)) == []
    (told,) = grown(rising(what, 1.1 * most / 78_000))
    assert f"{most}.0 MB are allowed" in told


def test_memory_that_grew_in_the_warm_up_or_goes_up_and_down():
    assert (
        grown([replace(s, in_use=150 - 100 * (s.calls <= 20_000), resident=500 + s.calls % 6000 / 100) for s in FLAT])
        == []
    )


def test_memory_that_was_freed_is_not_held():
    assert grown([replace(s, resident=600 + s.calls / 200, free=100 + s.calls / 200) for s in FLAT]) == []


def test_a_cache_without_a_bound_and_threads_that_stay():
    caches = [replace(s, caches={"cache": (s.calls // 2000, None)}, threads=s.calls // 1000) for s in FLAT]
    assert grown(caches) == ["threads: up to 74, then from 76 to 100", "cache: up to 37, then from 38 to 50"]


def test_a_size_that_changes_without_a_trend():
    assert grown([replace(s, caches={"cache": (s.calls // 2000 % 7, None)}) for s in FLAT]) == []


@pytest.fixture
def nondeterministic():
    """As the soak runs, and most programs."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.usefixtures("nondeterministic")
def test_a_planted_leak_is_noticed(monkeypatch, threads):
    remembered = lru_cache(maxsize=None)(lambda shape: shape)
    monkeypatch.setattr(fastcnn.params, "planted_cache", remembered, raising=False)
    monkeypatch.setattr(fastcnn.backends, "planted_list", [], raising=False)
    monkeypatch.setattr(Calls, "_call_model", lambda self, checked: None)  # seconds for each graph
    drawn = Calls._input

    def leaking(self, *args, **kwargs):
        x = drawn(self, *args, **kwargs)
        remembered(x.shape)
        fastcnn.backends.planted_list.append(x)
        return x

    assert not [told for told in grown([*soak(300, seed=0, samples=10)]) if "planted" in told]
    monkeypatch.setattr(Calls, "_input", leaking)
    told = " ".join(grown([*soak(300, seed=0, samples=10)]))
    assert "fastcnn.params.planted_cache: up to" in told
    assert "fastcnn.backends.planted_list: up to" in told


@pytest.mark.usefixtures("nondeterministic")
def test_a_wrong_answer_ends_it(monkeypatch, threads):
    monkeypatch.setattr("tools.soak_calls.CHECKED", 1.0)
    monkeypatch.setattr(Calls, "_call_model", lambda self, checked: None)
    monkeypatch.setattr("fastcnn.functional.max_pool2d", lambda x, **pool: fastcnn.reference.max_pool2d(x, **pool) + 1)
    with pytest.raises(RuntimeError, match=r"call .* of the thread with seed .* failed") as failed:
        list(soak(200, seed=0, samples=10))
    assert "an error of" in str(failed.value.__cause__)


# -- what the soak found ----------------------------------------------------------------------------------------------


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()


@pytest.mark.usefixtures("nondeterministic")
def test_plans_leave_no_source_behind():
    fast = fastcnn.optimize(network(), inference=True)
    sizes = len(linecache.cache), len(graph_module._loader.eval_cache)
    for size in range(8, 24):
        fast(torch.rand(1, 3, size, size))
        if size == 10:  # by then there is a graph for any size
            sizes = len(linecache.cache), len(graph_module._loader.eval_cache)
    assert sizes == (len(linecache.cache), len(graph_module._loader.eval_cache))


def test_a_model_that_goes_takes_its_guards_along():
    def guards():
        gc.collect()
        return sum(type(o).__name__ == "GuardManagerWrapper" for o in gc.get_objects())

    for repetition in range(3):
        fast = fastcnn.optimize(network())
        fast(torch.rand(1, 3, 8, 8))
        fast(torch.rand(1, 3, 9, 9))
        del fast
        if repetition == 0:
            before = guards()
    assert guards() == before
