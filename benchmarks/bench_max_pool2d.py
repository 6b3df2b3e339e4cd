"""``pytest benchmarks/bench_max_pool2d.py``: the operator beside PyTorch, case by case."""

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture


def test_max_pool2d(benchmark: BenchmarkFixture, call: Callable[[], object]) -> None:
    benchmark(call)
