"""Random forwards of views, in-place calls and stages: values, memory that is shared, strides and the input stay."""

import operator
import random

import pytest
import torch
import torch.nn.functional as F
from promises import leaf
from torch import nn

import fastcnn

SHAPE = 2, 8, 6, 6
# Name -> how often it is drawn, the call, and whether its output has another shape.
CALLS = {
    "conv": (6, lambda m, x: m.conv(x), False),
    "conv2d": (1, lambda m, x: F.conv2d(x, m.conv.weight, padding=1), False),
    "relu": (3, lambda m, x: F.relu(x), False),
    "relu inplace": (4, lambda m, x: F.relu(x, inplace=True), False),
    "relu_": (1, lambda m, x: x.relu_(), False),
    "ReLU(inplace)": (3, lambda m, x: m.relu(x), False),
    "lrn": (3, lambda m, x: m.lrn(x), False),
    "pool": (4, lambda m, x: m.pool(x), False),
    "max_pool2d": (2, lambda m, x: F.max_pool2d(x, 3, 1, 1), False),
    "norm": (3, lambda m, x: m.norm(x), False),
    "dropout": (1, lambda m, x: F.dropout(x, 0.5, False), False),
    "identity": (1, lambda m, x: m.identity(x), False),
    "view": (1, lambda m, x: x.view(SHAPE), False),
    "reshape": (1, lambda m, x: x.reshape(2, -1).reshape(SHAPE), False),
    "detach": (1, lambda m, x: x.detach(), False),
    "data": (1, lambda m, x: x.data, False),
    "all": (1, lambda m, x: x[:], False),
    "cat": (2, lambda m, x: torch.cat([x[:, 4:], x[:, :4]], 1), False),
    "clone": (1, lambda m, x: x.clone(), False),
    "contiguous": (1, lambda m, x: x.contiguous(), False),
    "channels_last": (1, lambda m, x: x.contiguous(memory_format=torch.channels_last), False),
    "to": (1, lambda m, x: x.to(torch.float64), False),
    "add": (1, lambda m, x: x + 1, False),
    "mul": (1, lambda m, x: x * 0.5, False),
    "avg_pool2d": (1, lambda m, x: F.avg_pool2d(x, 3, 1, 1), False),
    "relu6": (1, lambda m, x: F.relu6(x), False),
    "relu6 inplace": (1, lambda m, x: F.relu6(x, inplace=True), False),
    "sum": (1, lambda m, x: x + x.relu(), False),
    "sum inplace": (1, lambda m, x: operator.iadd(x, x.sigmoid()), False),
    "softmax": (1, lambda m, x: x.softmax(1), False),
    "slice": (1, lambda m, x: x[:, :4], True),
    "flatten": (1, lambda m, x: x.flatten(2), True),
    "permute": (1, lambda m, x: x.permute(0, 2, 3, 1), True),
}
WRITES = [
    lambda x: x.add_(0.25),
    lambda x: x.mul_(-1.0),
    lambda x: x.__iadd__(0.5),
    lambda x: x[:1].zero_(),
    lambda x: x.__setitem__((slice(None), 0), 2.0),
    lambda x: torch.relu_(x),
    lambda x: x.clamp_(-0.5, 0.7),
]


class Drawn(nn.Module):
    """A forward of up to twelve calls, each of what an earlier one returned; returns one to four of the tensors."""

    def __init__(self, draw):
        super().__init__()
        self.conv, self.relu, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.BatchNorm2d(8)
        self.lrn, self.pool, self.identity = nn.LocalResponseNorm(3), nn.MaxPool2d(3, 1, 1), nn.Identity()
        self.norm.running_mean.normal_()
        self.steps, usual, count = [], [0], 1
        for _ in range(draw.randint(3, 12)):
            source = usual[-1] if draw.random() < 0.75 else draw.choice(usual)
            if draw.random() < 0.22:
                self.steps.append((draw.choice(WRITES), draw.randrange(count)))
                continue
            name = draw.choices(list(CALLS), [weight for weight, _, _ in CALLS.values()])[0]
            self.steps.append((name, source))
            usual += [] if CALLS[name][2] else [count]
            count += 1
        self.returned = sorted({usual[-1], *(draw.randrange(count) for _ in range(draw.randint(0, 3)))})

    def forward(self, x):
        tensors = [x]
        for step, source in self.steps:
            if callable(step):
                step(tensors[source])
            else:
                tensors.append(CALLS[step][1](self, tensors[source]))
        return tuple(tensors[i] for i in self.returned)


def outcome(model, x, grad):
    """All that a caller can see, or the error."""
    x = leaf(x) if grad else x.clone(memory_format=torch.preserve_format)
    input = x * 1 if grad else x
    try:
        with torch.set_grad_enabled(grad):
            outputs = model(input)
            loss = sum((y * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum() for y in outputs)
            wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
            grads = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else ()
    except RuntimeError as error:
        return str(error)
    storages = [y.untyped_storage().data_ptr() for y in (input, *outputs)]
    shared = [[a == b for b in storages] for a in storages]
    seen = [(y.stride(), y.storage_offset(), y.requires_grad, [y is other for other in outputs]) for y in outputs]
    return [y.detach() for y in (input, *outputs)], grads, (shared, seen)


@pytest.mark.parametrize("first", range(0, 120, 10))
def test_random_forwards(first):
    fused = 0
    for seed in range(first, first + 10):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        model = Drawn(draw).eval()
        formats = [draw.choice([torch.contiguous_format, torch.channels_last]) for _ in range(2)]
        inference, grad = draw.random() < 0.5, draw.random() < 0.3
        model.to(memory_format=formats[0]).requires_grad_(not inference)
        x = torch.randn(SHAPE).contiguous(memory_format=formats[1])
        fast = fastcnn.optimize(model, inference=inference)
        for _ in range(2):
            found, expected = outcome(fast, x, grad), outcome(model, x, grad)
            if isinstance(expected, str):  # what torch saved for backward may have been written, but not what we save
                assert found == expected or "modified by an inplace operation" in expected, (seed, found)
                continue
            assert not isinstance(found, str), (seed, found)
            torch.testing.assert_close(found[:2], expected[:2], rtol=1e-7, atol=1e-9, msg=lambda m, s=seed: f"{s}: {m}")
            assert found[2] == expected[2], seed
        fused += bool(fast.fastcnn_report.replaced)
        assert not fast.fastcnn_report.plain
    assert fused >= 4
