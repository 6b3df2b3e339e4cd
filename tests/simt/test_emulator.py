"""The emulator computes what CUDA would, and finds the bugs planted in planted.cu."""

import struct

import pytest

from .emulator import SanitizerError


def run(emulator, kernel, n=64):
    """On x = 0, 1, ... n-1."""
    (y,) = emulator.call(kernel, None, (struct.pack(f"{n}f", *range(n)), 0), (4 * n, 0))
    return list(struct.unpack(f"{n}f", y))


@pytest.fixture(params=["address", "thread"])
def emulator(request):
    return request.getfixturevalue(request.param)


def test_threads_of_all_blocks_run(emulator):
    assert run(emulator, "scale", 150) == [2.0 * i for i in range(150)]


@pytest.mark.parametrize("kernel", ["reverse", "reverse_static"])
def test_barriers_and_shared_memory(emulator, kernel):
    assert run(emulator, kernel, 128) == [*range(63, -1, -1), *range(127, 63, -1)]
    assert run(emulator, "sum", 128)[:2] == [sum(range(64)), sum(range(64, 128))]


def test_warp_barriers_shuffles_and_votes(emulator):
    assert run(emulator, "warp_exchange") == [i ^ 1 for i in range(64)]
    assert run(emulator, "warp_functions") == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


def test_out_of_bounds_by_one_is_caught(address):
    with pytest.raises(SanitizerError, match=r"heap-buffer-overflow[\s\S]*planted\.cu"):
        run(address, "out_of_bounds", 60)


def test_out_of_bounds_of_shared_memory_is_caught(address):
    with pytest.raises(SanitizerError, match=r"heap-buffer-overflow[\s\S]*planted\.cu"):
        run(address, "shared_overrun")


def test_misaligned_vector_is_caught(address):
    with pytest.raises(SanitizerError, match=r"misaligned address[\s\S]*planted\.cu"):
        run(address, "misaligned")


@pytest.mark.parametrize("kernel", ["missing_barrier", "missing_barrier_static", "missing_syncwarp"])
def test_missing_barrier_is_caught(thread, kernel):
    with pytest.raises(SanitizerError, match=r"data race[\s\S]*planted\.cu"):
        run(thread, kernel)


@pytest.mark.parametrize("kernel", ["divergent_barrier", "two_barriers", "divergent_shuffle"])
def test_barrier_that_not_all_threads_reach_is_an_error(emulator, kernel):
    with pytest.raises(RuntimeError, match=r"a barrier that not all threads reach: in block .* waits at planted\.cu:"):
        run(emulator, kernel)


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        ("grid_too_high", "grid"),
        ("grid_too_deep", "grid"),
        ("empty_grid", "grid"),
        ("block_too_big", "block"),
        ("block_too_deep", "block"),
        ("too_much_shared", "shared memory"),
    ],
)
def test_launch_that_a_device_refuses_is_an_error(address, kernel, what):
    with pytest.raises(RuntimeError, match=f"scale: invalid configuration: the {what}"):
        run(address, kernel)


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 64])
def test_folded_grid_has_every_block(address, rows):
    assert run(address, "folded", 2 * rows) == [i + 1.0 for i in range(2 * rows)]


def test_after_an_error_the_next_kernel_runs(emulator):
    with pytest.raises(RuntimeError, match="a barrier"):
        run(emulator, "divergent_barrier")
    assert run(emulator, "sum")[0] == sum(range(64))
