"""The calls of ``make soak``: operators and optimized models, everything about them drawn at random.

Values are small integers, so that sums are exact and maxima are the same in every dtype.
"""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastcnn
import fastcnn.functional as FF
from fastcnn import LRNParams, PoolParams, reference

CHECKED = 0.1  # of the calls
DTYPES = [torch.float32] * 3 + [torch.float64, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]
NARROW = torch.float16, torch.bfloat16
# Relative to the result. 16 bits: half more than rounding once; torch's convolutions, not ours, round in between too.
ERROR = {torch.float64: 1e-13, torch.float32: 5e-6, **{dtype: 0.75 * torch.finfo(dtype).eps for dtype in NARROW}}
CONVOLUTION_ERROR = {**ERROR, **dict.fromkeys(NARROW, 3e-2)}
MODEL_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@dataclass
class Model:
    """A small network, as it is and optimized, that several threads call."""

    plain: nn.Module
    fast: nn.Module
    dtype: torch.dtype
    inference: bool

    @staticmethod
    def drawn(draw: random.Random) -> "Model":
        """Random layers; in 16 bits without LRN, which torch lacks there."""
        inference, c = draw.random() < 0.7, draw.choice([16, 24, 32])
        dtype = torch.bfloat16 if inference and draw.random() < 0.3 else torch.float32
        norm = nn.Identity() if dtype != torch.float32 else nn.LocalResponseNorm(draw.choice([3, 5]), k=2)
        layers = [
            *(nn.Conv2d(3, c, 5, padding=2), nn.ReLU(), norm, nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(c, c, 3, padding=1, groups=draw.choice([1, 2])), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(c, c, draw.choice([1, 3]), padding="same"), nn.BatchNorm2d(c), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * c, 10)),
        ]
        plain = nn.Sequential(*layers).eval()
        fast = fastcnn.optimize(plain, inference=inference, dtype=dtype if inference else None)
        return Model(plain, fast, dtype, inference)


@dataclass
class Operation:
    """An operator and its definition, both as functions of the tensors."""

    ours: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    tensors: list[Tensor]
    error: dict[torch.dtype, float] = field(default_factory=lambda: ERROR)
    may_tie: bool = False  # which of two equal maxima wins, and gets the gradient, is up to the rounding before


