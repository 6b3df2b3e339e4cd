"""``pytest benchmarks/bench_lrn.py``: the operator beside PyTorch, case by case."""

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture


def test_lrn(benchmark: BenchmarkFixture, call: Callable[[], object]) -> None:
    benchmark(call)
