"""The tail of an AlexNet stage: ``y = max_pool2d(lrn(relu(x + bias)))``, any part of which may be absent.

Forward reads x once and writes the pooled map and, where asked for, one byte per output for the place of its maximum:
at stride 2, 1 + 1/4 elements and 1/4 byte per element of x. Backward reads x, dy and the byte and writes dx, 2 + 1/4
elements and 1/4 byte; with a bias also one partial sum per lane and channel. Nothing else is written in between.

Forward: programs walk down maps, each the same number of rows, so that all are done at the same time. Of each row a
program keeps the maximum over each window's columns, so that rows which windows share are normalized once. Columns
which windows share are, too:

- channels_last: a lane owns V channels of R neighbouring outputs. At 3x3/2 with R = 3 that makes 7/6 normalizations
  per element instead of 3/2.
- NCHW: a lane owns V channels of one output and normalizes SW columns; the next column comes from the next lane of its
  warp (``EXCHANGED``). The last lane of a warp has no next lane; the first of the next warp does its work.

Backward: a lane owns V channels of a block of inputs between two windows, in every few images. It gathers the gradient
of the normalized map, also of the neighbouring channels, and normalizes again.
"""

import triton
import triton.language as tl

from .lrn import (
    load_parts,
    normalize_backward,
    powers,
    store_parts,
    store_planes,
    to_parts,
    to_planes,
    window_sums,
)
from .max_pool2d import address, block_of_lanes, first_inside, gradient, lanes, load_windows, take
from .packed import at_least, opaque, packs, widened


@triton.constexpr_function
def start(K, SCALE, QUARTERS, REST):
    """What sums of squares start from to become s/SCALE; 0 where powers of that might leave float32's range."""
    return K / SCALE if K > 0 and SCALE >= 1e-9 and 0 < QUARTERS <= 4 and REST == 0 else 0.0


@triton.constexpr_function
def unscaled(K, SCALE, QUARTERS, REST):
    """The factor between s**-beta and the same power of the sums that begin with :func:`start`."""
    return SCALE ** (-QUARTERS / 4) if start(K, SCALE, QUARTERS, REST) else 1.0


@triton.constexpr_function
def lowest(dtype):
    """The least finite number of a 16-bit dtype."""
    return -65504.0 if dtype == tl.float16 else -3.3895313892515355e38


@triton.jit
def rectified_part(x, bias, RELU: tl.constexpr, NORMALIZED: tl.constexpr, ACC: tl.constexpr):
    """``relu(x + bias)`` in ACC; ``bias`` is a tuple of one or none.

    In 16 bits it is ``max(x, -bias) + bias``: the maximum of two elements takes one instruction. For this to be 0
    where x is smaller, a bias of -inf becomes the lowest finite number. That changes the result only where x is inf,
    and there LRN, which must follow (NORMALIZED), makes NaN of either.
    """
    PACKED: tl.constexpr = RELU and NORMALIZED and len(x.shape) == 2 and packs(x.dtype, x.shape[1], 2)
    if PACKED and len(bias) == 0:
        return widened(at_least(x, tl.zeros(x.shape, x.dtype)), ACC)
    elif PACKED and bias[0].dtype == x.dtype:
        b = at_least(bias[0], tl.full(x.shape, lowest(x.dtype), x.dtype))
        return widened(at_least(x, -b), ACC) + widened(b, ACC)
    else:
        z = widened(x, ACC)
        if len(bias) > 0:
            z += bias[0].to(ACC)
        if RELU:
            z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return z


@triton.jit
def rectified(
    pointers,
    bias,
    first,
    mask,
    stride,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    CHANNELS: tl.constexpr,
    V: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RELU: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ACC: tl.constexpr,
):
    """``relu(x + bias)``, in planes; ``bias`` is in parts, or an empty tuple."""
    x = load_parts(pointers, first, mask, stride, BEFORE, AFTER, CHANNELS, V, VECTOR, CHANNELS_LAST)
    parts = ()
    for i in tl.static_range(len(x)):
        parts = parts + (rectified_part(x[i], bias[i : i + 1], RELU, NORMALIZED, ACC),)
    return to_planes(parts, BEFORE, AFTER, V, VECTOR, CHANNELS_LAST, ACC)


