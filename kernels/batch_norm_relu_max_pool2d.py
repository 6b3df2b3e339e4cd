"""Batch norm, ReLU and max pooling: ``y = max_pool2d(relu((x - mean) * scale + bias))``, or with the ReLU first.

In training forward reads x twice: for sums of parts of each channel, and for y. Backward reads x, dy and the places of
the maxima twice: for the sums of dz and dz * (x - mean), dz being the gradient of what is pooled, and for dx, to which
each element gathers from the windows that hold it.

A tile is BP pixels with BC channels: in channels_last rows of memory, in NCHW pixels of one channel (BC = 1). What is
per channel a program reads once. Sums of parts are added up in float64 and in one order, by a kernel of their own.
"""

import triton
import triton.language as tl

from .rounding import rounded


@triton.jit
def channels_of(program, layout: tl.constexpr):
    """The channels of a program's tiles, and which of them there are: [1, BC]."""
    BC: tl.constexpr = layout.BC
    channel = program * BC + tl.arange(0, BC)[None, :]
    return channel, channel < layout.C


@triton.jit
def pixels_of(first, layout: tl.constexpr):
    """[BP, 1]"""
    BP: tl.constexpr = layout.BP
    return first + tl.arange(0, BP).to(layout.INDEX)[:, None]


@triton.jit
def address(n, pixel, channel, pixels, layout: tl.constexpr):
    """Where an element of a map of so many pixels is in memory."""
    if layout.CHANNELS_LAST:
        return (n.to(tl.int64) * pixels + pixel) * layout.C + channel
    else:
        return (n.to(tl.int64) * layout.C + channel) * pixels + pixel


@triton.jit
def per_channel(values, channel, inside, other, layout: tl.constexpr):
    """Of each channel of a tile; ``other`` where there are no values."""
    if values is None:
        return tl.full(channel.shape, other, layout.ACC)
    else:
        return tl.load(values + channel, mask=inside, other=other).to(layout.ACC)


@triton.jit
def scale_of(var, weight, channel, inside, EPS: tl.constexpr, layout: tl.constexpr):
    """``weight / sqrt(var + EPS)``"""
    inverse = 1 / tl.sqrt(per_channel(var, channel, inside, 1.0, layout) + EPS)
    return inverse * per_channel(weight, channel, inside, 1.0, layout)


@triton.jit
def rectified(x):
    return tl.where(x < 0, 0.0, x)  # NaN stays


