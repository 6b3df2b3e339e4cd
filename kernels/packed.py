"""Several 16-bit elements in an instruction, which Triton does not do by itself: in PTX, where the GPU has it.

Elsewhere, in other dtypes and in Triton's interpreter, the same in Triton.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from fastcnn.backends import INTERPRETING

_INTERPRETING = tl.constexpr(INTERPRETING)
_TYPES = {"bf16": "bf16x2", "fp16": "f16x2"}


@triton.constexpr_function
def packs(dtype, elements, at_once=4):
    """Whether so many neighbouring elements of each lane are packed, so many at once."""
    wide = dtype.primitive_bitwidth != 16 or elements % at_once != 0
    return not wide and not INTERPRETING and cuda_capability_geq(9)


@triton.jit
def widened(x, ACC: tl.constexpr):
    """``x``, [BLOCK, W] or [BLOCK], in float32 or float64."""
    if x.dtype == tl.bfloat16 and tl.float32 == ACC and len(x.shape) == 2 and x.shape[1] > 1 and not _INTERPRETING:
        # of two in a register, one is shifted up and the other one's bits are masked out
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(ACC)


@triton.jit
def opaque(x, CHANNELS_LAST: tl.constexpr):
    """``x``, int64, hidden from the compiler's loop optimizations; in channels_last just ``x``.

    In NCHW each plane has a load or a store of its own. Where a loop increments their common offset, the compiler
    would keep a 64-bit pointer for each of them and run out of registers.
    """
    if _INTERPRETING or CHANNELS_LAST:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [x], tl.int64, is_pure=True, pack=1)


@triton.constexpr_function
def _at_least(dtype):
    return f"max.NaN.{_TYPES[dtype]} $0, $1, $2;"


@triton.jit
def at_least(x, least):
    """The larger of two, [BLOCK, W] and of 16 bits. Only for what :func:`packs` allows."""
    return tl.inline_asm_elementwise(_at_least(x.dtype.name), "=r,r,r", [x, least], x.dtype, is_pure=True, pack=2)


@triton.constexpr_function
def _where_place(place):
    """PTX: of four elements ($2, $3), those whose byte of $4 is ``place``; 0 in the place of others.

    Bytes become halves, which are compared as tiny float16 numbers.
    """
    pairs = "".join(
        f"""
        prmt.b32 h, $4, 0, {selector};
        set.eq.u32.f16x2 h, h, k;
        and.b32 ${i}, ${2 + i}, h;"""
        for i, selector in enumerate(("0x5140", "0x5342"))
    )
    return f"{{ .reg .b32 h, k; mov.b32 k, {place * 0x10001}; {pairs} }}"


@triton.jit
def where_place(value, place, PLACE: tl.constexpr):
    """``value`` where ``place`` is PLACE, and 0 elsewhere; both are [BLOCK, W] or [BLOCK]."""
    if place.dtype == tl.uint8 and len(value.shape) == 2 and packs(value.dtype, value.shape[1]):
        return tl.inline_asm_elementwise(
            _where_place(PLACE), "=&r,=&r,r,r,r", [value, place], value.dtype, is_pure=True, pack=4
        )
    else:
        return tl.where(place == PLACE, value, 0.0)


@triton.constexpr_function
def _maximum(count, dtype):
    """PTX: of each of four elements, the maximum of ``count`` ($3 and $4, then $5 and $6, ...) in $0 and $1.

    $2 has their places, a byte each: of equal ones the first, of NaN the last. That there is a NaN is seen in the
    maximum, and seldom.
    """
    type = _TYPES[dtype]
    lines = []
    for pair in (0, 1):
        x = [f"${3 + 2 * i + pair}" for i in range(count)]
        lines.append(f"mov.b32 m{pair}, {x[0]};")
        lines += [f"max.NaN.{type} m{pair}, m{pair}, {x[i]};" for i in range(1, count)]
        lines.append(f"mov.b32 p{pair}, {(count - 1) * 0x10001};")
        for i in reversed(range(count - 1)):
            lines.append(f"set.eq.u32.{type} e, {x[i]}, m{pair};")
            lines.append(f"lop3.b32 p{pair}, p{pair}, {i * 0x10001}, e, 0xd8;")  # e ? i : p
    lines.append(f"max.NaN.{type} e, m0, m1;")
    lines.append(f"setp.nan.{type} a|b, e, e;")
    lines.append("or.pred a, a, b;")
    lines.append("@!a bra done;")
    for pair in (0, 1):
        for i in range(count):
            lines.append(f"set.nan.u32.{type} e, ${3 + 2 * i + pair}, ${3 + 2 * i + pair};")
            lines.append(f"lop3.b32 p{pair}, p{pair}, {i * 0x10001}, e, 0xd8;")
    lines.append("done:")
    lines.append("mov.b32 $0, m0; mov.b32 $1, m1; prmt.b32 $2, p0, p1, 0x6420;")
    return "{ .reg .b32 m0, m1, p0, p1, e; .reg .pred a, b;\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _operands(inputs):
    return ",".join(["=&r"] * 3 + ["r"] * inputs)


@triton.jit
def maximum(values):
    """The largest of a tuple of tensors, [BLOCK, W], and its number in the tuple, as uint8.

    Of equal ones the first counts, and the last NaN. Only for what :func:`packs` allows.
    """
    return tl.inline_asm_elementwise(
        _maximum(len(values), values[0].dtype.name),
        _operands(2 * len(values)),
        values,
        (values[0].dtype, tl.uint8),
        is_pure=True,
        pack=4,
    )