@triton.jit
def of_next_lane(x):
    """``x``, [BLOCK], of the next lane; in the last lane of a warp, its own."""
    WARPS: tl.constexpr = x.shape[0] // 32
    following = tl.minimum(tl.arange(0, 32) + 1, 31)[None, :] + tl.zeros([WARPS, 32], tl.int32)
    return tl.reshape(tl.gather(tl.reshape(x, [WARPS, 32]), following, 1), [32 * WARPS])


@triton.jit
def row_maxima(
    pointers,
    bias,
    first,
    shift,
    h,
    w,
    H,
    W,
    C: tl.constexpr,
    RELU: tl.constexpr,
    LRN: tl.constexpr,
    CHANNELS: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    QUARTERS: tl.constexpr,
    REST: tl.constexpr,
    KW: tl.constexpr,
    SW: tl.constexpr,
    DW: tl.constexpr,
    PADDED: tl.constexpr,
    R: tl.constexpr,
    EXCHANGED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    V: tl.constexpr,
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """For V channels of each of R windows from column w on: the maximum over their columns of row h, its number kw.

    In parts. The pointers are to element (h, w), which may be outside of the map. With EXCHANGED a lane normalizes SW
    columns, and the next column comes from the next lane. Where a row ends before w + SW, the pointers are ``shift``
    columns earlier, so that all SW columns exist.
    """
    START: tl.constexpr = start(K, SCALE, QUARTERS, REST) if LRN else 0.0
    NORMALIZED: tl.constexpr = START != 0
    VECTORS: tl.constexpr = V // VECTOR
    values = ()
    stride = tl.cast(H, tl.int64) * W
    for j in tl.static_range(SW if EXCHANGED else (R - 1) * SW + KW):
        inside = (w + j * DW >= 0) & (w + j * DW < W) & (h >= 0) & (h < H) if PADDED else None
        z = rectified(
            *(pointers + j * DW * (C if CHANNELS_LAST else 1), bias, first),
            inside,
            *(stride, BEFORE, AFTER, CHANNELS, V, VECTOR, CHANNELS_LAST, RELU, NORMALIZED, ACC),
        )
        own = to_parts(z[BEFORE : BEFORE + V], VECTOR, CHANNELS_LAST)
        if LRN:
            sums = to_parts(window_sums(z, BEFORE + 1 + AFTER, True, START), VECTOR, CHANNELS_LAST)
        for i in tl.static_range(VECTORS):
            value = own[i]
            if LRN:
                p, _ = powers(sums[i] if START != 0 else K + SCALE * sums[i], QUARTERS, REST)
                value *= p
            if PADDED:
                value = tl.where(inside[:, None] if CHANNELS_LAST else inside, value, float("-inf"))
            values = values + (value,)
    if EXCHANGED:
        for i in tl.static_range(VECTORS):
            column = values[i]
            for j in tl.static_range(1, 1 if PADDED else SW):
                column = tl.where(shift == j, values[j * VECTORS + i], column)
            values = values + (of_next_lane(column),)
    best = ()
    place = ()
    for r in tl.static_range(R):
        for i in tl.static_range(VECTORS):
            value = values[r * SW * VECTORS + i]
            kw = tl.zeros(value.shape, tl.int32)
            if PADDED:
                before = first_inside(w + r * SW, DW).to(tl.int32)
                kw += before[:, None] if CHANNELS_LAST else before
            for j in tl.static_range(1, KW):
                value, kw = take(value, kw, values[(r * SW + j) * VECTORS + i], j)
            best = best + (value,)
            place = place + (kw,)
    return best, place


@triton.jit
def forward(
    x,
    bias,
    y,
    argmax,
    batch,
    H,
    W,
    OH,
    OW,
    rows,
    run,
    C: tl.constexpr,
    RELU: tl.constexpr,
    LRN: tl.constexpr,
    CHANNELS: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    QUARTERS: tl.constexpr,
    REST: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    PADDED: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    WITH_ARGMAX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    R: tl.constexpr,
    EXCHANGED: tl.constexpr,
    V: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
):
    """A program walks down ``run`` rows of outputs with all its lanes; at the end of a map it goes on in another.

    ``rows`` is the total for all programs.
    """
    VECTORS: tl.constexpr = V // VECTOR
    SHARED: tl.constexpr = KH - SH if DH == 1 and KH > SH else 0  # rows of a window that are also the next one's
    PIXEL: tl.constexpr = C if CHANNELS_LAST else 1  # from a pixel to the next
    down, down_y = tl.cast(W, tl.int64) * PIXEL, tl.cast(OW, tl.int64) * PIXEL  # from a row to the next
    stride_y = tl.cast(OH, tl.int64) * OW
    row = tl.program_id(0).to(INDEX) * run
    end = tl.minimum(row + run, rows)
    while row < end:
        lane = block_of_lanes(row // OH, INDEX, BLOCK)
        if EXCHANGED:
            n, _, left, channel, first = lanes(
                lane // 32 * 31 + lane % 32, batch, 1, OW + 1, C, CHANNELS, V, CHANNELS_LAST, INDEX
            )
            stored = (left < OW) & (lane % 32 != 31)
        else:
            n, _, block, channel, first = lanes(
                lane, batch, 1, (OW + (R - 1)) // R, C, CHANNELS, V, CHANNELS_LAST, INDEX
            )
            left = tl.minimum(block * R, OW - R)
            stored = None
        done = (row % OH).to(tl.int32)  # of the rows of these maps
        oh = done + tl.zeros([BLOCK], tl.int32)
        h, w = oh * SH - PH, left * SW - PW
        shift = tl.maximum(w + SW - W, 0) if EXCHANGED and not PADDED else 0
        at = address(n, channel, h, w - shift, C, H, W, CHANNELS_LAST)
        to = address(n, channel, oh, left, C, OH, OW, CHANNELS_LAST)
        b = ()
        if WITH_BIAS:
            b = load_parts(bias + channel, first, None, 1, BEFORE, AFTER, CHANNELS, V, VECTOR, CHANNELS_LAST)
        values = ()
        places = ()
        for i in tl.static_range(SHARED):
            best, place = row_maxima(
                *(x + at + i * down, b, first, shift, h + i, w, H, W, C),
                *(RELU, LRN, CHANNELS, BEFORE, AFTER, SCALE, K, QUARTERS, REST),
                *(KW, SW, DW, PADDED, R, EXCHANGED, CHANNELS_LAST, V, VECTOR, ACC),
            )
            values = values + best
            places = places + place
        last = tl.minimum(row + (OH - done), end)
        while row < last:
            for i in tl.static_range(SHARED, KH):
                best, place = row_maxima(
                    *(x + opaque(at + i * DH * down, CHANNELS_LAST), b, first, shift, h + i * DH, w, H, W, C),
                    *(RELU, LRN, CHANNELS, BEFORE, AFTER, SCALE, K, QUARTERS, REST),
                    *(KW, SW, DW, PADDED, R, EXCHANGED, CHANNELS_LAST, V, VECTOR, ACC),
                )
                values = values + best
                places = places + place
            for r in tl.static_range(R):
                maxima = ()
                argmaxima = ()
                for v in tl.static_range(r * VECTORS, r * VECTORS + VECTORS):
                    value, k = values[v], places[v]
                    if PADDED:
                        above = first_inside(h, DH).to(tl.int32) * KW
                        k += above[:, None] if CHANNELS_LAST else above
                    for i in tl.static_range(1, KH):
                        value, k = take(value, k, values[i * R * VECTORS + v], i * KW + places[i * R * VECTORS + v])
                    if LRN:
                        value = value * unscaled(K, SCALE, QUARTERS, REST)
                    maxima = maxima + (value,)
                    argmaxima = argmaxima + (k,)
                pixel = opaque(to, CHANNELS_LAST) + r * PIXEL
                store_parts(y + pixel, maxima, first, stored, stride_y, CHANNELS, V, CHANNELS_LAST)
                if WITH_ARGMAX:
                    store_parts(argmax + pixel, argmaxima, first, stored, stride_y, CHANNELS, V, CHANNELS_LAST)
            values = values[(KH - SHARED) * R * VECTORS :]
            places = places[(KH - SHARED) * R * VECTORS :]
            row += 1
            h += SH
            at += SH * down
            to += down_y


@triton.jit
def backward(
    dy,
    x,
    bias,
    argmax,
    dx,
    sums,
    batch,
    H,
    W,
    OH,
    OW,
    splits,
    C: tl.constexpr,
    RELU: tl.constexpr,
    LRN: tl.constexpr,
    CHANNELS: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    QUARTERS: tl.constexpr,
    REST: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    POOL: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    V: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
):
    """A lane does one block in the images split, split + splits, ... and leaves its sums of dx, for the bias, in sums.

    They have the shape (splits, rows, columns, C).
    """
    REACH: tl.constexpr = BEFORE + AFTER
    PIXEL: tl.constexpr = C if CHANNELS_LAST else 1  # from a pixel to the next
    NORMALIZED: tl.constexpr = LRN and start(K, SCALE, QUARTERS, REST) != 0
    rows, columns = (H + (PH + SH - 1)) // SH, (W + (PW + SW - 1)) // SW
    lane = block_of_lanes(tl.program_id(0), INDEX, BLOCK)
    split, oh, ow, channel, first = lanes(lane, splits, rows, columns, C, CHANNELS, V, CHANNELS_LAST, INDEX)
    b = ()
    if WITH_BIAS:
        b = load_parts(bias + channel, first, None, 1, REACH, REACH, CHANNELS, V, VECTOR, CHANNELS_LAST)
    stride = tl.cast(H, tl.int64) * W
    top, left = oh * SH - PH, ow * SW - PW
    at = address(split, channel, top, left, C, H, W, CHANNELS_LAST)
    to = address(split, channel, oh, ow, C, OH, OW, CHANNELS_LAST)
    total = (tl.zeros([BLOCK], ACC),) * V
    images = batch  # left to do
    while images > 0:
        mine = split < images
        if POOL:
            window = opaque(to, CHANNELS_LAST)
            windows = load_windows(
                *(dy + window, argmax + window, first, oh, ow, mine, OH, OW),
                *(KH, KW, SH, SW, DH, DW, AFTER, BEFORE, C, CHANNELS, V, VECTOR, CHANNELS_LAST),
            )
        block = opaque(at, CHANNELS_LAST)
        for i in tl.static_range(SH):
            for j in tl.static_range(SW):
                h, w = top + i, left + j
                inside = mine & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                pixel = block + tl.cast(W, tl.int64) * (i * PIXEL) + j * PIXEL
                if POOL:
                    d = gradient(
                        windows, i, j, KH, KW, SH, SW, DH, DW, BLOCK, AFTER, BEFORE, V, VECTOR, CHANNELS_LAST, ACC
                    )
                else:
                    d = load_parts(dy + pixel, first, inside, stride, AFTER, BEFORE, CHANNELS, V, VECTOR, CHANNELS_LAST)
                d = to_planes(d, AFTER, BEFORE, V, VECTOR, CHANNELS_LAST, ACC)
                z = rectified(
                    *(x + pixel, b, first, inside, stride, REACH, REACH, CHANNELS, V, VECTOR, CHANNELS_LAST),
                    *(RELU, NORMALIZED, ACC),
                )
                if LRN:
                    d = normalize_backward(d, z, first, V, BEFORE, AFTER, SCALE, K, QUARTERS, REST, CHANNELS)
                out = ()
                new_total = ()
                for c in tl.static_range(V):
                    value = tl.where(z[REACH + c] <= 0, 0.0, d[c]) if RELU else d[c]
                    out = out + (value,)
                    if LRN and (K <= 0 or SCALE < 0):  # outside of the map d = 0, but s**-beta need not be finite
                        value = tl.where(inside, value, 0.0)
                    new_total = new_total + (total[c] + value,)
                store_planes(dx + pixel, out, first, inside, stride, CHANNELS, VECTOR, CHANNELS_LAST)
                total = new_total
        images -= splits
        at += splits * C * stride
        to += splits * C * (tl.cast(OH, tl.int64) * OW)
    if WITH_BIAS:
        to = address(split, channel, oh, ow, C, rows, columns, True)
        store_planes(sums + to, total, first, None, 1, CHANNELS, VECTOR, CHANNELS_LAST)
