"""Max pooling: ``y[oh, ow] = max(x[oh*SH - PH + kh*DH, ow*SW - PW + kw*DW])``, and ``kh*KW + kw``, where it was.

Forward reads x once (what windows share comes from the cache) and writes y and, where asked for, one byte per output.
Backward reads dy and the byte and writes dx: each element of dx gathers from the windows that hold it, so there are no
atomics and the order is fixed.

A lane of a program owns ``V`` channels of one output (forward) or of one block of SH x SW inputs (backward). Elements
at the same place of their blocks are at the same places of their windows, so the gather is unrolled without a division
or a branch: at stride 2, a 3 x 3 window costs 4 loads and 9 comparisons for 4 elements.

- channels_last: V channels are 16 bytes where C is a multiple of that; consecutive lanes own consecutive vectors.
- NCHW: consecutive lanes own neighbouring columns, V is a few maps, for which the places are computed once.
"""

import triton
import triton.language as tl

from .lrn import join, load_parts, split, store_parts, zero_parts
from .packed import maximum, packs, where_place, widened


@triton.jit
def block_of_lanes(program, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers of a program's lanes."""
    return program.to(INDEX) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def lanes(
    lane,
    batch,
    rows,
    columns,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    V: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Of each lane: image, row, column, first channel, and that channel's number in its group.

    Consecutive lanes are consecutive in memory: channels first where they are last, else columns. Lanes past
    the end repeat the last.
    """
    PARTS: tl.constexpr = (CHANNELS + V - 1) // V  # of a group
    TOTAL: tl.constexpr = C // CHANNELS * PARTS
    last = batch * TOTAL * tl.cast(rows, INDEX) * columns - 1
    lane = tl.minimum(lane, last)
    if CHANNELS_LAST:
        part = lane % TOTAL
        column = lane // TOTAL % columns
        row = lane // TOTAL // columns % rows
        n = lane // TOTAL // columns // rows
    else:
        column = lane % columns
        row = lane // columns % rows
        part = lane // columns // rows % TOTAL
        n = lane // columns // rows // TOTAL
    first = part % PARTS * V
    return n, row, column, part // PARTS * CHANNELS + first, first


@triton.jit
def address(n, channel, h, w, C: tl.constexpr, H, W, CHANNELS_LAST: tl.constexpr):
    """Where an element is in memory; h and w may be outside of the map."""
    if CHANNELS_LAST:
        return ((n.to(tl.int64) * H + h) * W + w) * C + channel
    else:
        return ((n.to(tl.int64) * C + channel) * H + h) * W + w


@triton.jit
def take(best, place, value, at_place):
    """The larger value and its place: the first of equal ones, and the last NaN."""
    better = (value > best) | (value != value)
    return tl.where(better, value, best), tl.where(better, at_place, place)


@triton.jit
def first_inside(start, DILATION: tl.constexpr):
    """Number of the first element of a window from ``start`` on that is not in the padding before the map."""
    return (tl.maximum(-start, 0) + (DILATION - 1)) // DILATION


@triton.jit
def step(
    x,
    best,
    place,
    at,
    first,
    h,
    w,
    H,
    W,
    kh,
    kw,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    PADDED: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Element (kh, kw) of the windows that start at (h, w); elements outside of the map never win."""
    h += kh * DH
    w += kw * DW
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) if PADDED else None
    at += (tl.cast(W, tl.int64) * (kh * DH) + kw * DW) * (C if CHANNELS_LAST else 1)
    values = load_parts(x + at, first, inside, tl.cast(H, tl.int64) * W, 0, 0, C, V, V, CHANNELS_LAST, float("-inf"))
    bests = ()
    places = ()
    for c in tl.static_range(len(values)):
        value, at_place = take(best[c], place[c], values[c].to(ACC), kh * KW + kw)
        bests = bests + (value,)
        places = places + (at_place,)
    return bests, places


@triton.jit
def packed_maximum(
    x,
    at,
    first,
    H,
    W,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The maximum of a window that is inside of the map, and its place, in parts."""
    values = ()
    stride = tl.cast(H, tl.int64) * W
    for kh in tl.static_range(KH):
        for kw in tl.static_range(KW):
            to = (tl.cast(W, tl.int64) * (kh * DH) + kw * DW) * (C if CHANNELS_LAST else 1)
            parts = load_parts(x + at + to, first, None, stride, 0, 0, C, V, V, CHANNELS_LAST)
            values = values + (parts[0] if CHANNELS_LAST else join(parts, V),)
    value, place = maximum(values)
    if CHANNELS_LAST:
        return (value,), (place,)
    else:
        return split(value, V), split(place, V)


@triton.jit
def forward(
    x,
    y,
    argmax,
    batch,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    UNROLL: tl.constexpr,
    PADDED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WITH_ARGMAX: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
):
    lane = block_of_lanes(tl.program_id(0), INDEX, BLOCK)
    n, oh, ow, channel, first = lanes(lane, batch, OH, OW, C, C, V, CHANNELS_LAST, INDEX)
    h, w = oh * SH - PH, ow * SW - PW
    at = address(n, channel, h, w, C, H, W, CHANNELS_LAST)
    if UNROLL and not PADDED and packs(x.dtype.element_ty, V):
        best, place = packed_maximum(x, at, first, H, W, KH, KW, DH, DW, C, V, CHANNELS_LAST)
    else:
        place = (first_inside(h, DH) * KW + first_inside(w, DW)).to(tl.int32)
        if CHANNELS_LAST:
            best = (tl.full([BLOCK, V], float("-inf"), ACC),)
            place = (place[:, None] + tl.zeros([BLOCK, V], tl.int32),)
        else:
            best = (tl.full([BLOCK], float("-inf"), ACC),) * V
            place = (place,) * V
        if UNROLL:
            for kh in tl.static_range(KH):
                for kw in tl.static_range(KW):
                    best, place = step(
                        x, best, place, at, first, h, w, H, W, kh, kw, KW, DH, DW, PADDED, C, V, CHANNELS_LAST, ACC
                    )
        else:
            for kh in range(KH):
                for kw in range(KW):
                    best, place = step(
                        x, best, place, at, first, h, w, H, W, kh, kw, KW, DH, DW, PADDED, C, V, CHANNELS_LAST, ACC
                    )
    at = address(n, channel, oh, ow, C, OH, OW, CHANNELS_LAST)
    stride = tl.cast(OH, tl.int64) * OW
    store_parts(y + at, best, first, None, stride, C, V, CHANNELS_LAST)
    if WITH_ARGMAX:
        store_parts(argmax + at, place, first, None, stride, C, V, CHANNELS_LAST)


@triton.jit
def add_where_place(
    total,
    dy,
    argmax,
    at,
    first,
    inside,
    stride,
    place,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    CHANNELS: tl.constexpr,
    V: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add the parts of dy at ``at`` where the maximum was at ``place`` of its window."""
    places = load_parts(argmax + at, first, inside, stride, BEFORE, AFTER, CHANNELS, V, VECTOR, CHANNELS_LAST)
    values = load_parts(dy + at, first, inside, stride, BEFORE, AFTER, CHANNELS, V, VECTOR, CHANNELS_LAST)
    more = ()
    for c in tl.static_range(len(values)):
        more = more + (total[c] + tl.where(places[c] == place, values[c].to(ACC), 0.0),)
    return more


@triton.jit
def load_windows(
    dy,
    argmax,
    first,
    oh,
    ow,
    mask,
    OH,
    OW,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    V: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """dy and argmax, in parts, of all windows that may hold an element of a block.

    Block and window (oh, ow) start together; ``dy`` and ``argmax`` point to that window's. The others start earlier.
    """
    loaded = ()
    stride = tl.cast(OH, tl.int64) * OW
    PIXEL: tl.constexpr = C if CHANNELS_LAST else 1
    for i in tl.static_range((KH - 1) * DH // SH + 1):
        for j in tl.static_range((KW - 1) * DW // SW + 1):
            inside = (oh >= i) & (oh - i < OH) & (ow >= j) & (ow - j < OW)
            if mask is not None:
                inside = inside & mask
            back = tl.cast(OW, tl.int64) * (i * PIXEL)
            loaded = loaded + load_parts(
                dy - back - j * PIXEL, first, inside, stride, BEFORE, AFTER, CHANNELS, V, VECTOR, CHANNELS_LAST
            )
            loaded = loaded + load_parts(
                argmax - back - j * PIXEL, first, inside, stride, BEFORE, AFTER, CHANNELS, V, VECTOR, CHANNELS_LAST
            )
    return loaded


@triton.jit
def gradient(
    windows,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    V: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """In parts, of element (TOP, LEFT) of each block: dy of the :func:`load_windows` whose maximum it was."""
    ROW: tl.constexpr = (KW - 1) * DW // SW + 1
    PARTS: tl.constexpr = len(windows) // (2 * ROW * ((KH - 1) * DH // SH + 1))
    total = ()
    for i in tl.static_range((KH - 1) * DH // SH + 1):
        for j in tl.static_range(ROW):
            if (TOP + i * SH) % DH == 0 and (LEFT + j * SW) % DW == 0:
                if (TOP + i * SH) // DH < KH and (LEFT + j * SW) // DW < KW:
                    more = ()
                    for c in tl.static_range(PARTS):
                        value = where_place(
                            windows[(i * ROW + j) * 2 * PARTS + c],
                            windows[((i * ROW + j) * 2 + 1) * PARTS + c],
                            (TOP + i * SH) // DH * KW + (LEFT + j * SW) // DW,
                        )
                        value = widened(value, ACC)
                        more = more + (total[c] + value if len(total) > 0 else value,)
                    total = more
    if len(total) == 0:
        total = zero_parts(BLOCK, BEFORE, AFTER, V, VECTOR, CHANNELS_LAST, ACC)
    return total


@triton.jit
def backward(
    dy,
    argmax,
    dx,
    batch,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
):
    PIXEL: tl.constexpr = C if CHANNELS_LAST else 1
    rows, columns = (H + (PH + SH - 1)) // SH, (W + (PW + SW - 1)) // SW
    lane = block_of_lanes(tl.program_id(0), INDEX, BLOCK)
    n, oh, ow, channel, first = lanes(lane, batch, rows, columns, C, C, V, CHANNELS_LAST, INDEX)
    at = address(n, channel, oh, ow, C, OH, OW, CHANNELS_LAST)
    windows = load_windows(
        *(dy + at, argmax + at, first, oh, ow),
        None,
        *(OH, OW, KH, KW, SH, SW, DH, DW, 0, 0, C, C, V, V, CHANNELS_LAST),
    )
    h, w = oh * SH - PH, ow * SW - PW
    to = dx + address(n, channel, h, w, C, H, W, CHANNELS_LAST)
    for i in tl.static_range(SH):
        for j in tl.static_range(SW):
            parts = gradient(windows, i, j, KH, KW, SH, SW, DH, DW, BLOCK, 0, 0, V, V, CHANNELS_LAST, ACC)
            inside = (h + i >= 0) & (h + i < H) & (w + j >= 0) & (w + j < W)
            pointers = to + tl.cast(W, tl.int64) * (i * PIXEL) + j * PIXEL
            store_parts(pointers, parts, first, inside, tl.cast(H, tl.int64) * W, C, V, CHANNELS_LAST)


@triton.jit
def backward_far(
    dy,
    argmax,
    dx,
    batch,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
):
    """For windows or strides too large to unroll: a lane owns one input element and loops over the window."""
    lane = block_of_lanes(tl.program_id(0), INDEX, BLOCK)
    n, h, w, channel, first = lanes(lane, batch, H, W, C, C, V, CHANNELS_LAST, INDEX)
    stride = tl.cast(OH, tl.int64) * OW
    total = zero_parts(BLOCK, 0, 0, V, V, CHANNELS_LAST, ACC)
    for kh in range(KH):
        for kw in range(KW):
            row, column = h + PH - kh * DH, w + PW - kw * DW
            oh, ow = row // SH, column // SW
            inside = (row >= 0) & (column >= 0) & (row % SH == 0) & (column % SW == 0) & (oh < OH) & (ow < OW)
            at = address(n, channel, oh, ow, C, OH, OW, CHANNELS_LAST)
            total = add_where_place(
                total, dy, argmax, at, first, inside, stride, kh * KW + kw, 0, 0, C, V, V, CHANNELS_LAST, ACC
            )
    to = address(n, channel, h, w, C, H, W, CHANNELS_LAST)
    store_parts(dx + to, total, first, None, tl.cast(H, tl.int64) * W, C, V, CHANNELS_LAST)
