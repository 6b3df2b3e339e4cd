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
def block_of_lanes(program, layout: tl.constexpr):
    """The numbers of a program's lanes."""
    return program.to(layout.INDEX) * layout.BLOCK + tl.arange(0, layout.BLOCK)


@triton.jit
def lanes(lane, batch, rows, columns, layout: tl.constexpr):
    """Of each lane: image, row, column, first channel, and that channel's number in its group.

    Consecutive lanes are consecutive in memory: channels first where they are last, else columns. Lanes past
    the end repeat the last.
    """
    PARTS: tl.constexpr = (layout.CHANNELS + layout.V - 1) // layout.V  # of a group
    TOTAL: tl.constexpr = layout.C // layout.CHANNELS * PARTS
    last = batch * TOTAL * tl.cast(rows, layout.INDEX) * columns - 1
    lane = tl.minimum(lane, last)
    if layout.CHANNELS_LAST:
        part = lane % TOTAL
        column = lane // TOTAL % columns
        row = lane // TOTAL // columns % rows
        n = lane // TOTAL // columns // rows
    else:
        column = lane % columns
        row = lane // columns % rows
        part = lane // columns // rows % TOTAL
        n = lane // columns // rows // TOTAL
    first = part % PARTS * layout.V
    return n, row, column, part // PARTS * layout.CHANNELS + first, first


@triton.jit
def address(n, channel, h, w, H, W, layout: tl.constexpr):
    """Where an element is in memory; h and w may be outside of the map."""
    if layout.CHANNELS_LAST:
        return ((n.to(tl.int64) * H + h) * W + w) * layout.C + channel
    else:
        return ((n.to(tl.int64) * layout.C + channel) * H + h) * W + w


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
def step(x, best, place, at, first, h, w, H, W, kh, kw, pool: tl.constexpr, layout: tl.constexpr):
    """Element (kh, kw) of the windows that start at (h, w); elements outside of the map never win."""
    h += kh * pool.DH
    w += kw * pool.DW
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) if pool.PADDED else None
    at += (tl.cast(W, tl.int64) * (kh * pool.DH) + kw * pool.DW) * layout.PIXEL
    values = load_parts(x + at, first, inside, tl.cast(H, tl.int64) * W, 0, 0, layout, float("-inf"))
    bests = ()
    places = ()
    for c in tl.static_range(len(values)):
        value, at_place = take(best[c], place[c], values[c].to(layout.ACC), kh * pool.KW + kw)
        bests = bests + (value,)
        places = places + (at_place,)
    return bests, places


@triton.jit
def packed_maximum(x, at, first, H, W, pool: tl.constexpr, layout: tl.constexpr):
    """The maximum of a window that is inside of the map, and its place, in parts."""
    KH: tl.constexpr = pool.KH
    KW: tl.constexpr = pool.KW
    values = ()
    stride = tl.cast(H, tl.int64) * W
    for kh in tl.static_range(KH):
        for kw in tl.static_range(KW):
            to = (tl.cast(W, tl.int64) * (kh * pool.DH) + kw * pool.DW) * layout.PIXEL
            parts = load_parts(x + at + to, first, None, stride, 0, 0, layout)
            values = values + (parts[0] if layout.CHANNELS_LAST else join(parts, layout.V),)
    value, place = maximum(values)
    if layout.CHANNELS_LAST:
        return (value,), (place,)
    else:
        return split(value, layout.V), split(place, layout.V)


