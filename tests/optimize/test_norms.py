"""Batch norm that trains, or whose gradient is asked for, with what is around it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from promises import FORMATS, ident, in_format, leaf, randn, recorded_calls
from torch import nn

import fastcnn
from fastcnn.ops import stage

OP = "batch_norm_relu_max_pool2d"
# What follows a convolution of 8 channels, and which of our operators run it.
TAILS = {
    "norm": ([nn.BatchNorm2d(8)], [OP]),
    "norm-relu": ([nn.BatchNorm2d(8), nn.ReLU()], [OP]),
    "norm-relu_": ([nn.BatchNorm2d(8), nn.ReLU(True)], [OP]),
    "norm-relu-pool": ([nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2)], [OP]),
    "norm-pool": ([nn.BatchNorm2d(8), nn.MaxPool2d(2)], [OP]),
    "relu-norm": ([nn.ReLU(), nn.BatchNorm2d(8)], [OP]),
    "relu_-norm-pool": ([nn.ReLU(True), nn.BatchNorm2d(8), nn.MaxPool2d(2)], [OP]),
    "norm-relu-lrn-pool": (
        [nn.BatchNorm2d(8), nn.ReLU(), nn.LocalResponseNorm(5, 0.1), nn.MaxPool2d(2)],
        [OP, "relu_lrn_max_pool2d"],
    ),
    "norm-lrn": ([nn.BatchNorm2d(8), nn.LocalResponseNorm(5, 0.1)], [OP, "lrn"]),
    "norm-norm": ([nn.BatchNorm2d(8), nn.BatchNorm2d(8)], [OP, OP]),
    "relu-norm-relu": ([nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU()], [OP]),
    "not affine": ([nn.BatchNorm2d(8, affine=False), nn.ReLU()], [OP]),
    "not tracked": ([nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()], [OP]),
    "other momentum": ([nn.BatchNorm2d(8, momentum=0.7, eps=0.1), nn.ReLU()], [OP]),
    "average": ([nn.BatchNorm2d(8, momentum=None), nn.ReLU()], None),
}
X = randn(3, 3, 12, 14, dtype=torch.float64)


def network(tail):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), *copy.deepcopy(TAILS[tail][0]), nn.Conv2d(8, 4, 3)).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.copy_(randn(8, seed=1)), module.bias.copy_(randn(8, seed=2))
    return model


def called(model, x):
    with recorded_calls() as calls:
        model(x).sum().backward()
    names = [name.split(".")[1] for name, _ in calls]
    return [name for name in names if not name.endswith("_backward") and name != "conv2d_relu"]


def assert_step_is_the_same(fast, model, x):
    """Output, its strides, gradients, and what the layers hold after it."""
    results = []
    for m in (fast, model):
        m.zero_grad()
        given = leaf(x.clone(memory_format=torch.preserve_format))
        y = m(given)
        (y * randn(*y.shape, dtype=y.dtype, seed=3)).sum().backward()
        results.append((y, y.stride(), given.grad, {k: p.grad for k, p in m.named_parameters()}, m.state_dict()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("tail", TAILS)
def test_trains_and_evaluates_as_before(tail, format):
    model = network(tail)
    fast, x = fastcnn.optimize(model), in_format(X, format)
    for training in (True, True, False, True):
        assert_step_is_the_same(fast.train(training), model.train(training), x)
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(x), model.eval()(x))
    if TAILS[tail][1] is not None:
        assert called(fast.train(), x) == TAILS[tail][1]
        assert called(fast.eval(), x) == TAILS[tail][1]


def test_small_maps_are_normalized_by_torch(monkeypatch):
    monkeypatch.setattr(stage, "_NORMALIZED", 1 << 20)
    model = network("norm-relu-pool")
    fast = fastcnn.optimize(model)
    assert_step_is_the_same(fast, model, X)
    assert OP not in called(fast, X)


def test_what_others_see_of_a_batch_norm_is_not_fused_away():
    """Hooks get what the layer returns."""
    seen = []
    model = network("norm-relu-pool")
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    fast = fastcnn.optimize(model)
    assert_step_is_the_same(fast, model, X)
    torch.testing.assert_close(*seen)


class Shared(nn.Module):
    """One batch norm called twice, and its counter read between."""

    def __init__(self, reads):
        super().__init__()
        self.conv, self.norm, self.reads = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), reads

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x)))
        z = F.relu(self.norm(self.conv(x + 1)))
        return y + z * self.norm.num_batches_tracked if self.reads else y + z


@pytest.mark.parametrize("reads", [False, True])
def test_one_batch_norm_called_twice(reads):
    torch.manual_seed(0)
    model = Shared(reads)
    fast = fastcnn.optimize(model)
    for _ in range(2):
        assert_step_is_the_same(fast, model, X)
    assert fast.norm.num_batches_tracked == 4


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + x)


def test_batch_norm_before_a_sum():
    model = Residual()
    fast = fastcnn.optimize(model)
    assert_step_is_the_same(fast, model, X)
    assert called(fast, X) == [OP]


@pytest.mark.parametrize("frozen", ["norm", "all but norm"])
def test_frozen_parameters(frozen):
    model = network("norm-relu-pool")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("1.") == (frozen == "all but norm"))
    fast = fastcnn.optimize(model)
    assert_step_is_the_same(fast, model, X)


def test_two_batches_before_backward():
    """As a discriminator's of real and made pictures: the second moves the statistics that the first had."""
    model = network("norm-relu-pool")
    fast = fastcnn.optimize(model)
    grads = []
    for m in (fast, model):
        (m(X).sum() - m(X + 1).square().sum()).backward()
        grads.append([p.grad for p in m.parameters()])
    torch.testing.assert_close(*grads)


def test_one_value_per_channel_raises_as_before():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    fast = fastcnn.optimize(model)
    for m in (fast, model):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            m(randn(1, 3, 3, 3, dtype=torch.float64))


def test_a_batch_norm_that_trains_is_left_alone_in_inference():
    model = network("not tracked")
    fast = fastcnn.optimize(model, inference=True)
    torch.testing.assert_close(fast(X), model.eval()(X))
    with torch.no_grad(), recorded_calls() as calls:
        fast(X)
    assert not [name for name, _ in calls if OP in name]


def test_the_report_says_what_runs():
    model = network("norm-relu-lrn-pool")
    fast = fastcnn.optimize(model, example_inputs=[X])
    assert fast.fastcnn_report.replaced[0].now == f"conv2d + {OP} + relu_lrn_max_pool2d"


def test_half_precision_beside_float32_parameters():
    model = network("norm-relu-pool").float()
    fast = fastcnn.optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(X.float()), model(X.float()), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(fast.state_dict(), model.state_dict(), rtol=1e-2, atol=1e-3)
