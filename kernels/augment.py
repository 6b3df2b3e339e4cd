"""Augmentation: ``y = (crop(resize(pixels)) - mean) * scale``, of bytes, some crops mirrored.

A program has BLOCK lanes, which are elements of a row of a crop, and goes through ROWS rows of it: what depends on the
column, channel, mean and scale, is computed once. Elements are those of the row in channels_last, one after the other;
in NCHW they are those of its three planes. A picture whose size stays is read once and written once.

A resized element is the sum, over the pixels under a triangle, of weights times pixels. The weights are integers until
they are divided by their sum; see ``csrc/augment.h``.
"""

import triton
import triton.language as tl

from .rounding import rounded


@triton.jit
def element(lane, crop_h, crop_w, CHANNELS_LAST: tl.constexpr):
    """Of lanes of a row: their column, their channel, and how far from the row's beginning they are written."""
    if CHANNELS_LAST:
        column = lane // 3
        channel = lane - 3 * column
        return column, channel, lane
    else:
        channel = lane // crop_w
        column = lane - channel * crop_w
        return column, channel, channel.to(tl.int64) * crop_h * crop_w + column


@triton.jit
def of_channel(channel, red, green, blue):
    """One of three scalars."""
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit
def first_pixel(place, length, size):
    """The first of the pixels that make a new one."""
    reach = 2 * tl.maximum(length, size)
    start = (2 * place + 1) * length - reach - size
    return tl.where(start < 0, 0, start // (2 * size) + 1)


@triton.jit
def weight(place, pixel, length, size):
    """Of a pixel in the new one, times the sum of all: an integer."""
    reach = 2 * tl.maximum(length, size)
    distance = tl.abs((2 * pixel + 1) * size - (2 * place + 1) * length)
    return tl.where(pixel < length, tl.maximum(reach - distance, 0), 0)


@triton.jit
def resized(picture, row, column, channel, inside, height, width, size_h, size_w, ACC: tl.constexpr):
    """The elements of the rows [ROWS, 1] and the columns and channels [1, BLOCK] of the resized picture."""
    first_row, first_column = first_pixel(row, height, size_h), first_pixel(column, width, size_w)
    total = tl.zeros(inside.shape, ACC)
    rows_total = tl.zeros(row.shape, ACC)
    columns_total = tl.zeros(column.shape, ACC)
    columns = (2 * tl.maximum(width, size_w) + size_w - 1) // size_w
    rows = (2 * tl.maximum(height, size_h) + size_h - 1) // size_h
    i = 0
    while i < rows:
        r = first_row + i
        row_weight = weight(row, r, height, size_h).to(ACC)
        rows_total += row_weight
        line = picture + r.to(tl.int64) * width * 3
        j = 0
        while j < columns:
            c = first_column + j
            column_weight = weight(column, c, width, size_w).to(ACC)
            if i == 0:
                columns_total += column_weight
            there = inside & (r < height) & (c < width)
            pixel = tl.load(line + (3 * c + channel), there, 0).to(tl.int32).to(ACC)
            total += row_weight * column_weight * pixel
            j += 1
        i += 1
    return total / (rows_total * columns_total)


@triton.jit
def augment_kernel(
    x,
    offsets,
    mirror,
    mean,
    sizes,
    y,
    height,
    width,
    crop_h,
    crop_w,
    row_blocks,
    blocks,
    layout: tl.constexpr,
):
    """``blocks`` programs for a row, ``row_blocks`` for the rows of a picture."""
    ROWS: tl.constexpr = layout.ROWS
    BLOCK: tl.constexpr = layout.BLOCK
    ACC: tl.constexpr = layout.ACC
    program = tl.program_id(0)
    image = (program // (row_blocks * blocks)).to(tl.int64)
    rows = (program // blocks % row_blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    column, channel, written = element(lane, crop_h, crop_w, layout.CHANNELS_LAST)
    inside = (rows < crop_h) & (lane < 3 * crop_w)

    top, left = tl.load(offsets + 2 * image), tl.load(offsets + 2 * image + 1)
    column = tl.where(tl.load(mirror + image) != 0, crop_w - 1 - column, column)
    means = tl.load(mean + 3 * image), tl.load(mean + 3 * image + 1), tl.load(mean + 3 * image + 2)
    red, green, blue = (tl.full([], layout.RED, ACC), tl.full([], layout.GREEN, ACC), tl.full([], layout.BLUE, ACC))
    picture = x + image * height * width * 3
    if layout.RESIZED:
        size_h, size_w = tl.load(sizes + 2 * image).to(tl.int32), tl.load(sizes + 2 * image + 1).to(tl.int32)
        row, column = rows + top.to(tl.int32), column + left.to(tl.int32)
        pixels = resized(picture, row, column, channel, inside, height, width, size_h, size_w, ACC)
    else:
        corner = picture + (top * width + left) * 3
        at = rows.to(tl.int64) * width * 3 + (3 * column + channel)
        pixels = tl.load(corner + at, inside, 0).to(tl.int32).to(ACC)
    result = (pixels - of_channel(channel, *means)) * of_channel(channel, red, green, blue)
    line = rows.to(tl.int64) * (3 * crop_w if layout.CHANNELS_LAST else crop_w)
    to = y + image * crop_h * crop_w * 3 + line + written
    tl.store(to, rounded(result, y.dtype.element_ty), inside)
