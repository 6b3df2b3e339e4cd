"""Augmentation: ``y = (crop(resize(pixels)) - mean) * scale``, of bytes, some crops mirrored.

A program has BLOCK lanes, which are elements of a row of a crop, and goes through ROWS rows of it, eight at once: what
depends on the column, channel, mean and scale, is computed once. Elements are those of the row in channels_last, one
after the other; in NCHW they are those of its three planes. A picture whose size stays is read once and written once.

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
        channel = (lane >= crop_w).to(tl.int32) + (lane >= 2 * crop_w).to(tl.int32)
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
    """The elements of the rows [AT_ONCE, 1] and the columns and channels [1, BLOCK] of the resized picture."""
    first_row, first_column = first_pixel(row, height, size_h), first_pixel(column, width, size_w)
    columns = (2 * tl.maximum(width, size_w) + size_w - 1) // size_w
    rows = (2 * tl.maximum(height, size_h) + size_h - 1) // size_h
    total, weights = tl.zeros(inside.shape, ACC), tl.zeros(inside.shape, ACC)
    i = 0
    while i < rows:
        r = first_row + i
        row_weight = weight(row, r, height, size_h).to(ACC)
        line = picture + r.to(tl.int64) * width * 3
        j = 0
        while j < columns:
            c = first_column + j
            product = row_weight * weight(column, c, width, size_w).to(ACC)
            pixel = tl.load(line + (3 * c + channel), inside & (product > 0), 0).to(tl.int32).to(ACC)
            total += product * pixel
            weights += product
            j += 1
        i += 1
    return total / weights


# Not told that rows are aligned, where they are, Triton gives each thread single elements, as loads want it.
@triton.jit(do_not_specialize=["crop_w"])
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
    AT_ONCE: tl.constexpr = 8 if ROWS > 8 else ROWS
    ACC: tl.constexpr = layout.ACC
    program = tl.program_id(0)
    image = program // (row_blocks * blocks)
    program -= image * row_blocks * blocks
    first_row = program // blocks * ROWS
    lane = (program - program // blocks * blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    image = image.to(tl.int64)
    column, channel, written = element(lane, crop_h, crop_w, layout.CHANNELS_LAST)

    top, left = tl.load(offsets + 2 * image) + first_row, tl.load(offsets + 2 * image + 1)
    column = tl.where(tl.load(mirror + image) != 0, crop_w - 1 - column, column)
    means = tl.load(mean + 3 * image), tl.load(mean + 3 * image + 1), tl.load(mean + 3 * image + 2)
    red, green, blue = (tl.full([], layout.RED, ACC), tl.full([], layout.GREEN, ACC), tl.full([], layout.BLUE, ACC))
    lane_mean, lane_scale = of_channel(channel, *means), of_channel(channel, red, green, blue)
    picture = x + image * height * width * 3
    row = tl.arange(0, AT_ONCE)[:, None]
    line, out_line = tl.cast(width, tl.int64) * 3, tl.cast(crop_w, tl.int64) * (3 if layout.CHANNELS_LAST else 1)
    source = picture + (top * line + 3 * left)
    at = row * line + (3 * column + channel)
    to = y + (image * crop_h * crop_w * 3 + first_row * out_line)
    to_at = row * out_line + written
    if layout.RESIZED:
        size_h, size_w = tl.load(sizes + 2 * image).to(tl.int32), tl.load(sizes + 2 * image + 1).to(tl.int32)
        column += left.to(tl.int32)
    rows, done = tl.minimum(ROWS, crop_h - first_row), 0
    while done < rows:
        inside = (row < rows - done) & (lane < 3 * crop_w)
        if layout.RESIZED:
            place = row + (done + top.to(tl.int32))
            pixels = resized(picture, place, column, channel, inside, height, width, size_h, size_w, ACC)
        else:
            pixels = tl.load(source + at, inside).to(tl.int32).to(ACC)
            source += AT_ONCE * line
        tl.store(to + to_at, rounded((pixels - lane_mean) * lane_scale, y.dtype.element_ty), inside)
        to += AT_ONCE * out_line
        done += AT_ONCE
