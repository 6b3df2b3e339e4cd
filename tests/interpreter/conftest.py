"""The Triton kernels in Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/interpreter``, nothing without it."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from fastcnn import backends

collect_ignore_glob = [] if backends.INTERPRETING and "triton" in backends.available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with backends.use("triton"):
        yield


@pytest.fixture(scope="session", autouse=True)
def language_is_patched_once() -> Iterator[None]:
    """The interpreter patches it again in every call of a kernel or device function, which takes half of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda fn: type(scope)())
        yield
    scope.restore()
