"""The Triton kernels in Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/interpreter``, nothing without it."""

from collections.abc import Iterator

import pytest

from fastcnn import backends

collect_ignore_glob = [] if backends.INTERPRETING and "triton" in backends.available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with backends.use("triton"):
        yield
