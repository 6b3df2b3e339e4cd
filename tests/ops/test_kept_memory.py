"""Memory of large outputs, cached for the next ones. See csrc/cpu/memory.h."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastcnn
import fastcnn.functional as FF
from fastcnn import LRNParams, PoolParams
from fastcnn.ops import stage
from fastcnn.ops.cpu import conv2d_relu, convolution, max_pool2d, memory, relu_lrn_max_pool2d

pytestmark = pytest.mark.skipif("cpu" not in fastcnn.backends.available(), reason="needs the C++ library")


@pytest.fixture(autouse=True)
def every_output_is_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The deterministic mode, in which tests run, fills new tensors with NaN: there memory is not kept."""
    torch.use_deterministic_algorithms(False)
    fastcnn.backends.release_memory()
    monkeypatch.setattr(memory, "_LARGE_BYTES", 0)
    yield
    torch.use_deterministic_algorithms(True)


def poison(like: torch.Tensor) -> None:
    """What is in the memory that the next outputs may get."""
    blocks = [torch.ops.fastcnn_cpu.kept_like(like, False).fill_(torch.nan) for _ in range(4)]
    del blocks


OPERATORS = {
    "lrn": lambda x: FF.local_response_norm(x, 5),
    "max_pool2d": lambda x: FF.max_pool2d(x, 3, 2),
    "relu_lrn_max_pool2d": lambda x: FF.relu_lrn_max_pool2d(x, lrn=LRNParams(5), pool=PoolParams(3, 2)),
    "conv2d_relu": lambda x: FF.conv2d_relu(x, torch.linspace(-1, 1, 6 * 6 * 9).view(6, 6, 3, 3)),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_the_same_bits_with_kept_memory(operator: str, format: torch.memory_format, monkeypatch) -> None:
    x = torch.randn(2, 6, 15, 15, generator=torch.manual_seed(0)).to(memory_format=format).requires_grad_()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        y = OPERATORS[operator](x)
        return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y) * 0.5)[0]

    poison(x)
    y, dx = run()
    monkeypatch.setattr(memory, "_LARGE_BYTES", 1 << 60)
    new_y, new_dx = run()
    assert torch.equal(y, new_y)
    assert torch.equal(dx, new_dx)
    assert y.stride() == new_y.stride()
    assert dx.stride() == new_dx.stride()


def test_memory_is_used_again_and_never_while_in_use() -> None:
    like = torch.empty(3, 1000, dtype=torch.bfloat16)
    first, second = (memory.kept(like) for _ in range(2))
    view, there = first[1:], first.data_ptr()
    assert second.data_ptr() != there
    del first
    third = memory.kept(like)
    assert third.data_ptr() not in (there, second.data_ptr())  # the view still holds the first block
    del view
    assert memory.kept(like).data_ptr() == there
    assert third.dtype == torch.bfloat16
    assert third.shape == (3, 1000)


@pytest.mark.parametrize(
    ("size", "lasting", "fits"),
    [
        (500_000, False, False),
        (512_000, False, True),
        (800_000, True, False),
        (819_200, True, True),
        *((size, lasting, size == 1_024_000) for size in (1_024_000, 1_024_001) for lasting in (False, True)),
    ],
)
def test_a_block_goes_to_outputs_of_about_its_size(size: int, lasting: bool, fits: bool) -> None:
    large, block = memory.kept(torch.empty(4_096_000)), memory.kept(torch.empty(1_024_000))
    del large
    there = block.data_ptr()
    del block
    assert (memory.kept(torch.empty(size), lasting=lasting).data_ptr() == there) == fits


def test_a_larger_block_is_taken_rather_than_unmapped() -> None:
    fastcnn.backends.release_memory()
    large, beside = megabytes(100), megabytes(20)
    there = large.data_ptr()
    del large
    assert megabytes(24).data_ptr() == there
    del beside


def mapped() -> int:
    return int(re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the size of the process from /proc"
)


def megabytes(number: int) -> torch.Tensor:
    return memory.kept(torch.empty(number << 20, dtype=torch.uint8))


