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
    RELU: tl.constexpr,
    NORMALIZED: tl.constexpr,
    layout: tl.constexpr,
):
    """``relu(x + bias)``, in planes; ``bias`` is in parts, or an empty tuple."""
    x = load_parts(pointers, first, mask, stride, BEFORE, AFTER, layout)
    parts = ()
    for i in tl.static_range(len(x)):
        parts = parts + (rectified_part(x[i], bias[i : i + 1], RELU, NORMALIZED, layout.ACC),)
    return to_planes(parts, BEFORE, AFTER, layout)


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
    RELU: tl.constexpr,
    lrn: tl.constexpr,
    pool: tl.constexpr,
    layout: tl.constexpr,
    R: tl.constexpr,
    EXCHANGED: tl.constexpr,
):
    """For V channels of each of R windows from column w on: the maximum over their columns of row h, its number kw.

    In parts. The pointers are to element (h, w), which may be outside of the map. With EXCHANGED a lane normalizes SW
    columns, and the next column comes from the next lane. Where a row ends before w + SW, the pointers are ``shift``
    columns earlier, so that all SW columns exist.
    """
    LAST: tl.constexpr = layout.CHANNELS_LAST
    KW: tl.constexpr = pool.KW
    SW: tl.constexpr = pool.SW
    VECTORS: tl.constexpr = layout.V // layout.VECTOR
    BEFORE: tl.constexpr = 0 if lrn is None else lrn.BEFORE
    AFTER: tl.constexpr = 0 if lrn is None else lrn.AFTER
    START: tl.constexpr = 0.0 if lrn is None else start(lrn.K, lrn.SCALE, lrn.QUARTERS, lrn.REST)
    values = ()
    stride = tl.cast(H, tl.int64) * W
    for j in tl.static_range(SW if EXCHANGED else (R - 1) * SW + KW):
        column = w + j * pool.DW
        inside = (column >= 0) & (column < W) & (h >= 0) & (h < H) if pool.PADDED else None
        at = pointers + j * pool.DW * layout.PIXEL
        z = rectified(at, bias, first, inside, stride, BEFORE, AFTER, RELU, START != 0, layout)
        own = to_parts(z[BEFORE : BEFORE + layout.V], layout)
        if lrn is not None:
            sums = to_parts(window_sums(z, BEFORE + 1 + AFTER, True, START), layout)
        for i in tl.static_range(VECTORS):
            value = own[i]
            if lrn is not None:
                p, _ = powers(sums[i] if START != 0 else lrn.K + lrn.SCALE * sums[i], lrn)
                value *= p
            if pool.PADDED:
                value = tl.where(inside[:, None] if LAST else inside, value, float("-inf"))
            values = values + (value,)
    if EXCHANGED:
        for i in tl.static_range(VECTORS):
            edge = values[i]
            for j in tl.static_range(1, 1 if pool.PADDED else SW):
                edge = tl.where(shift == j, values[j * VECTORS + i], edge)
            values = values + (of_next_lane(edge),)
    best = ()
    place = ()
    for r in tl.static_range(R):
        for i in tl.static_range(VECTORS):
            value = values[r * SW * VECTORS + i]
            kw = tl.zeros(value.shape, tl.int32)
            if pool.PADDED:
                before = first_inside(w + r * SW, pool.DW).to(tl.int32)
                kw += before[:, None] if LAST else before
            for j in tl.static_range(1, KW):
                value, kw = take(value, kw, values[(r * SW + j) * VECTORS + i], j)
            best = best + (value,)
            place = place + (kw,)
    return best, place


