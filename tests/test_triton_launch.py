"""How Triton kernels are launched: what their errors say, inside a graph capture, and compiled by several processes."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import multiprocessing
from types import SimpleNamespace

import pytest
import torch

from fastcnn import LRNParams, backends
from fastcnn.ops.triton import launch as launching
from fastcnn.ops.triton import lrn

PROCESSES = 4


class Kernel:
    """In the place of a ``@triton.jit`` function: a launch calls ``run``."""

    def __init__(self, run):
        self.fn, self._run = run, run

    def __getitem__(self, grid):
        return self._run


def launch(run, x=None, programs=7):
    launching.launch(Kernel(run), programs, torch.empty(1) if x is None else x, BLOCK=64, num_warps=4)


def raises(error):
    def kernel(*args, **constants):
        raise error

    return kernel


# -- errors -----------------------------------------------------------------------------------------------------------


class OutOfResources(Exception):
    """As Triton's: not made from a message."""

    def __init__(self, required, limit, name):
        self.text = f"out of resource: {name}, Required: {required}, Hardware limit: {limit}"

    def __str__(self):
        return self.text


@pytest.mark.parametrize(
    "error", [OutOfResources(300, 227, "shared memory"), RuntimeError("Triton Error [CUDA]: invalid argument")], ids=str
)
def test_an_error_names_the_kernel(error):
    with pytest.raises(
        RuntimeError, match=r"^Triton kernel (?:tests\.)?test_triton_launch\.kernel \(7 programs of 4 warps\): "
    ) as e:
        launch(raises(error))
    assert str(e.value).endswith(str(error))
    assert e.value.__cause__ is error


def test_out_of_memory_stays_what_it_is():
    with pytest.raises(torch.OutOfMemoryError, match=r"kernel \(7 programs of 4 warps\): CUDA out of memory"):
        launch(raises(torch.OutOfMemoryError("CUDA out of memory")))


def test_no_programs_launch_nothing():
    launch(raises(AssertionError), programs=0)


def test_an_error_in_compilation_names_the_kernel():
    pytest.importorskip("triton")
    from tools.machine_code.compiled import compiling

    name = r"fastcnn\.kernels\.lrn\.lrn_forward_far_kernel \(1 programs of 4 warps\)"
    x = torch.empty(1, device="meta")
    with (
        contextlib.nullcontext() if backends.INTERPRETING else compiling(90),
        pytest.raises(RuntimeError, match=f"Triton kernel {name}"),
    ):
        launching.launch(launching.kernels("lrn").lrn_forward_far_kernel, 1, x, num_warps=4)


# -- graph capture ----------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(monkeypatch):
    """As if the current stream of a GPU were captured: ``mode`` is the thread's, 0 is the global one."""
    state = SimpleNamespace(mode=0, error=0, capturing=True)

    def exchange(pointer):
        value = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))
        value[0], state.mode = state.mode, value[0]
        return state.error

    library = SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange)
    monkeypatch.setattr(launching, "_driver", lambda: library)
    monkeypatch.setattr(launching, "_on_device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


ON_GPU = SimpleNamespace(is_cuda=True)


def test_a_launch_is_in_relaxed_mode_while_a_graph_is_captured(driver):
    modes = []
    launch(lambda *args, **constants: modes.append(driver.mode), ON_GPU)
    assert (modes, driver.mode) == ([2], 0)


def test_the_mode_is_put_back_after_an_error(driver):
    with pytest.raises(RuntimeError, match="no such luck"):
        launch(raises(ValueError("no such luck")), ON_GPU)
    assert driver.mode == 0


@pytest.mark.parametrize("x", [ON_GPU, torch.empty(1)], ids=["GPU", "CPU"])
def test_otherwise_the_mode_is_left_alone(driver, x):
    modes = []
    driver.capturing = x is not ON_GPU
    launch(lambda *args, **constants: modes.append(driver.mode), x)
    assert modes == [0]


def test_a_mode_that_cannot_be_set_is_an_error(driver):
    driver.error = 3
    with pytest.raises(RuntimeError, match=r"Triton kernel .* failed with CUDA error 3"):
        launch(raises(AssertionError), ON_GPU)


# -- several processes ------------------------------------------------------------------------------------------------


def compile_with_others(start, results):
    """What the kernel's machine code is; every process begins when all are there."""
    from tools.machine_code.compiled import compiling

    start.wait()
    try:
        # Of a number of channels that no other test compiles for.
        with compiling(90) as kernels:
            lrn.forward(torch.empty(1, 23, 3, 3, device="meta"), LRNParams(5))
        results.put(hashlib.sha256(kernels[0].cubin).hexdigest())
    except Exception as error:
        results.put(repr(error))


@pytest.mark.skipif(backends.INTERPRETING, reason="the interpreter compiles nothing")
def test_processes_that_share_an_empty_cache_compile_the_same(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    import tools.machine_code.compiled  # noqa: F401 - before the fork

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fork = multiprocessing.get_context("fork")
    start, results = fork.Barrier(PROCESSES), fork.Queue()
    processes = [fork.Process(target=compile_with_others, args=(start, results)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    hashes = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    (cubin,) = tmp_path.rglob("*.cubin")
    assert hashes == [hashlib.sha256(cubin.read_bytes()).hexdigest()] * PROCESSES
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name]
