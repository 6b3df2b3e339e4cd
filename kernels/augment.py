"""Augmentation: ``y = (crop(resize(pixels)) - mean) * scale``, of bytes, some crops mirrored.

A lane has one element of a row of a crop, so that what depends on column and channel is computed once, and goes through
ROWS rows, of which it loads AT_ONCE before it stores. Elements are those of the row in channels_last, one after the
other; in NCHW they are those of its three planes. The crop of a picture that keeps its size is read and written once.

A resized element is the sum, over the pixels under a triangle, of weights times pixels. The weights are integers until
they are divided by their sum; see ``csrc/augment.h``.
"""

import triton
import triton.language as tl

from .rounding import rounded


@triton.jit
def element(lane, crop_h, crop_w, CHANNELS_LAST: tl.constexpr):
    """The column and the channel of each lane, and how far from the row's beginning it is written."""
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
def copy_rows(source, to, line, out_line, inside, mean, scale, COUNT: tl.constexpr):
    """Elements of COUNT rows, minus mean, times scale; all are loaded before any is stored."""
    pixels = ()
    for i in tl.static_range(COUNT):
        pixels = pixels + (tl.load(source + i * line, inside),)
    for i in tl.static_range(COUNT):
        result = (pixels[i].to(tl.int32).to(scale.dtype) - mean) * scale
        tl.store(to + i * out_line, rounded(result, to.dtype.element_ty), inside)


@triton.jit
def taps(place, length, size):
    """Of an axis that goes from ``length`` to ``size``, the pixels that make a new one, and their weights.

    The first of them, its distance from the new one's centre, the step to the next ones' distances, the distance at
    which the axis ends, and ``reach``, at which the weight ends: a pixel's is ``reach - abs(distance)``.
    """
    reach, step = 2 * tl.maximum(length, size), 2 * size
    centre = (2 * place + 1) * length
    start = centre - reach - size
    first = tl.where(start < 0, 0, start // step + 1)
    distance = (2 * first + 1) * size - centre
    return first, distance, step, distance + (length - first) * step, reach


@triton.jit
def resized(source, stride, row_taps, column_taps, columns, ACC: tl.constexpr):
    """An element of a row of the resized picture for each lane, times the sum of its columns' weights.

    The pointers are to the first of the pixels that make it.
    """
    row, row_step, row_end, row_reach = row_taps
    first_column, column_step, column_end, column_reach = column_taps
    total, row_weights = tl.zeros(source.shape, ACC), tl.full([], 0, ACC)
    while row < row_end:
        sums, column, pixel, j = tl.zeros(source.shape, ACC), first_column, source, 0
        while j < columns:
            weight = (column_reach - tl.abs(column)).to(ACC)
            sums += weight * tl.load(pixel, column < column_end, 0).to(tl.int32).to(ACC)
            column += column_step
            pixel += 3
            j += 1
        row_weight = (row_reach - tl.abs(row)).to(ACC)
        total += row_weight * sums
        row_weights += row_weight
        source += stride
        row += row_step
    return total / row_weights


@triton.jit
def sum_of_weights(taps, count, ACC: tl.constexpr):
    """Of the pixels that make a new one, at most ``count``."""
    distance, step, end, reach = taps
    total, j = tl.zeros(distance.shape, ACC), 0
    while j < count:
        total += tl.where(distance < end, reach - tl.abs(distance), 0).to(ACC)
        distance += step
        j += 1
    return total


# crop_w is not specialized: told that rows are aligned, Triton would give each thread several elements, which suits the
# stores but not the loads.
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
    ACC: tl.constexpr = layout.ACC
    AT_ONCE: tl.constexpr = layout.AT_ONCE
    program = tl.program_id(0)
    image = program // (row_blocks * blocks)
    program -= image * row_blocks * blocks
    first_row = program // blocks * layout.ROWS
    rows = tl.minimum(layout.ROWS, crop_h - first_row)
    lane = program % blocks * layout.BLOCK + tl.arange(0, layout.BLOCK)
    image = image.to(tl.int64)
    column, channel, written = element(lane, crop_h, crop_w, layout.CHANNELS_LAST)
    inside = lane < 3 * crop_w

    top, left = tl.load(offsets + 2 * image) + first_row, tl.load(offsets + 2 * image + 1)
    column = tl.where(tl.load(mirror + image) != 0, crop_w - 1 - column, column)
    means = tl.load(mean + 3 * image), tl.load(mean + 3 * image + 1), tl.load(mean + 3 * image + 2)
    scales = tl.full([], layout.RED, ACC), tl.full([], layout.GREEN, ACC), tl.full([], layout.BLUE, ACC)
    lane_mean, lane_scale = of_channel(channel, *means), of_channel(channel, *scales)
    picture = x + image * height * width * 3
    line, out_line = tl.cast(width, tl.int64) * 3, tl.cast(crop_w, tl.int64) * (3 if layout.CHANNELS_LAST else 1)
    to = y + (image * crop_h * crop_w * 3 + first_row * out_line)
    done = 0
    if layout.RESIZED:
        size_h, size_w = tl.load(sizes + 2 * image).to(tl.int32), tl.load(sizes + 2 * image + 1).to(tl.int32)
        first, distance, step, end, reach = taps(column + left.to(tl.int32), width, size_w)
        column_taps = distance, step, tl.where(inside, tl.minimum(end, reach), -reach), reach
        columns = (reach + size_w - 1) // size_w
        column_weights = sum_of_weights(column_taps, columns, ACC)
        first_line, row, row_step, row_end, row_reach = taps(top.to(tl.int32), height, size_h)
        source = picture + first_line * line + (3 * first + channel)
        while done < rows:
            row_taps = row, row_step, tl.minimum(row_end, row_reach), row_reach
            result = resized(source, line, row_taps, column_taps, columns, ACC) / column_weights
            tl.store(to + written, rounded((result - lane_mean) * lane_scale, y.dtype.element_ty), inside)
            row -= 2 * height
            row_end -= 2 * height
            while row <= -row_reach:
                row += row_step
                source += line
            to += out_line
            done += 1
    else:
        source = picture + (top * line + 3 * left) + (3 * column + channel)
        while done + AT_ONCE <= rows:
            copy_rows(source, to + written, line, out_line, inside, lane_mean, lane_scale, AT_ONCE)
            source += AT_ONCE * line
            to += AT_ONCE * out_line
            done += AT_ONCE
        while done < rows:
            copy_rows(source, to + written, line, out_line, inside, lane_mean, lane_scale, 1)
            source += line
            to += out_line
            done += 1
