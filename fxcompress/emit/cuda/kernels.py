"""The Triton kernels of layers: convolution as an implicit matrix product, and convolution of each channel by itself.

Images lie in memory with their channels side by side (NHWC), weights as (output channels, rows, columns, channels).
A linear layer is a convolution of single pixels. 8-bit values are signed numbers here, 128 lower than on their `Grid`,
because the matrix units multiply signed numbers only. Sums of products are exact 32-bit integers; what follows them
is float32.

Implicit matrix product: Chetlur et al., cuDNN: Efficient Primitives for Deep Learning, 2014. The last program of a tile
adds up the parts of a split sum in a fixed order, so that results do not change from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Numbers of activations, see `layers.ACTIVATION_NUMBERS`.
NONE, CLAMP, HARDSWISH, SILU, GELU, GELU_TANH = (tl.constexpr(number) for number in range(6))
LEAKY_RELU, TANH, SIGMOID, HARDSIGMOID = (tl.constexpr(number) for number in range(6, 10))

#: How a value is kept: as real numbers, or as 8-bit integers. FREE: there is none.
FREE, REAL, BYTES = (tl.constexpr(number) for number in range(3))

#: How padding is made up for where the zero point is not 0: not at all, by loading the zero point, by a table.
ZEROS, LOADED, TABLE = (tl.constexpr(number) for number in range(3))

#: Adding and subtracting it rounds a float32 below 2^22 to the nearest integer, ties to even.
ROUNDING = tl.constexpr(12582912.0)
LARGEST = tl.constexpr(4194303.0)


@triton.jit
def activated(x, KIND: tl.constexpr, first, second):
    """Return an activation of float32 numbers. first, second: its arguments."""
    if KIND == CLAMP:
        x = tl.minimum(tl.maximum(x, first, tl.PropagateNan.ALL), second, tl.PropagateNan.ALL)
    elif KIND == HARDSWISH:
        x = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    elif KIND == SILU:
        x = x / (1.0 + tl.exp(-x))
    elif KIND == GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == GELU_TANH:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0))
    elif KIND == LEAKY_RELU:
        x = tl.where(x > 0.0, x, x * first)
    elif KIND == TANH:
        x = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    elif KIND == SIGMOID:
        x = 1.0 / (1.0 + tl.exp(-x))
    elif KIND == HARDSIGMOID:
        x = tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    return x


@triton.jit
def rounded(x, inverse, zero, low, high):
    """Return float32 numbers as integers (float32) on a grid with the step 1 / inverse."""
    steps = x * inverse
    steps = tl.minimum(tl.maximum(steps, -LARGEST), LARGEST)
    steps = (steps + ROUNDING) - ROUNDING
    return tl.minimum(tl.maximum(steps + zero, low), high)


@triton.jit
def _finish(
    value, place, wanted, columns, columns_wanted, result, addend, factor, bias, inverse, zero, low, high,
    addend_scale, addend_zero, first, second,
    ACTIVATION: tl.constexpr, ADDEND: tl.constexpr, RESULT: tl.constexpr, HAS_FACTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Store sums of products (float32): scale, bias, addend, activation, rounding."""
    if HAS_FACTOR:
        value = value * tl.load(factor + columns, mask=columns_wanted, other=0.0)[None, :]
    if HAS_BIAS:
        value = value + tl.load(bias + columns, mask=columns_wanted, other=0.0)[None, :]
    if ADDEND == BYTES:
        value = value + (tl.load(addend + place, mask=wanted, other=0).to(tl.float32) - addend_zero) * addend_scale
    elif ADDEND == REAL:
        value = value + tl.load(addend + place, mask=wanted, other=0.0).to(tl.float32)
    value = activated(value, ACTIVATION, first, second)
    if RESULT == BYTES:
        value = rounded(value, inverse, zero, low, high)
    tl.store(result + place, value.to(result.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["pixels", "source_zero"])
def convolution(
    source, weight, result, addend, factor, row_factor, bias, offset, table, row_places, column_places, parts, arrived,
    pixels, outputs, channel_units, height, width, out_height, out_width,
    rows_of_window, columns_of_window, stride_row, stride_column, padding_row, padding_column,
    dilation_row, dilation_column, table_columns, source_zero,
    inverse, zero, low, high, addend_scale, addend_zero, first, second,
    UNIT: tl.constexpr, GROUPS: tl.constexpr, POINTWISE: tl.constexpr, FLAT: tl.constexpr,
    CHANNELS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr,
    BORDER: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_ROW_FACTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ADDEND: tl.constexpr, RESULT: tl.constexpr,
    INTEGERS: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One tile of pixels x output channels.

    source: (images, height, width, groups * channels). weight: (groups * outputs, window, channels).
    result, addend: (images, out_height, out_width, groups * outputs); pixels: images * out_height * out_width.
    outputs, channels = channel_units * UNIT: of one group. factor, bias (float32), offset (int32): for each output.
    row_factor (float32): for each pixel.
    table: (classes of rows * table_columns, groups * outputs) int32, what a pixel at the border lacks; row_places and
    column_places: class of each row and column of the result; class 0 reads no padding.
    POINTWISE: the window is one pixel and there is no padding. FLAT: window and channels are one dimension, for few
    channels (CHANNELS and WINDOW_COLUMNS are set then). EVEN: no block of channels is cut off.
    """
    channels = channel_units * UNIT
    # Tiles go down a band of rows before they go to the next columns, so that what they share stays in the L2 cache.
    tile = tl.program_id(0)
    tile_rows = tl.cdiv(pixels, BLOCK_PIXELS)
    tile_columns = tl.cdiv(outputs, BLOCK_OUTPUTS)
    band = tile // (BAND * tile_columns)
    band_rows = tl.minimum(tile_rows - band * BAND, BAND)
    inside = tile - band * BAND * tile_columns
    tile_row = band * BAND + inside % band_rows
    tile_column = inside // band_rows
    group = tl.program_id(1)
    part = tl.program_id(2)

    pixel = tile_row * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    output = tile_column * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    pixel_wanted = pixel < pixels
    output_wanted = output < outputs
    held = tl.minimum(pixel, pixels - 1)
    column = held % out_width
    row = (held // out_width) % out_height
    image = held // (out_width * out_height)
    top = row * stride_row - padding_row
    left = column * stride_column - padding_column
    corner = ((image.to(tl.int64) * height + top) * width + left) * (channels * GROUPS) + group * channels
    within = tl.arange(0, BLOCK_CHANNELS)
    output_held = group * outputs + tl.minimum(output, outputs - 1)
    window = rows_of_window * columns_of_window
    weight_rows = weight + output_held.to(tl.int64) * (window * channels)
    nothing = 0 if INTEGERS else 0.0
    filler = nothing
    if BORDER == LOADED:
        filler = source_zero.to(source.dtype.element_ty)

    if INTEGERS:
        total = tl.zeros((BLOCK_PIXELS, BLOCK_OUTPUTS), dtype=tl.int32)
    else:
        total = tl.zeros((BLOCK_PIXELS, BLOCK_OUTPUTS), dtype=tl.float32)

    if FLAT:
        length = window * CHANNELS
        blocks = tl.cdiv(length, BLOCK_CHANNELS)
    else:
        blocks_of_channels = tl.cdiv(channels, BLOCK_CHANNELS)
        blocks = window * blocks_of_channels
    begin = 0
    end = blocks
    if SPLITS > 1:
        share = tl.cdiv(blocks, SPLITS)
        begin = part * share
        end = tl.minimum(begin + share, blocks)

    for block in range(begin, end):
        if FLAT:
            flat = block * BLOCK_CHANNELS + within
            tap = flat // CHANNELS
            in_row = tap // WINDOW_COLUMNS
            in_column = tap % WINDOW_COLUMNS
            step_down = (in_row * dilation_row)[None, :]
            step_right = (in_column * dilation_column)[None, :]
            down = top[:, None] + step_down
            right = left[:, None] + step_right
            length_wanted = flat < length
            seen = (down >= 0) & (down < height) & (right >= 0) & (right < width) & length_wanted[None, :]
            place = (step_down * width + step_right) * (CHANNELS * GROUPS) + (flat % CHANNELS)[None, :]
            values = tl.load(source + corner[:, None] + place, mask=seen, other=filler)
            taken = tl.load(weight_rows[None, :] + flat[:, None], mask=length_wanted[:, None], other=nothing)
        elif POINTWISE:
            channel = block * BLOCK_CHANNELS + within
            if EVEN:
                values = tl.load(source + corner[:, None] + channel[None, :])
                taken = tl.load(weight_rows[None, :] + channel[:, None])
            else:
                inner = channel < channels
                values = tl.load(source + corner[:, None] + channel[None, :], mask=inner[None, :], other=nothing)
                taken = tl.load(weight_rows[None, :] + channel[:, None], mask=inner[:, None], other=nothing)
        else:
            tap = block // blocks_of_channels
            channel = (block - tap * blocks_of_channels) * BLOCK_CHANNELS + within
            step_down = (tap // columns_of_window) * dilation_row
            step_right = (tap % columns_of_window) * dilation_column
            down = top + step_down
            right = left + step_right
            seen = (down >= 0) & (down < height) & (right >= 0) & (right < width)
            start = source + (corner + (step_down * width + step_right) * (channels * GROUPS))[:, None]
            if EVEN:
                values = tl.load(start + channel[None, :], mask=seen[:, None], other=filler)
                taken = tl.load(weight_rows[None, :] + (tap * channels + channel)[:, None])
            else:
                inner = channel < channels
                values = tl.load(start + channel[None, :], mask=seen[:, None] & inner[None, :], other=filler)
                taken = tl.load(
                    weight_rows[None, :] + (tap * channels + channel)[:, None], mask=inner[:, None], other=nothing
                )
        if INTEGERS:
            total = tl.dot(values, taken, total, out_dtype=tl.int32)
        else:
            total = tl.dot(values, taken, total)

    columns = group * outputs + output
    place = pixel.to(tl.int64)[:, None] * (outputs * GROUPS) + columns[None, :]
    wanted = pixel_wanted[:, None] & output_wanted[None, :]
    done = True
    if SPLITS > 1:
        tiles = tl.num_programs(0) * tl.num_programs(1)
        number = group * tl.num_programs(0) + tile
        area = BLOCK_PIXELS * BLOCK_OUTPUTS
        cells = tl.arange(0, BLOCK_PIXELS)[:, None] * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)[None, :]
        tl.store(parts + (part * tiles + number).to(tl.int64) * area + cells, total)
        tl.debug_barrier()
        done = tl.atomic_add(arrived + number, 1, sem="acq_rel") == SPLITS - 1
        if done:
            tl.debug_barrier()
            total = tl.load(parts + number.to(tl.int64) * area + cells, cache_modifier=".cg")
            for other in range(1, SPLITS):
                start = parts + (other * tiles + number).to(tl.int64) * area
                total += tl.load(start + cells, cache_modifier=".cg")
            tl.store(arrived + number, 0)
    if done:
        if HAS_OFFSET:
            total += tl.load(offset + columns, mask=output_wanted, other=0)[None, :]
        if BORDER == TABLE:
            kind = tl.load(row_places + row) * table_columns + tl.load(column_places + column)
            lacking = kind.to(tl.int64)[:, None] * (outputs * GROUPS) + columns[None, :]
            total += tl.load(table + lacking, mask=wanted & (kind > 0)[:, None], other=0)
        value = total.to(tl.float32)
        if HAS_ROW_FACTOR:
            value = value * tl.load(row_factor + held)[:, None]
        _finish(
            value, place, wanted, columns, output_wanted, result, addend, factor, bias, inverse, zero, low, high,
            addend_scale, addend_zero, first, second, ACTIVATION, ADDEND, RESULT, HAS_FACTOR, HAS_BIAS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pixels", "source_zero"])
def depthwise(
    source, weight, result, addend, factor, bias, offset,
    pixels, outputs, channel_units, height, width, out_height, out_width,
    rows_of_window, columns_of_window, stride_row, stride_column, padding_row, padding_column,
    dilation_row, dilation_column, source_zero,
    inverse, zero, low, high, addend_scale, addend_zero, first, second,
    UNIT: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, ADDEND: tl.constexpr, RESULT: tl.constexpr, INTEGERS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr,
):  # fmt: skip
    """One tile of pixels x channels, each channel with a window of its own.

    source: (images, height, width, channels). weight: (rows, columns, channels). The rest as in `convolution`.
    """
    channels = channel_units * UNIT
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    pixel_wanted = pixel < pixels
    channel_wanted = channel < channels
    column = pixel % out_width
    row = (pixel // out_width) % out_height
    image = pixel // (out_width * out_height)
    top = row * stride_row - padding_row
    left = column * stride_column - padding_column
    corner = ((image.to(tl.int64) * height + top) * width + left) * channels
    if INTEGERS:
        total = tl.zeros((BLOCK_PIXELS, BLOCK_OUTPUTS), dtype=tl.int32)
    else:
        total = tl.zeros((BLOCK_PIXELS, BLOCK_OUTPUTS), dtype=tl.float32)
    filler = source_zero.to(source.dtype.element_ty)
    for in_row in range(rows_of_window):
        for in_column in range(columns_of_window):
            down = top + in_row * dilation_row
            right = left + in_column * dilation_column
            seen = (down >= 0) & (down < height) & (right >= 0) & (right < width) & pixel_wanted
            start = corner + (in_row * dilation_row * width + in_column * dilation_column) * channels
            values = tl.load(
                source + start[:, None] + channel[None, :],
                mask=seen[:, None] & channel_wanted[None, :], other=filler,
            )  # fmt: skip
            tap = in_row * columns_of_window + in_column
            taken = tl.load(weight + tap * channels + channel, mask=channel_wanted, other=0)
            total += values.to(total.dtype) * taken.to(total.dtype)[None, :]
    if HAS_OFFSET:
        total += tl.load(offset + channel, mask=channel_wanted, other=0)[None, :]
    place = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    _finish(
        total.to(tl.float32), place, pixel_wanted[:, None] & channel_wanted[None, :], channel, channel_wanted, result,
        addend, factor, bias, inverse, zero, low, high, addend_scale, addend_zero, first, second, ACTIVATION, ADDEND,
        RESULT, HAS_FACTOR, HAS_BIAS,
    )  # fmt: skip
