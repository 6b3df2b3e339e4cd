"""The cases of ``fastcnn bench kernels``: a test gets a ``call`` for each of them and each provider."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastcnn.bench.cases import Case
from fastcnn.bench.operator_workload import OperatorWorkload
from fastcnn.bench.operators import select
from fastcnn.bench.providers import OperatorProvider, operator_providers
from fastcnn.bench.workload import Call


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "call" not in metafunc.fixturenames:
        return
    pairs = [(c, p) for c in select() for p in operator_providers().values() if p.takes_part(c)]
    metafunc.parametrize("call", pairs, indirect=True, ids=[f"{c} by {p.name}" for c, p in pairs])


@pytest.fixture
def call(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Call:
    """A case run once by a provider; its outputs were compared with the reference."""
    case: Case
    provider: OperatorProvider
    case, provider = request.param
    benchmark.group = str(case)
    torch.compiler.reset()
    workload = OperatorWorkload(case)
    try:
        entry = workload.prepare(provider, case.dtype)
        outputs = entry.check()
    except NotImplementedError as error:
        pytest.skip(f"{provider.name}: {error}")
    workload.check(outputs, case.dtype, entry.allowed)
    return entry.call
