"""Rounding to the nearest value of a dtype, where Triton would truncate."""

import triton
import triton.language as tl

from fastcnn.backends import INTERPRETING

_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x``, in float32 or float64, as ``dtype``: to nearest, ties to even. The interpreter truncates to bfloat16."""
    if _INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def factor(x, PRECISION: tl.constexpr):
    """``x`` as a product takes it: of float32, tensor cores ignore the bits that TF32 does not have."""
    if PRECISION == "tf32" and x.dtype == tl.float32 and not _INTERPRETING:
        x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    return x
