import os
from collections.abc import Iterator

import pytest
import torch

from fastcnn import backends

# cuBLAS is deterministic only with it, and reads it when it starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked ``gpu`` need one. Each waits for all that it launched, and gives back the memory that it took."""
    if not torch.cuda.is_available():
        if request.node.get_closest_marker("gpu"):
            pytest.skip("needs an NVIDIA GPU")
        yield
        return
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.fixture
def triton(gpu: None) -> Iterator[None]:
    """The Triton kernels, forced."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(backends.status()["triton"])
    with backends.use("triton"):
        yield


@pytest.fixture
def cuda(gpu: None) -> Iterator[None]:
    """The CUDA kernels, forced."""
    with backends.use("cuda"):
        yield
