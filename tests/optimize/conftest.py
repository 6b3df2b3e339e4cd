import pytest
import torch
import torch._dynamo.guards

import fastcnn
from fastcnn.ops import stage

from .networks import NETWORKS, network


@pytest.fixture(autouse=True)
def usual(best_backend, monkeypatch):
    """On the best backend, in float64, so that a difference is a mistake and no rounding; small maps by ours too."""
    for threshold in (
        "_TRAINED",
        "_PLAIN",
        "_POOLED",
        "_POOLED_LAST",
        "_TRANSFORMED",
        "_NORMALIZED",
        "_NORMALIZED_LATER",
    ):
        monkeypatch.setattr(stage, threshold, 0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session", autouse=True)
def guards_are_not_timed():
    """TorchDynamo times the guards of every graph for its log, which takes 20 ms each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0)
        yield


@pytest.fixture(params=NETWORKS)
def pair(request):
    """A network and what optimize made of it."""
    model = network(request.param)
    return model, fastcnn.optimize(model)
