"""Rounding to the nearest value of a dtype, which Triton's interpreter does not do for bfloat16: it truncates."""

import triton
import triton.language as tl

from fastcnn.backends import INTERPRETING

_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x``, in float32 or float64, as ``dtype``: to nearest, ties to even."""
    if _INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
