"""From tensors to launches of the kernels in `pointwise_kernels.py`."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxcompress.emit.cpu_numbers import channels_last_strides
from fxcompress.emit.cuda.launch import (
    ACTIVATION_NUMBERS,
    BYTES,
    FREE,
    REAL,
    SHIFT,
    Call,
    Ending,
    Window,
    activation_arguments,
    dense,
    geometry,
    has_no_gaps,
    next_power,
    steps,
    stored,
    unit_of,
)
from fxcompress.quant.spec import Grid

ADD, MULTIPLY = 1, 2

#: The largest second and third dimension of a grid of programs.
_MOST_PROGRAMS = 65_535

#: Numbers that one program computes.
_AREA = 2048


def combine(
    left: torch.Tensor,
    right: torch.Tensor | None = None,
    operation: int = ADD,
    grids: tuple[Grid | None, Grid | None] = (None, None),
    ending: Ending | None = None,
    dtype: torch.dtype = torch.float16,
    right_activation: str = "none",
    channels: int | None = None,
) -> Call:
    """Return the launch of a sum or product of two values, or of one value by itself.

    Args:
        left, right: tensors that broadcast to one shape, int8 (on the grids) or real.
        operation: ADD or MULTIPLY.
        grids: of left and right, where they are int8.
        ending: activation, and the grid of the result.
        dtype: of a real result.
        right_activation: computed on the right value first.
        channels: of the result, for images: more than `left` has; the further ones are the number zero.
    """
    ending = ending or Ending()
    shape = left.shape if right is None else torch.broadcast_shapes(left.shape, right.shape)
    left = left.expand(shape)
    right = None if right is None else right.expand(shape)
    planes = _planes(left, right, channels is not None)
    if planes is None and channels is not None:
        left = dense(left)
        planes = _planes(left, right, True)
    if planes is None:
        left = dense(left) if len(shape) > 1 else left.contiguous()
        right = None if right is None else (dense(right) if len(shape) > 1 else right.contiguous())
        planes = _flat(left, right)
    kind = torch.int8 if ending.result is not None else dtype
    held = planes.channels
    if channels is not None:
        shape = torch.Size((shape[0], channels, *shape[2:]))
        planes.channels = channels
    made = left.stride() if planes.like_left else channels_last_strides(shape)
    result = torch.empty_strided(shape, made, dtype=kind, device=left.device)
    number, first, second = activation_arguments(ending.activation)
    unit = unit_of(planes.channels)
    block_channels = min(next_power(planes.channels), 1024 if planes.pixels == 1 else 128)
    block_pixels = max(1, min(_AREA // block_channels, next_power(planes.pixels)))
    arguments: dict[str, Any] = {
        "left": left, "right": right, "result": result, "pixels": planes.pixels,
        "channel_units": planes.channels // unit, "UNIT": unit, "held": held, "FILLED": channels is not None,
        **_strides("left", planes.left), **_strides("right", planes.right),
        **_numbers("left", left, grids[0]), **_numbers("right", right, grids[1]),
        **stored(ending.result), "first": first, "second": second, "ACTIVATION": number, "OPERATION": operation,
        "RIGHT_ACTIVATION": ACTIVATION_NUMBERS[right_activation],
        "BLOCK_PIXELS": block_pixels, "BLOCK_CHANNELS": block_channels,
    }  # fmt: skip
    grid = (steps(planes.pixels, block_pixels), steps(planes.channels, block_channels), planes.images)
    return Call("combine", grid, arguments, result, {"num_warps": 4})


class _Planes:
    """Two values as (images, pixels, channels), with their strides."""

    def __init__(
        self, images: int, pixels: int, channels: int, left: tuple[int, ...], right: tuple[int, ...], like_left: bool
    ) -> None:
        self.images, self.pixels, self.channels = images, pixels, channels
        self.left, self.right, self.like_left = left, right, like_left


def _planes(left: torch.Tensor, right: torch.Tensor | None, images: bool = False) -> _Planes | None:
    """Return the dimensions over which a kernel goes; None if values have to be copied first."""
    if not images and has_no_gaps(left) and (right is None or right.stride() == left.stride()) and (
        left.ndim != 4 or left.shape[1] == 1 or left.stride(1) == 1
    ):  # fmt: skip
        return _flat(left, right)
    if left.ndim != 4 or left.shape[0] > _MOST_PROGRAMS:
        return None
    found = []
    for value in (left, left if right is None else right):
        image, channel, row, column = value.stride()
        if value.shape[2] > 1 and row != column * value.shape[3]:
            return None
        found.append((image, column if value.shape[3] > 1 else row, channel))
    count, channels, height, width = left.shape
    return _Planes(count, height * width, channels, found[0], found[1], False)


def _flat(left: torch.Tensor, right: torch.Tensor | None) -> _Planes:
    count = left.numel()
    channels = math.gcd(count, 1024)
    if channels < 16:
        channels = min((size for size, step in zip(left.shape, left.stride(), strict=True) if step == 1), default=1)
        channels = channels if count % channels == 0 and channels <= 1024 * 64 else 1
    return _Planes(1, count // channels, channels, (0, channels, 1), (0, channels, 1), True)


def _strides(side: str, values: tuple[int, ...]) -> dict[str, int]:
    return dict(zip((f"{side}_image", f"{side}_pixel", f"{side}_channel"), values, strict=True))


def _numbers(side: str, value: torch.Tensor | None, grid: Grid | None) -> dict[str, Any]:
    kind = FREE if value is None else REAL if grid is None else BYTES
    scale, zero = (1.0, 0.0) if grid is None else (grid.scale, float(grid.zero_point - SHIFT))
    return {side.upper(): kind, f"{side}_scale": scale, f"{side}_zero": zero}


def max_pool(x: torch.Tensor, window: Window, out_size: tuple[int, int]) -> Call:
    """Return the launch of maxima over windows of images (images, channels, height, width)."""
    images, channels, height, width = x.shape
    shape = (images, channels, *out_size)
    result = torch.empty_strided(shape, channels_last_strides(shape), dtype=x.dtype, device=x.device)
    unit, block = unit_of(channels), min(next_power(channels), 64)
    block_pixels = max(1, _AREA // 2 // block)
    pixels = images * out_size[0] * out_size[1]
    arguments: dict[str, Any] = {
        "source": dense(x), "result": result, "pixels": pixels, "channel_units": channels // unit, "UNIT": unit,
        "height": height, "width": width, "out_height": out_size[0], "out_width": out_size[1], **geometry(window),
        "LOWEST": -128.0 if x.dtype == torch.int8 else -math.inf,
        "BLOCK_PIXELS": block_pixels, "BLOCK_CHANNELS": block,
    }  # fmt: skip
    return Call("largest", (steps(pixels, block_pixels), steps(channels, block), 1), arguments, result)


def mean(
    x: torch.Tensor,
    grid: Grid | None,
    output: Grid | None,
    counters: dict[int, torch.Tensor],
    dtype: torch.dtype = torch.float16,
) -> Call:
    """Return the launch of means over all pixels of images, with the result (images, channels, 1, 1).

    Args:
        x: (images, channels, height, width), int8 or real.
        grid, output: of the input and the result, where they are int8.
        counters: kept by the caller from launch to launch: zeros with which programs count themselves.
        dtype: of a real result.
    """
    images, channels, height, width = x.shape
    pixels, unit, block = height * width, unit_of(channels), min(64, next_power(channels))
    blocks = steps(channels, block)
    splits = 1
    while splits < 16 and images * blocks * splits < 132 and pixels >= 128 * splits:
        splits *= 2
    kind = torch.int8 if output is not None else dtype
    result = torch.empty((images, channels, 1, 1), dtype=kind, device=x.device)
    parts = arrived = None
    if splits > 1:
        sums = torch.int32 if grid is not None else torch.float32
        parts = torch.empty(splits * images * blocks * block, dtype=sums, device=x.device)
        if images * blocks not in counters:
            counters[images * blocks] = torch.zeros(images * blocks, dtype=torch.int32, device=x.device)
        arrived = counters[images * blocks]
    arguments: dict[str, Any] = {
        "source": dense(x), "result": result, "parts": parts, "arrived": arrived, "pixels": pixels,
        "channel_units": channels // unit, "UNIT": unit, "divisor": float(pixels),
        "scale": 1.0 if grid is None else grid.scale,
        "zero_in": 0.0 if grid is None else float(grid.zero_point - SHIFT),
        **stored(output), "SOURCE": REAL if grid is None else BYTES, "SPLITS": splits,
        "BLOCK_PIXELS": 32, "BLOCK_CHANNELS": block,
    }  # fmt: skip
    return Call("average", (images, blocks, splits), arguments, result)


def normalize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    epsilon: float,
    output: Grid | None,
    features: int,
) -> Call:
    """Return the launch of a layer norm over the last `features` numbers of each row."""
    x = x.contiguous()
    kind = torch.int8 if output is not None else x.dtype
    result = torch.empty(x.shape, dtype=kind, device=x.device)
    block = next_power(features)
    arguments: dict[str, Any] = {
        "source": x, "result": result, "weight": weight, "bias": bias, "features": features, "epsilon": epsilon,
        **stored(output), "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "BLOCK": block,
    }  # fmt: skip
    warps = max(1, min(8, block // 256))
    return Call("normalize", (x.numel() // features, 1, 1), arguments, result, {"num_warps": warps})


def scaled_rows(x: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of one pixel, or pixels, in 8-bit floating point, and the scale of each pixel.

    Args:
        x: (images, channels, height, width), real.
        limit: where the largest number of each pixel goes.
    """
    x = dense(x)
    images, channels, height, width = x.shape
    result = torch.empty_strided(x.shape, channels_last_strides(x.shape), dtype=torch.float8_e4m3fn, device=x.device)
    rows = images * height * width
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = next_power(channels)
    arguments = {
        "source": x, "result": result, "scales": scales, "features": channels, "LIMIT": limit, "BLOCK": block,
    }  # fmt: skip
    options = {"num_warps": max(1, min(8, block // 256))}
    return Call("scaled_rows", (rows, 1, 1), arguments, result, options).launch(), scales
