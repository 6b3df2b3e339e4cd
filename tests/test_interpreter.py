"""The operators' tests, once more in Triton's interpreter, which must be chosen before Python starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parent / "ops"
NOT_OF_KERNELS = "not raise and not vmap and not export and not compile and not gradgradcheck"


@pytest.mark.slow
@pytest.mark.parametrize("op", ["conv2d_relu"])
def test_promises_hold_in_the_interpreter(op):
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("this is the interpreter")
    options = ["-q", "-p", "no:cacheprovider", "-k", NOT_OF_KERNELS, "--tb=short"]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, TESTS / f"test_{op}.py"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    print(finished.stdout)
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert "passed" in finished.stdout
