"""``pytest benchmarks``: the operators beside PyTorch, case by case; ``-k`` picks some."""

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture


def test_operator(benchmark: BenchmarkFixture, call: Callable[[], object]) -> None:
    benchmark(call)
