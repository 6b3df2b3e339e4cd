"""optimize(inference=True, offload=...): the originals of packed weights are in a file, and are what they were."""

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from promises import assert_bitwise, randn
from torch import nn

import fastcnn


@pytest.fixture(autouse=True)
def single(usual):
    torch.set_default_dtype(torch.float32)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(64 * 36, 256)).eval()


X = randn(6, 3, 10, 10)


def resident_bytes(weight):
    """Of the mapping in which the weight is, that this process holds; Linux tells."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= weight.data_ptr() < int(match[2], 16)
        elif inside and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no mapping")


def test_same_answers_and_less_memory(tmp_path):
    model = network()
    fast = fastcnn.optimize(model, inference=True, offload=tmp_path)
    assert not [*tmp_path.iterdir()]  # the file has no name
    weight = fast[6].weight
    assert resident_bytes(weight) < 100_000
    for seed in range(3):
        x = randn(6, 3, 10, 10, seed=seed)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert resident_bytes(weight) < 100_000  # packed for six vectors
    assert_bitwise(weight, model[6].weight)
    assert resident_bytes(weight) >= weight.nbytes


def test_state_dicts_copies_and_writes(tmp_path):
    model, other = network(), network()
    for p in other.parameters():
        p.data.mul_(-1.5)
    fast = fastcnn.optimize(model, inference=True, offload=tmp_path)
    fast(X)
    for name, value in model.state_dict().items():
        assert_bitwise(fast.state_dict()[name], value)
    saved = io.BytesIO()
    torch.save(fast.state_dict(), saved)
    copies = [copy.deepcopy(fast), fast]
    for one in copies:
        one.load_state_dict(other.state_dict())
        for _ in range(3):
            torch.testing.assert_close(one(X), other(X), rtol=1e-4, atol=1e-5)
    saved.seek(0)
    fast.load_state_dict(torch.load(saved))
    for _ in range(3):
        torch.testing.assert_close(fast(X), model(X), rtol=1e-4, atol=1e-5)


def test_the_original_stays_in_memory(tmp_path):
    model = network()
    before = [p.data_ptr() for p in model.parameters()]
    fastcnn.optimize(model, inference=True, offload=tmp_path)(X)
    assert [p.data_ptr() for p in model.parameters()] == before


def test_shared_parameters_stay_shared(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight  # one parameter
    model[4].weight = nn.Parameter(model[0].weight.detach())  # two of the same memory
    fast = fastcnn.optimize(model, inference=True, inplace=True, offload=tmp_path)
    assert fast[2].weight is fast[0].weight
    x = randn(6, 64)
    with torch.no_grad():
        before = fast(x)
        fast[0].weight.mul_(2)
        assert_bitwise(fast[4].weight, fast[0].weight)
        assert not torch.equal(fast(x), before)


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match="offload"):
        fastcnn.optimize(network(), inference=True, offload=3)
    with pytest.raises(ValueError, match="needs inference=True"):
        fastcnn.optimize(network(), offload=tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        fastcnn.optimize(network(), inference=True, offload=tmp_path / "nowhere")


def test_nothing_to_move(tmp_path):
    fast = fastcnn.optimize(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), inference=True, offload=tmp_path)
    assert fast(X).shape == (6, 3, 5, 5)
