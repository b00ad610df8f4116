"""What follows the products of every layer: scale, bias, residual, activation, rounding; and where the result goes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fxcompress.emit.cpu_int8 import Int8Conv, QuantizedLayer
from fxcompress.emit.cpu_numbers import channels_last_strides, inverse
from fxcompress.emit.native import steps
from fxcompress.emit.native.draft import Draft
from fxcompress.emit.native.handlers.pointwise import LARGEST, activation
from fxcompress.emit.native.memory import View, meta_tensor
from fxcompress.emit.native.places import place_of, place_of_rows
from fxcompress.quant.spec import Grid


def result_of(draft: Draft, module: QuantizedLayer, shape: Sequence[int], residual: View | None) -> View:
    """Return where a layer's result goes: over its residual if it may overwrite that."""
    dtype = torch.float32 if module.output is None else torch.uint8
    if residual is not None and module.overwrite and residual.buffer.place == "arena":
        strides = channels_last_strides(shape) if isinstance(module, Int8Conv) else None
        fresh = meta_tensor(shape, dtype, strides)
        if residual.meta.dtype == dtype and residual.meta.stride() == fresh.stride():
            return residual
    return draft.made(shape, dtype, images=isinstance(module, Int8Conv))


def finish_of(
    draft: Draft, module: QuantizedLayer, scale: torch.Tensor, bias: torch.Tensor, residual: View | None
) -> steps.Finish:
    """Return what a step does with a layer's products."""
    finish = steps.Finish(
        scale=draft.kept(scale), bias=draft.kept(bias), inverse=1.0, high=255, residual_kind=steps.NOTHING
    )
    word, *arguments = module.activation or ("none",)
    grid = module.output
    if grid is not None:
        finish.kind, finish.inverse, finish.zero = steps.BYTES, inverse(grid.scale), grid.zero_point
        finish.low, finish.high = grid.quant_min, grid.quant_max
    if word == "clamp":
        low, high = arguments
        if grid is None:
            finish.activation = steps.ACTIVATIONS["clamp"]
            finish.argument0 = -LARGEST if low is None else low
            finish.argument1 = LARGEST if high is None else high
        else:  # storing clips: a clamp of the real number is one of the integer
            finish.low = max(grid.quant_min, _integer(low, grid))
            finish.high = max(finish.low, min(grid.quant_max, _integer(high, grid, grid.quant_max)))
    elif word != "none":
        finish.activation, finish.argument0, finish.argument1 = activation(word, arguments)
    if residual is not None:
        finish.residual = place_of(residual) if isinstance(module, Int8Conv) else place_of_rows(residual)
        finish.residual_kind, finish.residual_scale = steps.FLOAT, 1.0
        if isinstance(module.residual, Grid):
            finish.residual_kind, finish.residual_scale = steps.BYTES, module.residual.scale
            finish.residual_shift = -module.residual.scale * module.residual.zero_point
    return finish


def _integer(limit: float | None, grid: Grid, otherwise: int = 0) -> int:
    """The integer that a real number is rounded to, within 0..255."""
    if limit is None or math.isinf(limit):
        return otherwise if limit is None or limit > 0 else 0
    return max(0, min(255, round(limit / grid.scale) + grid.zero_point))