@needs_proc
def test_at_most_half_a_gigabyte_is_kept_and_can_be_released() -> None:
    before = mapped()
    blocks = [megabytes(300) for _ in range(6)]
    assert mapped() - before >= 1800 << 20
    del blocks
    assert 300 << 20 <= mapped() - before < 600 << 20
    fastcnn.backends.release_memory()
    assert mapped() - before < 300 << 20


@needs_proc
def test_no_more_is_mapped_than_was_once_in_use() -> None:
    before = mapped()
    for size in (400, 300, 200, 100):  # none fits the next
        megabytes(size)
        assert mapped() - before < 450 << 20


@needs_proc
@pytest.mark.parametrize("lasting", [False, True])
def test_what_lasts_wastes_little_and_evicts_what_it_does_not_take(lasting: bool) -> None:
    first, second = (torch.empty(megabytes << 20, dtype=torch.uint8) for megabytes in (60, 40))
    before = mapped()
    memory.kept(first)
    block = memory.kept(second, lasting=lasting)
    assert (mapped() - before < 50 << 20) == lasting
    assert block.nbytes == 40 << 20


@needs_proc
@pytest.mark.parametrize("lasting", [False, True])
def test_32_megabytes_stay_cached_whatever_is_asked_for(lasting: bool) -> None:
    first, second = (torch.empty(megabytes << 20, dtype=torch.uint8) for megabytes in (20, 45))
    before = mapped()
    memory.kept(first)
    block = memory.kept(second, lasting=lasting)
    assert mapped() - before >= 65 << 20
    del block


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("operator", ["max_pool2d", "relu_lrn_max_pool2d", "conv2d_relu"])
def test_outputs_that_wait_for_backward_last(operator: str, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for module in (conv2d_relu, max_pool2d, relu_lrn_max_pool2d):
        monkeypatch.setattr(module, "kept", lambda y, lasting=False: asked.append(lasting) or y)
    monkeypatch.setitem(OPERATORS, "conv2d_relu", lambda x: FF.conv2d_relu(x, torch.ones(16, 16, 3, 3)))
    x = torch.ones(2, 16, 20, 20).to(memory_format=torch.channels_last).requires_grad_(frozen)
    OPERATORS[operator](x)
    assert asked in ([frozen], [])
    assert asked or operator == "conv2d_relu"  # which by oneDNN, without AVX2, allocates its output


def test_threads_share_it() -> None:
    wrong = []

    def work(value: int) -> None:
        for _ in range(200):
            block = torch.ops.fastcnn_cpu.kept_like(torch.empty(4096), False).fill_(value)
            if not bool((block == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_only_large_outputs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    small, large = torch.empty(1 << 20, dtype=torch.uint8), torch.empty((1 << 20) + 1, dtype=torch.uint8)
    assert memory.kept(small) is small
    assert memory.kept(large) is not large


@pytest.mark.parametrize(("images", "parts"), [(0.4, 5), (2, 3), (5, 1)])
def test_a_convolution_that_is_trained_fills_a_large_output_in_parts(monkeypatch, images, parts):
    x = torch.randn(5, 3, 30, 30, generator=torch.manual_seed(0)).to(memory_format=torch.channels_last)
    weight, bias = (torch.randn(*size).requires_grad_() for size in ((32, 3, 5, 5), (32,)))
    expected = torch.conv2d(x, weight, bias, 2)
    monkeypatch.setattr(stage, "REUSED_BYTES", 0)
    monkeypatch.setattr(convolution, "REUSED_BYTES", int(2 * images * expected.nbytes / 5))
    calls, conv2d = [], torch.conv2d
    monkeypatch.setattr(torch, "conv2d", lambda *args: calls.append(len(args[0])) or conv2d(*args))

    def run() -> torch.Tensor:
        return stage.run_stage(x, weight, bias, 2, 0, 1, 1, relu=False)

    y = run()
    assert len(calls) == parts
    assert sum(calls) == 5
    torch.testing.assert_close(y, expected)
    dy = torch.randn(expected.shape)
    ours, theirs = (torch.autograd.grad(out, (weight, bias), dy) for out in (y, expected))
    torch.testing.assert_close(ours, theirs)
    there = y.data_ptr()
    del y
    assert run().data_ptr() == there
