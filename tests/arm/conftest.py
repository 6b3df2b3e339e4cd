"""The C++ kernels on an emulated ARM machine: ``pytest tests/arm``, and not where all tests run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from promises import running_on

from .machine import HERE, Machine, why_not


def _is_asked_for(config: pytest.Config) -> bool:
    return any(Path(argument.partition("::")[0]).absolute().is_relative_to(HERE) for argument in config.args)


def pytest_configure(config: pytest.Config) -> None:
    if _is_asked_for(config) and why_not():
        raise pytest.UsageError(why_not())


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if _is_asked_for(config) else True


@pytest.fixture(scope="session", params=["plain", "sanitized"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """As it is built for users, and under AddressSanitizer and UndefinedBehaviorSanitizer."""
    machine = Machine(sanitized=request.param == "sanitized")
    yield machine
    machine.close()


@pytest.fixture(autouse=True)
def arm(machine: Machine) -> Iterator[None]:
    """Every test runs there."""
    with machine.in_use():
        yield


@pytest.fixture
def kernel(arm: None) -> Iterator[str]:
    """The one capability that ARM has."""
    with running_on("cpu-baseline"):
        yield "cpu-baseline"


@pytest.fixture
def backend(kernel: str) -> str:
    return kernel
