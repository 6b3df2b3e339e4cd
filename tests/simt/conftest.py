from collections.abc import Iterator
from dataclasses import replace

import pytest

from .emulator import Emulated, Emulator, why_not


def _emulator(sanitizer: str) -> Iterator[Emulator]:
    if why_not():
        pytest.skip(why_not())
    emulator = Emulator(sanitizer)
    yield emulator
    emulator.close()


@pytest.fixture(scope="session")
def address() -> Iterator[Emulator]:
    """The kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""
    yield from _emulator("address")


@pytest.fixture(scope="session")
def thread() -> Iterator[Emulator]:
    """The kernels under ThreadSanitizer."""
    yield from _emulator("thread")


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Emulated:
    """Where a promise is kept: the emulator under the sanitizer of this name."""
    return replace(request.param, emulator=request.getfixturevalue(request.param.name))
