"""``pytest benchmarks/bench_conv2d_relu.py``: the operator beside PyTorch, case by case."""

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture


def test_conv2d_relu(benchmark: BenchmarkFixture, call: Callable[[], object]) -> None:
    benchmark(call)
