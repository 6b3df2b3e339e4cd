import pytest
import torch

import fastcnn

from .networks import NETWORKS, network


@pytest.fixture(autouse=True)
def usual(best_backend):
    """On the best backend, in float64, so that a difference is a mistake and no rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=NETWORKS)
def pair(request):
    """A network and what optimize made of it."""
    model = network(request.param)
    return model, fastcnn.optimize(model)
