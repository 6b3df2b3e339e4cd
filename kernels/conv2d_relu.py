"""Convolution + bias + ReLU as one matrix product whose left-hand side is never laid out in memory (implicit GEMM).

    z[n, o, oh, ow] = b[o] + sum_{kh, kw, c} w[o, kh, kw, c] * x[n, c, oh*SH - PH + kh*DH, ow*SW - PW + kw*DW]
    y = z if !(z <= 0) else 0                       NaN stays NaN, as in torch
    dz = dy if !(y <= 0) else 0,   db[o] = sum_{n, oh, ow} dz[n, o, oh, ow]

The product has a row for each pixel p = (n, oh, ow), a column for each output o of a group, and sums over
k = (kh, kw, c) in one flat loop, so that a window of three channels still fills the blocks that tensor cores want. C
and OC are the channels and outputs of a group. Sums are in fp32.

Bytes per element: forward reads x and w once (windows overlap in the cache) and writes y once; backward reads dy and y,
or one bit of the mask, and writes dz.
"""

import triton
import triton.language as tl

from .rounding import factor


@triton.jit
def conv2d_relu_kernel(
    x,
    w,
    b,
    y,
    P,
    H,
    W,
    OH,
    OW,
    conv: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``x`` and ``y`` are dense, w is (GROUPS * OC, ROW): a row holds k = (kh, kw, c), then zeros. ``b`` may be None.

    Tiles of ``x`` are [pixels, k] in channels_last and [k, pixels] in NCHW: what is contiguous in memory comes last.
    """
    GROUPS: tl.constexpr = conv.GROUPS
    C: tl.constexpr = conv.C
    OC: tl.constexpr = conv.OC
    PIXELS: tl.constexpr = 0 if CHANNELS_LAST else 1  # their axis in a tile
    OTHER: tl.constexpr = 1 - PIXELS
    K: tl.constexpr = conv.KH * conv.KW * C
    O_BLOCKS: tl.constexpr = (OC + BLOCK_O - 1) // BLOCK_O

    # programs of the same pixels come one after another, so that they find x in the cache
    group = tl.program_id(0) // O_BLOCKS % GROUPS
    p = (tl.program_id(0) // (O_BLOCKS * GROUPS)).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = (tl.program_id(0) % O_BLOCKS).to(INDEX) * BLOCK_O + tl.arange(0, BLOCK_O)
    n, oh, ow = p // (OH * OW), p // OW % OH, p % OW
    first_row, first_column = oh * conv.SH - conv.PH, ow * conv.SW - conv.PW
    if CHANNELS_LAST:
        window = ((n * H + first_row) * W + first_column) * (GROUPS * C) + group * C
        out = p * (GROUPS * OC) + group * OC
    else:
        window = ((n * GROUPS + group) * C * H + first_row) * W + first_column
        out = (n * GROUPS + group) * OC * (OH * OW) + p % (OH * OW)
    first_row, first_column = tl.expand_dims(first_row, OTHER), tl.expand_dims(first_column, OTHER)
    x += tl.expand_dims(window, OTHER)
    of_pixel = tl.expand_dims(p < P, OTHER)
    w += ((group * OC + o) * conv.ROW)[:, None]

    z = tl.zeros((BLOCK_P, BLOCK_O) if CHANNELS_LAST else (BLOCK_O, BLOCK_P), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if C % BLOCK_K == 0:  # the block lies within one element of the window
            tap = start // C
            c = tl.expand_dims(start % C + tl.arange(0, BLOCK_K).to(INDEX), PIXELS)
        else:
            tap = tl.expand_dims(k // C, PIXELS)
            c = tl.expand_dims((k % C).to(INDEX), PIXELS)
        row, column = tap // conv.KW * conv.DH, tap % conv.KW * conv.DW
        inside = of_pixel
        if conv.PH > 0 or conv.PW > 0:
            h, v = first_row + row, first_column + column
            inside = inside & (h >= 0) & (h < H) & (v >= 0) & (v < W)
        if K % BLOCK_K != 0:
            inside = inside & tl.expand_dims(k < K, PIXELS)
        offset = (row * W + column) * (GROUPS * C) + c if CHANNELS_LAST else (c * H + row) * W + column
        x_tile = factor(tl.load(x + offset, mask=inside, other=0.0), PRECISION)
        w_tile = tl.load(w + k[None, :], mask=(o < OC)[:, None] & (k < conv.ROW)[None, :], other=0.0)
        w_tile = factor(w_tile, PRECISION)
        if CHANNELS_LAST:
            z = tl.dot(x_tile, tl.trans(w_tile), z, input_precision=PRECISION)
        else:
            z = tl.dot(w_tile, x_tile, z, input_precision=PRECISION)

    if b is not None:
        z += tl.expand_dims(tl.load(b + group * OC + o, mask=o < OC, other=0.0).to(tl.float32), PIXELS)
    z = tl.where(z <= 0, 0.0, z)
    y += tl.expand_dims(out, OTHER) + tl.expand_dims(o if CHANNELS_LAST else o * (OH * OW), PIXELS)
    tl.store(y, z.to(y.dtype.element_ty), mask=of_pixel & tl.expand_dims(o < OC, PIXELS))


@triton.jit
def bias_relu_kernel(
    y,
    b,
    mask,
    SIZE,
    OC: tl.constexpr,
    AREA: tl.constexpr,
    RECTIFY: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With RECTIFY, in place ``y = relu(y + b)``; and a bit an element in ``mask``: whether ReLU passes the gradient.

    ``y`` is SIZE dense elements, whose channel, one of OC, changes every AREA of them (1 in channels_last). ``b`` and
    ``mask`` may be None. Element i is bit i % 8 of byte i // 8.
    """
    byte = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    i = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    z = tl.load(y + i, mask=i < SIZE, other=0.0)
    if RECTIFY:
        if b is not None:
            z = (z.to(tl.float32) + tl.load(b + i // AREA % OC).to(tl.float32)).to(z.dtype)
        z = tl.where(z <= 0, 0.0, z)
        tl.store(y + i, z, mask=i < SIZE)
    if mask is not None:
        bits = tl.where(z <= 0, 0, 1) << tl.arange(0, 8)[None, :]
        tl.store(mask + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte * 8 < SIZE)


@triton.jit
def mask_backward_kernel(dy, mask, dz, SIZE, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """``dz = dy`` where its bit is set, else 0; both of SIZE dense elements."""
    byte = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    i = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    bits = tl.load(mask + byte, mask=byte * 8 < SIZE, other=0).to(tl.int32)
    passes = (bits[:, None] >> tl.arange(0, 8)[None, :]) & 1
    gradient = tl.load(dy + i, mask=i < SIZE, other=0.0)
    tl.store(dz + i, tl.where(passes != 0, gradient, 0.0), mask=i < SIZE)


@triton.jit
def relu_backward_kernel(
    dy,
    y,
    dz,
    partial,
    N,
    OC,
    AREA,
    STEPS,
    CHANNELS_LAST: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """``dz = dy`` where !(y <= 0), else 0, and the sums of dz by channel, in fp32: a row of ``partial``, (?, OC).

    All are dense. channels_last: N pixels of OC channels, tiles [pixels, channels]. NCHW: N images of OC maps of AREA
    elements, tiles [images, elements] of one channel. A program goes over STEPS tiles, for a whole AREA in NCHW.
    ``partial`` None: no sums.
    """
    COLUMNS: tl.constexpr = BLOCK_COLUMNS if CHANNELS_LAST else 1
    blocks = tl.cdiv(OC, COLUMNS)
    row = tl.program_id(0) // blocks
    first = row.to(INDEX) * STEPS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    channel = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    step = 0
    while step < STEPS:
        n = (first + step * BLOCK_ROWS)[:, None]
        if CHANNELS_LAST:
            tile = _relu_backward_tile(dy, y, dz, n * OC + channel[None, :], (n < N) & (channel < OC)[None, :])
            total += tl.sum(tile, 0)
        else:
            start = tl.cast(0, INDEX)
            while start < AREA:
                i = (start + columns)[None, :]
                tile = _relu_backward_tile(dy, y, dz, (n * OC + channel) * AREA + i, (n < N) & (i < AREA))
                total += tl.sum(tile)
                start += BLOCK_COLUMNS
        step += 1
    if partial is not None:
        tl.store(partial + row * OC + channel, total, mask=channel < OC)


@triton.jit
def _relu_backward_tile(dy, y, dz, i, mask):
    gradient = tl.load(dy + i, mask=mask, other=0.0)
    value = tl.load(y + i, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.where(value <= 0, 0.0, gradient)
    tl.store(dz + i, gradient, mask=mask)
    return gradient.to(tl.float32)


@triton.jit
def bias_gradient_kernel(partial, db, ROWS, OC, BLOCK_ROWS: tl.constexpr, BLOCK_O: tl.constexpr):
    """``db[o]``: the sum of column o of ``partial``, (ROWS, OC), always in the same order."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_O,), tl.float32)
    start = 0
    while start < ROWS:
        row = (start + tl.arange(0, BLOCK_ROWS))[:, None]
        total += tl.sum(tl.load(partial + row * OC + o[None, :], mask=(row < ROWS) & (o < OC)[None, :], other=0.0), 0)
        start += BLOCK_ROWS
    tl.store(db + o, total.to(db.dtype.element_ty), mask=o < OC)
