"""What the tests of the CUDA kernels share: a check of the tail at one size, and inputs with every special value."""

import torch
from operators import relu_lrn_max_pool2d
from promises import integers

from .emulator import Emulated


def assert_same_tail(emulator, shape, dtype, format, *, bias=True, offset=0, **tail):
    """Forward, argmax and gradients against the reference; ``offset`` bytes misalign every tensor."""
    case = relu_lrn_max_pool2d.stage(shape, tail or {"relu": True}, bias, float32_bias=True)
    place = Emulated("emulator", emulator=emulator, offset=offset)
    relu_lrn_max_pool2d.check(place, case, case.tensors(dtype, format))


def special(*shape, dtype, format):
    """Ties, NaN, both infinities and both zeros."""
    x = integers(*shape, dtype=torch.float32)
    x.view(-1)[::7] = float("nan")
    x.view(-1)[::5] = -float("inf")
    x.view(-1)[::31] = float("inf")
    x.view(-1)[3::9] = -0.0
    return x.to(dtype).contiguous(memory_format=format)
