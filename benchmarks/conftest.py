"""The cases of ``fastcnn bench kernels``: a test gets a ``call`` for each of them and each provider."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastcnn.bench.cases import Case, select
from fastcnn.bench.inputs import make_inputs
from fastcnn.bench.providers import Call, Provider, all_providers, build
from fastcnn.bench.verify import check, expected_outputs, tolerances


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "call" not in metafunc.fixturenames:
        return
    pairs = [(c, p) for c in select() for p in all_providers().values() if p.takes_part(c)]
    metafunc.parametrize("call", pairs, indirect=True, ids=[f"{c} by {p.name}" for c, p in pairs])


@pytest.fixture
def call(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Call:
    """A case run once by a provider; its outputs were compared with the reference."""
    case: Case
    provider: Provider
    case, provider = request.param
    benchmark.group = str(case)
    torch.compiler.reset()
    x, dy = make_inputs(case, "random")
    call = build(provider, case, x, dy)
    try:
        outputs = call()
    except NotImplementedError as error:
        pytest.skip(f"{provider.name}: {error}")
    expected = expected_outputs(case, x, dy)
    check(outputs, expected, tolerances(case, x, dy, expected))
    return call