class Calls:
    """One thread's calls, the same for the same seed."""

    def __init__(self, seed: int, model: Model) -> None:
        self.draw, self.values, self.model = random.Random(seed), torch.Generator().manual_seed(seed), model
        self.operators = [self._lrn, self._max_pool2d, self._tail, self._conv2d_relu]

    def __call__(self) -> None:
        """Make one; raises AssertionError where an answer that is checked is wrong."""
        checked = self.draw.random() < CHECKED
        if self.draw.random() < 0.05:
            self._call_model(checked)
            return
        operation = self.draw.choice(self.operators)()
        asked = [t.requires_grad_() for t in operation.tensors if self.draw.random() < 0.4]
        y = operation.ours(*operation.tensors)
        found = [y, *torch.autograd.grad(y, asked, torch.ones_like(y))] if asked else [y]
        if not checked:
            return
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in operation.tensors]
        z = operation.definition(*wide)
        expected = [z]
        if asked and not operation.may_tie:
            expected += torch.autograd.grad(z, [t for t in wide if t.requires_grad], torch.ones_like(z))
        for ours, theirs in zip(found, expected, strict=False):
            assert_close(ours, theirs, operation.error[ours.dtype])

    def _call_model(self, checked: bool) -> None:
        model = self.model
        height, width = (self.draw.randrange(16, 64, 8) for _ in "hw")
        x = torch.rand(self.draw.randint(1, 3), 3, height, width, generator=self.values)
        with torch.set_grad_enabled(not model.inference):
            y = model.fast(x.requires_grad_(not model.inference))
            if not model.inference:
                torch.autograd.grad(y.sum(), x)
            if checked:
                assert_close(y, model.plain(x), MODEL_ERROR[model.dtype])

    # -- operators ----------------------------------------------------------------------------------------------------

    def _lrn(self) -> Operation:
        x = self._input()
        lrn = asdict(self._lrn_params(x))
        return Operation(
            lambda x: FF.local_response_norm(x, **lrn), lambda x: reference.local_response_norm(x, **lrn), [x]
        )

    def _max_pool2d(self) -> Operation:
        x = self._input()
        pool = asdict(self._pool_params(x))
        return Operation(lambda x: FF.max_pool2d(x, **pool), lambda x: reference.max_pool2d(x, **pool), [x])

    def _tail(self) -> Operation:
        x = self._input()
        lrn = self._lrn_params(x) if self.draw.random() < 0.6 else None
        pool = self._pool_params(x) if self.draw.random() < 0.7 else None
        parts: dict[str, Any] = {"relu": self.draw.random() < 0.7, "lrn": lrn, "pool": pool}
        bias = [self._integers((x.shape[1],), x.dtype)] if self.draw.random() < 0.5 else []
        return Operation(
            lambda x, bias=None: FF.relu_lrn_max_pool2d(x, bias, **parts),
            lambda x, bias=None: reference.relu_lrn_max_pool2d(x, bias, **parts),
            [x, *bias],
            may_tie=lrn is not None and pool is not None,
        )

    def _conv2d_relu(self) -> Operation:
        x = self._input(channels=self.draw.choice([1, 3, 4, 6, 16, 32]))
        if x.dtype != torch.float32:  # which oneDNN may lack: torch's own are slow
            x = x[:2, :, :9, :9].contiguous(memory_format=self.draw.choice(FORMATS))
        window = self.draw.choice([1, 3, 3, 3, 5])
        # What torch gets wrong: 16-bit gradients of weights that meet nothing but padding, which it does not write, and
        # weights' gradients of 1x1 windows with a stride, for which it writes outside of its memory.
        if min(x.shape[2:]) < window:
            window = 1
        stride = 1 if window == 1 else self.draw.choice([1, 1, 2])
        channels = x.shape[1]
        groups = self.draw.choice([1, 2]) if channels % 2 == 0 else 1
        outputs = groups * self.draw.choice([1, 3, 8, 16])
        args = stride, window // 2, 1, groups
        weight = self._integers((outputs, channels // groups, window, window), x.dtype)
        bias = [self._integers((outputs,), x.dtype)] if self.draw.random() < 0.5 else []
        return Operation(
            lambda x, weight, bias=None: FF.conv2d_relu(x, weight, bias, *args),
            lambda x, weight, bias=None: reference.conv2d_relu(x, weight, bias, *args),
            [x, weight, *bias],
            CONVOLUTION_ERROR,
        )

    # -- what they are called with ------------------------------------------------------------------------------------

    def _input(self, channels: int | None = None) -> Tensor:
        """Mostly tiny; a few so large that their outputs come from the allocator of large ones."""
        kind = self.draw.choices(["tiny", "small", "large"], [80, 17, 3])[0]
        most, least_size, most_size = {"tiny": (6, 1, 7), "small": (24, 4, 20), "large": (32, 70, 100)}[kind]
        channels = channels or self.draw.randint(most // 2, most)
        size = [self.draw.randint(least_size, most_size) for _ in "hw"]
        shape = self.draw.randint(1, 3), channels, *size
        return self._integers(shape, self.draw.choice(DTYPES)).contiguous(memory_format=self.draw.choice(FORMATS))

    def _integers(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randint(-2, 3, shape, generator=self.values).to(dtype)

    def _lrn_params(self, x: Tensor) -> LRNParams:
        groups = self.draw.choice([1, 2]) if x.shape[1] % 2 == 0 else 1
        size, beta = self.draw.randint(1, 9), self.draw.choice([0.75, 0.75, 0.5, 1.0, 0.6])
        return LRNParams(size, self.draw.uniform(0, 0.2), beta, self.draw.choice([1.0, 2.0]), groups)

    def _pool_params(self, x: Tensor) -> PoolParams:
        """That leave something of the map."""
        while True:
            kernel = self.draw.randint(1, 5), self.draw.randint(1, 5)
            padding = self.draw.randint(0, kernel[0] // 2), self.draw.randint(0, kernel[1] // 2)
            stride = self.draw.choice([None, 1, 2, 3])
            dilation = 1 if any(padding) else self.draw.choice([1, 1, 2])  # torch fails where a window is all padding
            pool = PoolParams(kernel, stride, padding, dilation, self.draw.random() < 0.5)
            try:
                pool.output_size(*x.shape[2:])
            except RuntimeError:
                continue
            return pool


def assert_close(ours: Tensor, theirs: Tensor, error: float) -> None:
    """Or NaN: also that is too far."""
    assert ours.shape == theirs.shape, f"{list(ours.shape)} instead of {list(theirs.shape)}"
    ours, theirs = ours.detach().double(), theirs.detach().double()
    found, allowed = (ours - theirs).norm(), error * theirs.norm()
    assert found <= allowed, f"an error of {found:.3g}, and {allowed:.3g} is allowed, in a tensor of {list(ours.shape)}"
