"""The Triton kernels between layers: elementwise operations, pooling, norms; 8-bit values as in `kernels.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from fxcompress.emit.cuda.kernels import BYTES, FREE, activated, rounded

ADD, MULTIPLY = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _read(source, place, wanted, KIND: tl.constexpr, scale, zero):
    value = tl.load(source + place, mask=wanted, other=0).to(tl.float32)
    if KIND == BYTES:
        value = (value - zero) * scale
    return value


@triton.jit
def _write(value, result, place, wanted, KIND: tl.constexpr, inverse, zero, low, high):
    if KIND == BYTES:
        value = rounded(value, inverse, zero, low, high)
    tl.store(result + place, value.to(result.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["pixels"])
def combine(
    left, right, result, pixels, channel_units, held,
    left_image, left_pixel, left_channel, right_image, right_pixel, right_channel,
    left_scale, left_zero, right_scale, right_zero, inverse, zero, low, high, first, second,
    UNIT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, OPERATION: tl.constexpr,
    RIGHT_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, RESULT: tl.constexpr,
    FILLED: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One value, the sum or the product of two, of shape (images, pixels, channels) in memory order of the result.

    left, right: of any strides, 0 where a value is the same along a dimension. RIGHT FREE: there is one value only.
    FILLED: channels from `held` on are the number zero.
    """
    channels = channel_units * UNIT
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    image = tl.program_id(2).to(tl.int64)
    wanted = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    far = pixel.to(tl.int64)[:, None]
    place = image * left_image + far * left_pixel + channel[None, :] * left_channel
    seen = wanted
    if FILLED:
        seen = wanted & (channel < held)[None, :]
    value = _read(left, place, seen, LEFT, left_scale, left_zero)
    if RIGHT != FREE:
        place = image * right_image + far * right_pixel + channel[None, :] * right_channel
        other = _read(right, place, wanted, RIGHT, right_scale, right_zero)
        other = activated(other, RIGHT_ACTIVATION, 0.0, 0.0)
        value = value + other if OPERATION == ADD else value * other
    value = activated(value, ACTIVATION, first, second)
    place = (image * pixels + far) * channels + channel[None, :]
    _write(value, result, place, wanted, RESULT, inverse, zero, low, high)


@triton.jit(do_not_specialize=["pixels"])
def largest(
    source, result, pixels, channel_units, height, width, out_height, out_width,
    rows_of_window, columns_of_window, stride_row, stride_column, padding_row, padding_column,
    dilation_row, dilation_column,
    UNIT: tl.constexpr, LOWEST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The maximum over windows of images (images, height, width, channels); padding is LOWEST."""
    channels = channel_units * UNIT
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    column = pixel % out_width
    row = (pixel // out_width) % out_height
    image = pixel // (out_width * out_height)
    top = row * stride_row - padding_row
    left = column * stride_column - padding_column
    corner = ((image.to(tl.int64) * height + top) * width + left) * channels
    wanted = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    found = tl.full((BLOCK_PIXELS, BLOCK_CHANNELS), LOWEST, tl.float32)
    for in_row in range(rows_of_window):
        for in_column in range(columns_of_window):
            down = top + in_row * dilation_row
            right = left + in_column * dilation_column
            seen = (down >= 0) & (down < height) & (right >= 0) & (right < width)
            start = corner + (in_row * dilation_row * width + in_column * dilation_column) * channels
            values = tl.load(source + start[:, None] + channel[None, :], mask=wanted & seen[:, None], other=LOWEST)
            found = tl.maximum(found, values.to(tl.float32), tl.PropagateNan.ALL)
    place = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(result + place, found.to(result.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["pixels"])
def average(
    source, result, parts, arrived, pixels, channel_units, divisor, scale, zero_in, inverse, zero, low, high,
    UNIT: tl.constexpr, SOURCE: tl.constexpr, RESULT: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The mean over all pixels of each channel of each image (images, pixels, channels), in SPLITS parts.

    8-bit numbers are summed as integers; the real mean is (sum - pixels * zero_in) * scale / divisor.
    """
    channels = channel_units * UNIT
    image = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    part = tl.program_id(2)
    channel_wanted = channel < channels
    start = source + image.to(tl.int64) * pixels * channels
    within = tl.arange(0, BLOCK_PIXELS)
    if SOURCE == BYTES:
        total = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), dtype=tl.int32)
    else:
        total = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), dtype=tl.float32)
    share = tl.cdiv(pixels, SPLITS)
    end = tl.minimum(share * (part + 1), pixels)
    for begin in range(part * share, end, BLOCK_PIXELS):
        pixel = begin + within
        wanted = (pixel < end)[:, None] & channel_wanted[None, :]
        values = tl.load(start + pixel.to(tl.int64)[:, None] * channels + channel[None, :], mask=wanted, other=0)
        total += values.to(total.dtype)
    found = tl.sum(total, 0)
    done = True
    if SPLITS > 1:
        number = image * tl.num_programs(1) + tl.program_id(1)
        cells = tl.arange(0, BLOCK_CHANNELS)
        count = tl.num_programs(0) * tl.num_programs(1)
        tl.store(parts + (part * count + number) * BLOCK_CHANNELS + cells, found)
        tl.debug_barrier()
        done = tl.atomic_add(arrived + number, 1, sem="acq_rel") == SPLITS - 1
        if done:
            tl.debug_barrier()
            found = tl.load(parts + number * BLOCK_CHANNELS + cells, cache_modifier=".cg")
            for other in range(1, SPLITS):
                found += tl.load(parts + (other * count + number) * BLOCK_CHANNELS + cells, cache_modifier=".cg")
            tl.store(arrived + number, 0)
    if done:
        value = found.to(tl.float32)
        if SOURCE == BYTES:
            value = (value - pixels * zero_in) * scale
        value = value / divisor
        place = image.to(tl.int64) * channels + channel
        _write(value, result, place, channel_wanted, RESULT, inverse, zero, low, high)


@triton.jit
def normalize(
    source, result, weight, bias, features, epsilon, inverse, zero, low, high,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, RESULT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows with mean 0 and variance 1, times a weight, plus a bias."""
    place = tl.arange(0, BLOCK)
    wanted = place < features
    start = tl.program_id(0).to(tl.int64) * features
    value = tl.load(source + start + place, mask=wanted, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / features
    centred = tl.where(wanted, value - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / features
    value = centred * (1.0 / tl.sqrt(variance + epsilon))
    if HAS_WEIGHT:
        value = value * tl.load(weight + place, mask=wanted, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value = value + tl.load(bias + place, mask=wanted, other=0.0).to(tl.float32)
    _write(value, result, start + place, wanted, RESULT, inverse, zero, low, high)


@triton.jit
def scaled_rows(source, result, scales, features, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """Rows in 8-bit floating point, each with a scale of its own that takes its largest number to LIMIT."""
    place = tl.arange(0, BLOCK)
    wanted = place < features
    start = tl.program_id(0).to(tl.int64) * features
    value = tl.load(source + start + place, mask=wanted, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / LIMIT
    tl.store(scales + tl.program_id(0), scale)
    tl.store(result + start + place, (value / scale).to(result.dtype.element_ty), mask=wanted)