@triton.jit
def relu_lrn_max_pool2d_forward_kernel(
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
    RELU: tl.constexpr,
    lrn: tl.constexpr,
    pool: tl.constexpr,
    layout: tl.constexpr,
    R: tl.constexpr,
    EXCHANGED: tl.constexpr,
):
    """A program walks down ``run`` rows of outputs with all its lanes; at the end of a map it goes on in another.

    ``rows`` is the total for all programs. ``bias``, ``argmax`` and ``lrn`` may be None.
    """
    BEFORE: tl.constexpr = 0 if lrn is None else lrn.BEFORE
    AFTER: tl.constexpr = 0 if lrn is None else lrn.AFTER
    KH: tl.constexpr = pool.KH
    VECTORS: tl.constexpr = layout.V // layout.VECTOR
    SHARED: tl.constexpr = KH - pool.SH if pool.DH == 1 and KH > pool.SH else 0  # rows of a window and of the next one
    down = tl.cast(W, tl.int64) * layout.PIXEL  # from a row of x to the next
    down_y = tl.cast(OW, tl.int64) * layout.PIXEL
    stride_y = tl.cast(OH, tl.int64) * OW
    row = tl.program_id(0).to(layout.INDEX) * run
    end = tl.minimum(row + run, rows)
    while row < end:
        lane = block_of_lanes(row // OH, layout)
        if EXCHANGED:
            n, _, left, channel, first = lanes(lane // 32 * 31 + lane % 32, batch, 1, OW + 1, layout)
            stored = (left < OW) & (lane % 32 != 31)
        else:
            n, _, block, channel, first = lanes(lane, batch, 1, (OW + (R - 1)) // R, layout)
            left = tl.minimum(block * R, OW - R)
            stored = None
        done = (row % OH).to(tl.int32)  # of the rows of these maps
        oh = done + tl.zeros(lane.shape, tl.int32)
        h, w = oh * pool.SH - pool.PH, left * pool.SW - pool.PW
        shift = tl.maximum(w + pool.SW - W, 0) if EXCHANGED and not pool.PADDED else 0
        at = address(n, channel, h, w - shift, H, W, layout)
        to = address(n, channel, oh, left, OH, OW, layout)
        b = ()
        if bias is not None:
            b = load_parts(bias + channel, first, None, 1, BEFORE, AFTER, layout)
        values = ()
        places = ()
        for i in tl.static_range(SHARED):
            best, place = row_maxima(
                x + at + i * down, b, first, shift, h + i, w, H, W, RELU, lrn, pool, layout, R, EXCHANGED
            )
            values = values + best
            places = places + place
        last = tl.minimum(row + (OH - done), end)
        while row < last:
            for i in tl.static_range(SHARED, KH):
                below = opaque(at + i * pool.DH * down, layout.CHANNELS_LAST)
                best, place = row_maxima(
                    x + below, b, first, shift, h + i * pool.DH, w, H, W, RELU, lrn, pool, layout, R, EXCHANGED
                )
                values = values + best
                places = places + place
            for r in tl.static_range(R):
                maxima = ()
                argmaxima = ()
                for v in tl.static_range(r * VECTORS, r * VECTORS + VECTORS):
                    value, k = values[v], places[v]
                    if pool.PADDED:
                        above = first_inside(h, pool.DH).to(tl.int32) * pool.KW
                        k += above[:, None] if layout.CHANNELS_LAST else above
                    for i in tl.static_range(1, KH):
                        at_place = i * pool.KW + places[i * R * VECTORS + v]
                        value, k = take(value, k, values[i * R * VECTORS + v], at_place)
                    if lrn is not None:
                        value = value * unscaled(lrn.K, lrn.SCALE, lrn.QUARTERS, lrn.REST)
                    maxima = maxima + (value,)
                    argmaxima = argmaxima + (k,)
                pixel = opaque(to, layout.CHANNELS_LAST) + r * layout.PIXEL
                store_parts(y + pixel, maxima, first, stored, stride_y, layout)
                if argmax is not None:
                    store_parts(argmax + pixel, argmaxima, first, stored, stride_y, layout)
            values = values[(KH - SHARED) * R * VECTORS :]
            places = places[(KH - SHARED) * R * VECTORS :]
            row += 1
            h += pool.SH
            at += pool.SH * down
            to += down_y


@triton.jit
def relu_lrn_max_pool2d_backward_kernel(
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
    RELU: tl.constexpr,
    lrn: tl.constexpr,
    pool: tl.constexpr,
    layout: tl.constexpr,
):
    """A lane does one block in the images split, split + splits, ... and leaves its sums of dx, for the bias, in sums.

    They have the shape (splits, rows, columns, C). ``bias``, ``argmax`` (no pooling) and ``lrn`` may be None.
    """
    BEFORE: tl.constexpr = 0 if lrn is None else lrn.BEFORE
    AFTER: tl.constexpr = 0 if lrn is None else lrn.AFTER
    REACH: tl.constexpr = BEFORE + AFTER
    V: tl.constexpr = layout.V
    SH: tl.constexpr = pool.SH
    SW: tl.constexpr = pool.SW
    NORMALIZED: tl.constexpr = lrn is not None and start(lrn.K, lrn.SCALE, lrn.QUARTERS, lrn.REST) != 0
    # Outside of the map d = 0, but s**-beta need not be finite.
    UNBOUNDED: tl.constexpr = lrn is not None and (lrn.K <= 0 or lrn.SCALE < 0)
    rows, columns = (H + (pool.PH + SH - 1)) // SH, (W + (pool.PW + SW - 1)) // SW
    lane = block_of_lanes(tl.program_id(0), layout)
    split, oh, ow, channel, first = lanes(lane, splits, rows, columns, layout)
    b = ()
    if bias is not None:
        b = load_parts(bias + channel, first, None, 1, REACH, REACH, layout)
    stride = tl.cast(H, tl.int64) * W
    top, left = oh * SH - pool.PH, ow * SW - pool.PW
    at = address(split, channel, top, left, H, W, layout)
    to = address(split, channel, oh, ow, OH, OW, layout)
    total = (tl.zeros(lane.shape, layout.ACC),) * V
    images = batch  # left to do
    while images > 0:
        mine = split < images
        if argmax is not None:
            window = opaque(to, layout.CHANNELS_LAST)
            windows = load_windows(
                dy + window, argmax + window, first, oh, ow, mine, OH, OW, AFTER, BEFORE, pool, layout
            )
        block = opaque(at, layout.CHANNELS_LAST)
        for i in tl.static_range(SH):
            for j in tl.static_range(SW):
                h, w = top + i, left + j
                inside = mine & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                pixel = block + tl.cast(W, tl.int64) * (i * layout.PIXEL) + j * layout.PIXEL
                if argmax is not None:
                    d = gradient(windows, i, j, AFTER, BEFORE, pool, layout)
                else:
                    d = load_parts(dy + pixel, first, inside, stride, AFTER, BEFORE, layout)
                d = to_planes(d, AFTER, BEFORE, layout)
                z = rectified(x + pixel, b, first, inside, stride, REACH, REACH, RELU, NORMALIZED, layout)
                if lrn is not None:
                    d = normalize_backward(d, z, first, lrn, layout)
                out = ()
                new_total = ()
                for c in tl.static_range(V):
                    value = tl.where(z[REACH + c] <= 0, 0.0, d[c]) if RELU else d[c]
                    out = out + (value,)
                    if UNBOUNDED:
                        value = tl.where(inside, value, 0.0)
                    new_total = new_total + (total[c] + value,)
                store_planes(dx + pixel, out, first, inside, stride, layout)
                total = new_total
        images -= splits
        at += splits * layout.C * stride
        to += splits * layout.C * (tl.cast(OH, tl.int64) * OW)
    if bias is not None:
        at_sums = ((split.to(tl.int64) * rows + oh) * columns + ow) * layout.C + channel
        store_planes(sums + at_sums, total, first, None, 1, layout)
