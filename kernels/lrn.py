"""Local response normalization: ``y = x * s**-beta`` with ``s = k + scale * sum(x**2)`` over the window of channels.

``scale = alpha / size``. Backward: ``dx = dy * s**-beta - 2 * scale * beta * x * sum(t)`` with ``t = dy * x *
s**(-beta-1)``, summed over the windows that hold the channel. Forward moves 2 elements an element, x and y; backward 3,
x, dy and dx.

A lane of a program owns one pixel and ``V`` channels, each channel a tensor of its own over the lanes (a *plane*), so
that a window sum adds registers and nothing is shared between lanes. Each lane also loads the few planes on both sides
that its windows reach; they are in the cache, because the neighbouring lane or program owns them.

- channels_last: consecutive lanes own consecutive channels, in vectors of 16 bytes where the channels of a group are a
  multiple of that. No lane idles, whatever C.
- NCHW: consecutive lanes own consecutive pixels, so that every plane is one coalesced load.
"""

import triton
import triton.language as tl

from .packed import widened
from .rounding import rounded


@triton.jit
def split(x, V: tl.constexpr):
    """The V columns of ``x``."""
    if V == 1:
        return (tl.reshape(x, [x.shape[0]]),)
    elif V == 2:
        return tl.split(x)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], V // 2, 2]))
        evens, odds = split(even, V // 2), split(odd, V // 2)
        columns = ()
        for i in tl.static_range(V // 2):
            columns = columns + (evens[i], odds[i])
        return columns


@triton.jit
def join(columns, V: tl.constexpr):
    """The inverse of :func:`split`; V is a power of 2."""
    if V == 1:
        return tl.reshape(columns[0], [columns[0].shape[0], 1])
    elif V == 2:
        return tl.join(columns[0], columns[1])
    else:
        both = tl.join(join(columns[0::2], V // 2), join(columns[1::2], V // 2))
        return tl.reshape(both, [columns[0].shape[0], V])


@triton.constexpr_function
def width(channels, V):
    """Of the vectors in which so many neighbouring channels are loaded: a power of 2, at most V."""
    return min(V, 1 << max(channels - 1, 0).bit_length())


@triton.jit
def in_group(first, mask, OFFSET: tl.constexpr, layout: tl.constexpr):
    """Whether channel ``first + OFFSET`` is in the lane's group and ``mask`` is true: one condition, in a tuple.

    The tuple is empty where that is always so. Offsets 0 ... V - 1 are the lane's own channels; None is no mask.
    """
    conditions = () if mask is None else (mask,)
    if OFFSET < 0:
        conditions = conditions + (first + OFFSET >= 0,)
    elif OFFSET >= layout.V or layout.CHANNELS % layout.V != 0:
        conditions = conditions + (first + OFFSET < layout.CHANNELS,)
    if len(conditions) == 2:
        return (conditions[0] & conditions[1],)
    else:
        return conditions


@triton.jit
def load_vector(
    pointers, first, mask, OFFSET: tl.constexpr, WIDTH: tl.constexpr, layout: tl.constexpr, OTHER: tl.constexpr
):
    """Channels ``first + OFFSET`` and following; all of them are inside the group, or none."""
    pointers = (pointers + OFFSET)[:, None] + tl.arange(0, WIDTH)[None, :]
    inside = in_group(first, mask, OFFSET, layout)
    if len(inside) == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, inside[0][:, None], OTHER)


@triton.jit
def load_parts(
    pointers,
    first,
    mask,
    stride,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    layout: tl.constexpr,
    OTHER: tl.constexpr = 0.0,
):
    """What holds channels ``first - BEFORE ... first + V - 1 + AFTER`` of each lane; OTHER outside its group.

    Where channels are last, vectors of VECTOR channels between vectors of their neighbours; else planes. The pointers
    are to the lane's first own channel, ``first`` is its number among the CHANNELS of its group.
    """
    V: tl.constexpr = layout.V
    VECTOR: tl.constexpr = layout.VECTOR
    parts = ()
    if layout.CHANNELS_LAST:
        BEHIND: tl.constexpr = width(BEFORE, VECTOR)
        AHEAD: tl.constexpr = width(AFTER, VECTOR)
        for i in tl.static_range(-((BEFORE + BEHIND - 1) // BEHIND), 0):
            parts = parts + (load_vector(pointers, first, mask, i * BEHIND, BEHIND, layout, OTHER),)
        for i in tl.static_range(V // VECTOR):
            parts = parts + (load_vector(pointers, first, mask, i * VECTOR, VECTOR, layout, OTHER),)
        for i in tl.static_range((AFTER + AHEAD - 1) // AHEAD):
            parts = parts + (load_vector(pointers, first, mask, V + i * AHEAD, AHEAD, layout, OTHER),)
    else:
        for i in tl.static_range(-BEFORE, V + AFTER):
            inside = in_group(first, mask, i, layout)
            if len(inside) == 0:
                parts = parts + (tl.load(pointers + i * stride),)
            else:
                parts = parts + (tl.load(pointers + i * stride, inside[0], OTHER),)
    return parts


@triton.jit
def zero_parts(BEFORE: tl.constexpr, AFTER: tl.constexpr, layout: tl.constexpr):
    """Zeros, as many and of the same shapes as :func:`load_parts` gives."""
    BLOCK: tl.constexpr = layout.BLOCK
    VECTOR: tl.constexpr = layout.VECTOR
    if layout.CHANNELS_LAST:
        BEHIND: tl.constexpr = width(BEFORE, VECTOR)
        AHEAD: tl.constexpr = width(AFTER, VECTOR)
        behind = (tl.zeros([BLOCK, BEHIND], layout.ACC),) * ((BEFORE + BEHIND - 1) // BEHIND)
        ahead = (tl.zeros([BLOCK, AHEAD], layout.ACC),) * ((AFTER + AHEAD - 1) // AHEAD)
        return behind + (tl.zeros([BLOCK, VECTOR], layout.ACC),) * (layout.V // VECTOR) + ahead
    else:
        return (tl.zeros([BLOCK], layout.ACC),) * (BEFORE + layout.V + AFTER)


@triton.jit
def to_planes(parts, BEFORE: tl.constexpr, AFTER: tl.constexpr, layout: tl.constexpr):
    """The planes, in ACC, of parts that :func:`load_parts` gave."""
    planes = ()
    for i in tl.static_range(len(parts)):
        part = widened(parts[i], layout.ACC)
        planes = planes + (split(part, part.shape[1]) if layout.CHANNELS_LAST else (part,))
    if layout.CHANNELS_LAST:
        SKIPPED: tl.constexpr = -BEFORE % width(BEFORE, layout.VECTOR)
        planes = planes[SKIPPED : SKIPPED + BEFORE + layout.V + AFTER]
    return planes


@triton.jit
def store_parts(pointers, parts, first, mask, stride, layout: tl.constexpr):
    """Store each lane's own channels: vectors, or planes."""
    for i in tl.static_range(len(parts)):
        part = rounded(parts[i], pointers.dtype.element_ty)
        inside = in_group(first, mask, i * part.shape[1] if layout.CHANNELS_LAST else i, layout)
        if layout.CHANNELS_LAST:
            to = (pointers + i * part.shape[1])[:, None] + tl.arange(0, part.shape[1])[None, :]
            tl.store(to, part, None if len(inside) == 0 else inside[0][:, None])
        else:
            tl.store(pointers + i * stride, part, None if len(inside) == 0 else inside[0])


@triton.jit
def to_parts(planes, layout: tl.constexpr):
    """The inverse of :func:`to_planes`, without neighbours and in the planes' dtype."""
    VECTOR: tl.constexpr = layout.VECTOR
    parts = ()
    if layout.CHANNELS_LAST:
        for i in tl.static_range(len(planes) // VECTOR):
            parts = parts + (join(planes[i * VECTOR : i * VECTOR + VECTOR], VECTOR),)
    else:
        parts = planes
    return parts


@triton.jit
def store_planes(pointers, planes, first, mask, stride, layout: tl.constexpr):
    """Store each lane's own channels."""
    store_parts(pointers, to_parts(planes, layout), first, mask, stride, layout)


@triton.jit
def powers(s, lrn: tl.constexpr):
    """``s**-beta`` and ``1/s``, where beta is QUARTERS/4 + REST: without REST no power is computed.

    Both parts have one sign, so that no 0 meets an infinity.
    """
    QUARTERS: tl.constexpr = lrn.QUARTERS
    r = 1 / tl.sqrt(s) if s.dtype == tl.float64 else tl.rsqrt(s)
    half = r if QUARTERS > 0 else tl.sqrt(s)
    p = tl.full(s.shape, 1, s.dtype)
    if QUARTERS % 2 != 0:
        p = tl.sqrt(half)
    for _ in tl.static_range((QUARTERS if QUARTERS > 0 else -QUARTERS) // 2):
        p = p * half
    if lrn.REST != 0:
        p = p * tl.exp2(-lrn.REST * tl.log2(s))
    return p, r * r


@triton.jit
def plus(total, x, SQUARES: tl.constexpr):
    """The total and ``x``, or its square, in a tuple; a tuple without a total stands for 0."""
    term = x * x if SQUARES else x
    return (total[0] + term,) if len(total) > 0 else (term,)


@triton.jit
def window_sums(x, SIZE: tl.constexpr, SQUARES: tl.constexpr, START: tl.constexpr = 0.0):
    """START plus the sum of each window of SIZE neighbouring planes, or of their squares.

    Windows 2i and 2i + 1 share all planes but their outermost, which are added up once, in pairs that further windows
    share. START is in one of the pairs of each window.
    """
    PAIRS: tl.constexpr = (SIZE - 1) // 2
    pairs = ()
    for i in tl.static_range((len(x) - 1) // 2):
        first = (START,) if START != 0 and PAIRS > 0 and i % PAIRS == 0 else ()
        pairs = pairs + plus(plus(first, x[2 * i + 1], SQUARES), x[2 * i + 2], SQUARES)
    sums = ()
    for i in tl.static_range(0, len(x) - SIZE + 1, 2):
        inner = (START,) if START != 0 and PAIRS == 0 else ()
        for j in tl.static_range(PAIRS):
            inner = plus(inner, pairs[i // 2 + j], False)
        if SIZE % 2 == 0:
            inner = plus(inner, x[i + SIZE - 1], SQUARES)
        sums = sums + plus(inner, x[i], SQUARES)
        if i + SIZE < len(x):
            sums = sums + plus(inner, x[i + SIZE] if SIZE > 1 else x[i + 1], SQUARES)
    return sums


@triton.jit
def normalize(x, lrn: tl.constexpr):
    """The channels of y from those of x and BEFORE and AFTER neighbours."""
    y = ()
    sums = window_sums(x, lrn.BEFORE + 1 + lrn.AFTER, True)
    for c in tl.static_range(len(sums)):
        p, _ = powers(lrn.K + lrn.SCALE * sums[c], lrn)
        y = y + (x[lrn.BEFORE + c] * p,)
    return y


@triton.jit
def normalize_backward(dy, x, first, lrn: tl.constexpr, layout: tl.constexpr):
    """The channels of dx from those of dy with AFTER and BEFORE neighbours, of x with BEFORE + AFTER on both sides."""
    V: tl.constexpr = layout.V
    REACH: tl.constexpr = lrn.BEFORE + lrn.AFTER
    t = ()
    direct = ()
    sums = window_sums(x, REACH + 1, True)
    for c in tl.static_range(V + REACH):
        p, over_s = powers(lrn.K + lrn.SCALE * sums[c], lrn)
        scaled = dy[c] * p
        ratio = scaled * (x[c + lrn.BEFORE] * over_s)
        if lrn.K <= 0 or lrn.SCALE < 0:  # outside of the group dy = 0, but 1/s need not be finite
            channel = first + c - lrn.AFTER
            ratio = tl.where((channel >= 0) & (channel < layout.CHANNELS), ratio, 0.0)
        t = t + (ratio,)
        direct = direct + (scaled,)
    dx = ()
    sums = window_sums(t, REACH + 1, False)
    for c in tl.static_range(V):
        dx = dx + (direct[c + lrn.AFTER] - slope(lrn.SCALE, lrn.QUARTERS, lrn.REST) * x[c + REACH] * sums[c],)
    return dx


@triton.constexpr_function
def slope(SCALE, QUARTERS, REST):
    """What the gradient through s has as a factor: ``2 * SCALE * beta``."""
    return 2 * SCALE * (QUARTERS / 4 + REST)


@triton.jit
def lanes(pixels, S, layout: tl.constexpr):
    """What each lane owns: ``at`` in memory, and ``first`` channel in its group; lanes past the end repeat the last."""
    V: tl.constexpr = layout.V
    PARTS: tl.constexpr = (layout.CHANNELS + V - 1) // V  # of a group
    TOTAL: tl.constexpr = layout.C // layout.CHANNELS * PARTS
    pid = tl.program_id(0).to(layout.INDEX)
    if layout.CHANNELS_LAST:
        lane = pid * layout.BLOCK + tl.arange(0, layout.BLOCK)
        lane = tl.minimum(lane, tl.cast(pixels, layout.INDEX) * TOTAL - 1)
        return lane.to(tl.int64) * V, lane % PARTS * V
    else:
        part = (pid % TOTAL).to(tl.int32)
        first = part % PARTS * V
        pixel = tl.minimum(pid // TOTAL * layout.BLOCK + tl.arange(0, layout.BLOCK), pixels - 1)
        n = pixel // S
        at = (n.to(tl.int64) * layout.C + (part // PARTS * layout.CHANNELS + first)) * S + (pixel - n * S)
        return at, first + tl.zeros(pixel.shape, tl.int32)


@triton.jit
def lrn_forward_kernel(x, y, pixels, S, lrn: tl.constexpr, layout: tl.constexpr):
    """y of ``pixels`` pixels, S in an image; all are dense."""
    at, first = lanes(pixels, S, layout)
    stride = tl.cast(S, tl.int64)
    parts = load_parts(x + at, first, None, stride, lrn.BEFORE, lrn.AFTER, layout)
    planes = normalize(to_planes(parts, lrn.BEFORE, lrn.AFTER, layout), lrn)
    store_planes(y + at, planes, first, None, stride, layout)


@triton.jit
def lrn_backward_kernel(dy, x, dx, pixels, S, lrn: tl.constexpr, layout: tl.constexpr):
    """dx, as :func:`lrn_forward_kernel`; x comes with the neighbours of its neighbours, whose windows hold it."""
    REACH: tl.constexpr = lrn.BEFORE + lrn.AFTER
    at, first = lanes(pixels, S, layout)
    stride = tl.cast(S, tl.int64)
    xs = load_parts(x + at, first, None, stride, REACH, REACH, layout)
    dys = load_parts(dy + at, first, None, stride, lrn.AFTER, lrn.BEFORE, layout)
    xs = to_planes(xs, REACH, REACH, layout)
    dys = to_planes(dys, lrn.AFTER, lrn.BEFORE, layout)
    store_planes(dx + at, normalize_backward(dys, xs, first, lrn, layout), first, None, stride, layout)


@triton.jit
def far_sum(
    x, at, c, mask, stride, SQUARES: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, layout: tl.constexpr
):
    """As :func:`window_sums`, one channel a lane and its window in a loop."""
    total = tl.zeros(at.shape, layout.ACC)
    for i in range(-BEFORE, AFTER + 1):
        inside = mask & (c + i >= 0) & (c + i < layout.CHANNELS)
        value = tl.load(x + at + i * stride, inside, 0.0).to(layout.ACC)
        total += value * value if SQUARES else value
    return total


@triton.jit
def far_lanes(elements, stride, layout: tl.constexpr):
    """Of each lane: its element, whether there is one, and its channel's number in the group."""
    at = tl.program_id(0).to(tl.int64) * layout.BLOCK + tl.arange(0, layout.BLOCK)
    return at, at < elements, at // stride % layout.CHANNELS


@triton.jit
def lrn_forward_far_kernel(x, dy, y, elements, stride, lrn: tl.constexpr, layout: tl.constexpr):
    """For windows too long for registers: y, or with dy the terms t of backward. ``stride`` is between channels."""
    at, mask, c = far_lanes(elements, stride, layout)
    s = lrn.K + lrn.SCALE * far_sum(x, at, c, mask, stride, True, lrn.BEFORE, lrn.AFTER, layout)
    p, over_s = powers(s, lrn)
    value = tl.load(x + at, mask, 0.0).to(layout.ACC)
    if dy is None:
        value = value * p
    else:
        value = value * over_s * (tl.load(dy + at, mask, 0.0).to(layout.ACC) * p)
    tl.store(y + at, rounded(value, y.dtype.element_ty), mask)


@triton.jit
def lrn_backward_far_kernel(dy, x, t, dx, elements, stride, lrn: tl.constexpr, layout: tl.constexpr):
    """dx from the terms t of :func:`lrn_forward_far_kernel`."""
    at, mask, c = far_lanes(elements, stride, layout)
    s = lrn.K + lrn.SCALE * far_sum(x, at, c, mask, stride, True, lrn.BEFORE, lrn.AFTER, layout)
    p, _ = powers(s, lrn)
    total = far_sum(t, at, c, mask, stride, False, lrn.AFTER, lrn.BEFORE, layout)
    value = tl.load(dy + at, mask, 0.0).to(layout.ACC) * p
    x_value = tl.load(x + at, mask, 0.0).to(layout.ACC)
    value -= slope(lrn.SCALE, lrn.QUARTERS, lrn.REST) * x_value * total
    tl.store(dx + at, rounded(value, dx.dtype.element_ty), mask)
