import os
from collections.abc import Iterator

import pytest
import torch

# cuBLAS is deterministic only with it, and reads it when it starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """Every test here needs a GPU, and gives back the memory that it took."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    yield
    torch.cuda.empty_cache()
