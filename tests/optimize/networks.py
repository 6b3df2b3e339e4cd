"""Networks to optimize, and what is asked of them before and after."""

import torch
import torch.nn.functional as F
from promises import leaf, randn, recorded_calls
from torch import nn

LRN = 5, 1e-3, 0.75, 2.0


class Functional(nn.Module):
    """Stages written as calls of functions, shared layers, keyword arguments, and a default argument."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)

    def forward(self, x, scale=1.0):
        x = F.max_pool2d(F.local_response_norm(F.relu(self.conv1(x)), *LRN), 3, stride=2)
        x = self.relu(self.conv2(x)) * scale
        x = torch.max_pool2d(torch.conv2d(x, self.weight, padding=1).relu(), 2)
        return F.local_response_norm(x, size=4, alpha=0.1)


class Block(nn.Module):
    """Branches that are concatenated, as in InceptionV1 and SqueezeNet."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(inplace=True))
        self.three = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(True), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(True))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 2, 1), nn.ReLU(True))

    def forward(self, x):
        return torch.cat([self.one(x), self.three(x), self.pool(x)], 1)


class Branching(nn.Module):
    """Control flow on values, which cannot be traced, around layers and a Sequential."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.norm, self.pool = nn.LocalResponseNorm(*LRN), nn.MaxPool2d(2)

    def forward(self, x):
        x = self.features(x)
        return self.pool(self.norm(x)) if x.sum() > 0 else self.norm(self.pool(x))


class Modes(nn.Module):
    """Another output in training than in evaluation."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.divide = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), False

    def forward(self, x):
        x = F.relu(self.conv(x))
        if self.divide:
            x = x / 2
        return (self.pool(x), x.mean()) if self.training else (self.pool(x),)


def sequential(*, inplace=True):
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(inplace), nn.LocalResponseNorm(*LRN), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(inplace)),
        *(nn.Conv2d(8, 8, 3), nn.ReLU(inplace), nn.MaxPool2d(2)),
        *(nn.LocalResponseNorm(4), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace), nn.MaxPool2d(2, 1)),
    )


def nested():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), Block(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.MaxPool2d(2), Block()
    )


NETWORKS = {
    "sequential": sequential,
    "functional": Functional,
    "nested": nested,
    "branching": Branching,
    "modes": Modes,
}
STAGES = {"sequential": 5, "functional": 4, "nested": 8, "branching": 3, "modes": 1}


def network(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[name]()


def outputs_and_gradients(model, x):
    x = leaf(x)
    y = model(x)
    outputs = y if isinstance(y, tuple) else (y,)
    loss = sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in outputs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return *(t.detach() for t in outputs), *torch.autograd.grad(loss, [x, *parameters], allow_unused=True)


def assert_same(model, other, x):
    for a, b in zip(outputs_and_gradients(model, x), outputs_and_gradients(other, x), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


X = randn(2, 3, 32, 30, dtype=torch.float64)


def called(model, x=X):
    """The operators of fastcnn that a forward without gradient runs."""
    with torch.no_grad(), recorded_calls() as calls:
        model(x)
    return [name.split(".")[1] for name, _ in calls]