@triton.jit
def batch_norm_statistics_kernel(x, sums, batch, pixels, parts, tiles, RELU_FIRST: tl.constexpr, layout: tl.constexpr):
    """Of each part, ``tiles`` tiles of a channel, its pixels, their mean and sum of squared differences from it."""
    BP: tl.constexpr = layout.BP
    BC: tl.constexpr = layout.BC
    part = tl.program_id(0) % parts
    channel, inside = channels_of(tl.program_id(0) // parts, layout)
    count = batch * pixels.to(layout.INDEX)
    first = part.to(layout.INDEX) * tiles * BP
    near = tl.zeros([1, BC], layout.ACC)
    total = tl.zeros([BP, BC], layout.ACC)
    squares = tl.zeros([BP, BC], layout.ACC)
    tile = 0
    while tile < tiles:
        j = pixels_of(first + tile * BP, layout)
        mask = (j < count) & inside
        n = j // pixels
        value = tl.load(x + address(n, j - n * pixels, channel, pixels, layout), mask=mask, other=0.0).to(layout.ACC)
        value = rectified(value) if RELU_FIRST else value
        if tile == 0:  # differences from a number close to the mean lose little
            near = tl.sum(value, 0)[None, :] / tl.minimum(count - first, BP).to(layout.ACC)
        difference = tl.where(mask, value - near, 0.0)
        total += difference
        squares += difference * difference
        tile += 1
    many = tl.minimum(count - first, tl.cast(tiles, layout.INDEX) * BP).to(tl.float64)
    total = tl.sum(total, 0)[None, :].to(tl.float64)
    squares = tl.sum(squares, 0)[None, :].to(tl.float64)
    to = sums + part * layout.C + channel
    tl.store(to, near + total / many, mask=inside)
    tl.store(to + parts * layout.C, squares - total * total / many, mask=inside)


@triton.jit
def batch_norm_mean_kernel(sums, mean, var, batch, pixels, parts, tiles, layout: tl.constexpr):
    """Mean and variance of each channel from those of its parts, as Chan, Golub and LeVeque (1979) join two."""
    BP: tl.constexpr = layout.BP
    channel, inside = channels_of(tl.program_id(0), layout)
    all = batch * pixels.to(tl.float64)
    size = tl.cast(tiles, tl.float64) * BP
    centre = tl.load(sums + channel, mask=inside, other=0.0)
    squares = tl.load(sums + parts * layout.C + channel, mask=inside, other=0.0)
    count = tl.minimum(all, size)
    part = 1
    while part < parts:
        more = tl.minimum(all - part * size, size)
        at = sums + part * layout.C + channel
        difference = tl.load(at, mask=inside, other=0.0) - centre
        share = more / (count + more)
        centre += difference * share
        squares += tl.load(at + parts * layout.C, mask=inside, other=0.0) + difference * difference * (count * share)
        count += more
        part += 1
    tl.store(mean + channel, centre, mask=inside)
    tl.store(var + channel, squares / all, mask=inside)


@triton.jit
def batch_norm_relu_max_pool2d_forward_kernel(
    x,
    mean,
    var,
    weight,
    bias,
    y,
    argmax,
    batch,
    H,
    W,
    OH,
    OW,
    blocks,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    RELU_FIRST: tl.constexpr,
    pool: tl.constexpr,
    layout: tl.constexpr,
):
    """y, and the places of the maxima unless ``argmax`` is None. A tile is of outputs."""
    BP: tl.constexpr = layout.BP
    BC: tl.constexpr = layout.BC
    channel, inside = channels_of(tl.program_id(0) // blocks, layout)
    centre = per_channel(mean, channel, inside, 0.0, layout)
    scale = scale_of(var, weight, channel, inside, EPS, layout)
    shift = per_channel(bias, channel, inside, 0.0, layout)
    j = pixels_of((tl.program_id(0) % blocks).to(layout.INDEX) * BP, layout)
    outputs = OH * OW
    n = j // outputs
    pixel = j - n * outputs
    oh = pixel // OW
    ow = pixel - oh * OW
    exists = (n < batch) & inside
    best = tl.full([BP, BC], float("-inf"), layout.ACC)
    place = tl.zeros([BP, BC], tl.int32)
    empty = tl.full([BP, 1], 1, tl.int1)
    kh = 0
    while kh < pool.KH:
        h = oh * pool.SH - pool.PH + kh * pool.DH
        kw = 0
        while kw < pool.KW:
            w = ow * pool.SW - pool.PW + kw * pool.DW
            seen = (h >= 0) & (h < H) & (w >= 0) & (w < W)
            at = address(n, h * W + w, channel, H * W, layout)
            value = tl.load(x + at, mask=seen & exists, other=0.0).to(layout.ACC)
            value = rectified(value) if RELU_FIRST else value
            z = (value - centre) * scale + shift
            z = rectified(z) if RELU else z
            better = seen & (empty | (z > best) | (z != z))
            best = tl.where(better, z, best)
            place = tl.where(better, kh * pool.KW + kw, place)
            empty = empty & (seen == 0)
            kw += 1
        kh += 1
    to = address(n, pixel, channel, outputs, layout)
    tl.store(y + to, rounded(best, y.dtype.element_ty), mask=exists)
    if argmax is not None:
        tl.store(argmax + to, place, mask=exists)


@triton.jit
def gradient(
    x, dy, argmax, centre, scale, shift, n, h, w, channel, exists, H, W, OH, OW,
    RELU: tl.constexpr, RELU_FIRST: tl.constexpr, pool: tl.constexpr, layout: tl.constexpr,
):  # fmt: skip
    """Of a tile of inputs: x, x - mean, and dz, gathered from the windows whose maximum each was."""
    BP: tl.constexpr = layout.BP
    BC: tl.constexpr = layout.BC
    pixel = h * W + w
    value = tl.load(x + address(n, pixel, channel, H * W, layout), mask=exists, other=0.0).to(layout.ACC)
    difference = (rectified(value) if RELU_FIRST else value) - centre
    if argmax is None:
        dz = tl.load(dy + address(n, pixel, channel, H * W, layout), mask=exists, other=0.0).to(layout.ACC)
    else:
        dz = tl.zeros([BP, BC], layout.ACC)
        kh = 0
        while kh < pool.KH:
            row = h + pool.PH - kh * pool.DH
            oh = row // pool.SH
            kw = 0
            while kw < pool.KW:
                column = w + pool.PW - kw * pool.DW
                ow = column // pool.SW
                starts = (oh * pool.SH == row) & (ow * pool.SW == column)
                mask = exists & starts & (row >= 0) & (column >= 0) & (oh < OH) & (ow < OW)
                at = address(n, oh * OW + ow, channel, OH * OW, layout)
                mine = mask & (tl.load(argmax + at, mask=mask, other=0) == kh * pool.KW + kw)
                dz += tl.load(dy + at, mask=mine, other=0.0).to(layout.ACC)
                kw += 1
            kh += 1
    if RELU:
        dz = tl.where(difference * scale + shift <= 0, 0.0, dz)
    return value, difference, dz


@triton.jit
def batch_norm_sums_kernel(
    x,
    dy,
    argmax,
    mean,
    var,
    weight,
    bias,
    sums,
    batch,
    H,
    W,
    OH,
    OW,
    parts,
    tiles,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    RELU_FIRST: tl.constexpr,
    pool: tl.constexpr,
    layout: tl.constexpr,
):
    """Of each part, ``tiles`` tiles of a channel, the sums of dz and of dz * (x - mean)."""
    BP: tl.constexpr = layout.BP
    BC: tl.constexpr = layout.BC
    part = tl.program_id(0) % parts
    channel, inside = channels_of(tl.program_id(0) // parts, layout)
    centre = per_channel(mean, channel, inside, 0.0, layout)
    scale = scale_of(var, weight, channel, inside, EPS, layout)
    shift = per_channel(bias, channel, inside, 0.0, layout)
    first = part.to(layout.INDEX) * tiles * BP
    total = tl.zeros([BP, BC], layout.ACC)
    products = tl.zeros([BP, BC], layout.ACC)
    tile = 0
    while tile < tiles:
        j = pixels_of(first + tile * BP, layout)
        n = j // (H * W)
        pixel = j - n * (H * W)
        h = pixel // W
        exists = (n < batch) & inside
        _value, difference, dz = gradient(
            x, dy, argmax, centre, scale, shift, n, h, pixel - h * W, channel, exists, H, W, OH, OW,
            RELU, RELU_FIRST, pool, layout,
        )  # fmt: skip
        total += tl.where(exists, dz, 0.0)
        products += tl.where(exists, dz * difference, 0.0)
        tile += 1
    to = sums + part * layout.C + channel
    tl.store(to, tl.sum(total, 0)[None, :].to(tl.float64), mask=inside)
    tl.store(to + parts * layout.C, tl.sum(products, 0)[None, :].to(tl.float64), mask=inside)


@triton.jit
def batch_norm_gradients_kernel(
    sums, var, dweight, dbias, terms, count, parts, EPS: tl.constexpr, layout: tl.constexpr
):
    """The gradients of weight and bias, and the two ``terms`` of dx, without its scale, which the sums make."""
    channel, inside = channels_of(tl.program_id(0), layout)
    total = tl.zeros(channel.shape, tl.float64)
    products = tl.zeros(channel.shape, tl.float64)
    part = 0
    while part < parts:
        at = sums + part * layout.C + channel
        total += tl.load(at, mask=inside, other=0.0)
        products += tl.load(at + parts * layout.C, mask=inside, other=0.0)
        part += 1
    inverse = 1 / tl.sqrt(tl.load(var + channel, mask=inside, other=1.0).to(tl.float64) + EPS)
    if dweight is not None:
        tl.store(dweight + channel, rounded((products * inverse).to(layout.ACC), dweight.dtype.element_ty), mask=inside)
    if dbias is not None:
        tl.store(dbias + channel, rounded(total.to(layout.ACC), dbias.dtype.element_ty), mask=inside)
    tl.store(terms + channel, -total / count, mask=inside)
    tl.store(terms + layout.C + channel, -products * inverse * inverse / count, mask=inside)


@triton.jit
def batch_norm_relu_max_pool2d_backward_kernel(
    x,
    dy,
    argmax,
    mean,
    var,
    weight,
    bias,
    terms,
    dx,
    batch,
    H,
    W,
    OH,
    OW,
    blocks,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    RELU_FIRST: tl.constexpr,
    pool: tl.constexpr,
    layout: tl.constexpr,
):
    """dx; ``terms`` is None in evaluation. A tile is of inputs."""
    BP: tl.constexpr = layout.BP
    channel, inside = channels_of(tl.program_id(0) // blocks, layout)
    centre = per_channel(mean, channel, inside, 0.0, layout)
    scale = scale_of(var, weight, channel, inside, EPS, layout)
    shift = per_channel(bias, channel, inside, 0.0, layout)
    j = pixels_of((tl.program_id(0) % blocks).to(layout.INDEX) * BP, layout)
    n = j // (H * W)
    pixel = j - n * (H * W)
    h = pixel // W
    exists = (n < batch) & inside
    value, difference, dz = gradient(
        x, dy, argmax, centre, scale, shift, n, h, pixel - h * W, channel, exists, H, W, OH, OW,
        RELU, RELU_FIRST, pool, layout,
    )  # fmt: skip
    if terms is not None:
        offset = per_channel(terms, channel, inside, 0.0, layout)
        dz += offset + per_channel(terms + layout.C, channel, inside, 0.0, layout) * difference
    result = scale * dz
    if RELU_FIRST:
        result = tl.where(value <= 0, 0.0, result)
    tl.store(dx + address(n, pixel, channel, H * W, layout), rounded(result, dx.dtype.element_ty), mask=exists)