@triton.jit
def max_pool2d_forward_kernel(x, y, argmax, batch, H, W, OH, OW, pool: tl.constexpr, layout: tl.constexpr):
    """y, and the places of the maxima unless ``argmax`` is None. A lane owns one output; all are dense."""
    KH: tl.constexpr = pool.KH
    KW: tl.constexpr = pool.KW
    V: tl.constexpr = layout.V
    BLOCK: tl.constexpr = layout.BLOCK
    UNROLLED: tl.constexpr = KH * KW <= 32
    lane = block_of_lanes(tl.program_id(0), layout)
    n, oh, ow, channel, first = lanes(lane, batch, OH, OW, layout)
    h, w = oh * pool.SH - pool.PH, ow * pool.SW - pool.PW
    at = address(n, channel, h, w, H, W, layout)
    if UNROLLED and not pool.PADDED and packs(x.dtype.element_ty, V):
        best, place = packed_maximum(x, at, first, H, W, pool, layout)
    else:
        place = (first_inside(h, pool.DH) * KW + first_inside(w, pool.DW)).to(tl.int32)
        if layout.CHANNELS_LAST:
            best = (tl.full([BLOCK, V], float("-inf"), layout.ACC),)
            place = (place[:, None] + tl.zeros([BLOCK, V], tl.int32),)
        else:
            best = (tl.full([BLOCK], float("-inf"), layout.ACC),) * V
            place = (place,) * V
        if UNROLLED:
            for kh in tl.static_range(KH):
                for kw in tl.static_range(KW):
                    best, place = step(x, best, place, at, first, h, w, H, W, kh, kw, pool, layout)
        else:
            for kh in range(KH):
                for kw in range(KW):
                    best, place = step(x, best, place, at, first, h, w, H, W, kh, kw, pool, layout)
    at = address(n, channel, oh, ow, OH, OW, layout)
    stride = tl.cast(OH, tl.int64) * OW
    store_parts(y + at, best, first, None, stride, layout)
    if argmax is not None:
        store_parts(argmax + at, place, first, None, stride, layout)


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
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    pool: tl.constexpr,
    layout: tl.constexpr,
):
    """dy and argmax, in parts, of all windows that may hold an element of a block.

    Block and window (oh, ow) start together; ``dy`` and ``argmax`` point to that window's. The others start earlier.
    """
    loaded = ()
    stride = tl.cast(OH, tl.int64) * OW
    for i in tl.static_range((pool.KH - 1) * pool.DH // pool.SH + 1):
        for j in tl.static_range((pool.KW - 1) * pool.DW // pool.SW + 1):
            inside = (oh >= i) & (oh - i < OH) & (ow >= j) & (ow - j < OW)
            if mask is not None:
                inside = inside & mask
            back = tl.cast(OW, tl.int64) * (i * layout.PIXEL)
            left = j * layout.PIXEL
            loaded = loaded + load_parts(dy - back - left, first, inside, stride, BEFORE, AFTER, layout)
            loaded = loaded + load_parts(argmax - back - left, first, inside, stride, BEFORE, AFTER, layout)
    return loaded


@triton.constexpr_function
def place_of(top, left, KH, KW, DH, DW):
    """Of the element so many rows and columns from a window's start: its place; -1 where the window has none there."""
    kh, kw = top // DH, left // DW
    return kh * KW + kw if top % DH == left % DW == 0 and kh < KH and kw < KW else -1


@triton.jit
def gradient(
    windows,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    pool: tl.constexpr,
    layout: tl.constexpr,
):
    """In parts, of element (TOP, LEFT) of each block: dy of the :func:`load_windows` whose maximum it was."""
    ROWS: tl.constexpr = (pool.KH - 1) * pool.DH // pool.SH + 1
    COLUMNS: tl.constexpr = (pool.KW - 1) * pool.DW // pool.SW + 1
    total = ()
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            total = add_where_place(
                total,
                windows,
                i * COLUMNS + j,
                len(windows) // (2 * ROWS * COLUMNS),
                place_of(TOP + i * pool.SH, LEFT + j * pool.SW, pool.KH, pool.KW, pool.DH, pool.DW),
                layout,
            )
    if len(total) == 0:
        total = zero_parts(BEFORE, AFTER, layout)
    return total


@triton.jit
def add_where_place(
    total, windows, WINDOW: tl.constexpr, PARTS: tl.constexpr, PLACE: tl.constexpr, layout: tl.constexpr
):
    """The total, empty for 0, and dy of one of the windows where its maximum was at PLACE."""
    if PLACE < 0:
        return total
    else:
        more = ()
        for c in tl.static_range(PARTS):
            value = where_place(windows[WINDOW * 2 * PARTS + c], windows[(WINDOW * 2 + 1) * PARTS + c], PLACE)
            value = widened(value, layout.ACC)
            more = more + (total[c] + value if len(total) > 0 else value,)
        return more


@triton.jit
def max_pool2d_backward_kernel(dy, argmax, dx, batch, H, W, OH, OW, pool: tl.constexpr, layout: tl.constexpr):
    """dx from dy and the places of the maxima. A lane owns a block of SH x SW inputs; all are dense."""
    SH: tl.constexpr = pool.SH
    SW: tl.constexpr = pool.SW
    rows, columns = (H + (pool.PH + SH - 1)) // SH, (W + (pool.PW + SW - 1)) // SW
    lane = block_of_lanes(tl.program_id(0), layout)
    n, oh, ow, channel, first = lanes(lane, batch, rows, columns, layout)
    at = address(n, channel, oh, ow, OH, OW, layout)
    windows = load_windows(dy + at, argmax + at, first, oh, ow, None, OH, OW, 0, 0, pool, layout)
    h, w = oh * SH - pool.PH, ow * SW - pool.PW
    to = dx + address(n, channel, h, w, H, W, layout)
    for i in tl.static_range(SH):
        for j in tl.static_range(SW):
            parts = gradient(windows, i, j, 0, 0, pool, layout)
            inside = (h + i >= 0) & (h + i < H) & (w + j >= 0) & (w + j < W)
            pointers = to + tl.cast(W, tl.int64) * (i * layout.PIXEL) + j * layout.PIXEL
            store_parts(pointers, parts, first, inside, tl.cast(H, tl.int64) * W, layout)


@triton.jit
def max_pool2d_backward_far_kernel(dy, argmax, dx, batch, H, W, OH, OW, pool: tl.constexpr, layout: tl.constexpr):
    """For windows or strides too large to unroll: a lane owns one input and loops over the window."""
    lane = block_of_lanes(tl.program_id(0), layout)
    n, h, w, channel, first = lanes(lane, batch, H, W, layout)
    stride = tl.cast(OH, tl.int64) * OW
    total = zero_parts(0, 0, layout)
    for kh in range(pool.KH):
        for kw in range(pool.KW):
            row, column = h + pool.PH - kh * pool.DH, w + pool.PW - kw * pool.DW
            oh, ow = row // pool.SH, column // pool.SW
            starts_here = (row % pool.SH == 0) & (column % pool.SW == 0)
            inside = starts_here & (row >= 0) & (column >= 0) & (oh < OH) & (ow < OW)
            at = address(n, channel, oh, ow, OH, OW, layout)
            values = load_parts(dy + at, first, inside, stride, 0, 0, layout)
            places = load_parts(argmax + at, first, inside, stride, 0, 0, layout)
            total = add_far(total, values, places, kh * pool.KW + kw, layout)
    to = address(n, channel, h, w, H, W, layout)
    store_parts(dx + to, total, first, None, tl.cast(H, tl.int64) * W, layout)


@triton.jit
def add_far(total, values, places, place, layout: tl.constexpr):
    """The total, and the parts of dy where the maximum was at ``place`` of its window."""
    more = ()
    for c in tl.static_range(len(values)):
        more = more + (total[c] + tl.where(places[c] == place, values[c].to(layout.ACC), 0.0),)
    return more
