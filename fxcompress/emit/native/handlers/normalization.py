"""Normalisation of rows and of channels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fxcompress.emit.cpu_int8 import Int8Affine
from fxcompress.emit.cpu_numbers import inverse
from fxcompress.emit.native import packing, steps
from fxcompress.emit.native.draft import Draft
from fxcompress.emit.native.handlers.pointwise import chain
from fxcompress.emit.native.memory import View
from fxcompress.emit.native.places import place_of, place_of_rows, side_by_side
from fxcompress.emit.native.plan import Unplanned
from fxcompress.quant.folding import scale_and_shift


def layer_norm(draft: Draft, module: nn.LayerNorm, x: View) -> View:
    """Layer normalisation of rows."""
    size = math.prod(module.normalized_shape)
    if len(module.normalized_shape) != 1 or x.meta.dtype != torch.float32 or x.meta.numel() == 0:
        raise Unplanned
    if module not in draft.packed:
        ones, zeros = torch.ones(size), torch.zeros(size)
        draft.packed[module] = (
            packing.vectors(ones if module.weight is None else module.weight),
            packing.vectors(zeros if module.bias is None else module.bias),
        )
    scale, shift = draft.packed[module]
    step = steps.Normalization(scale=draft.kept(scale), shift=draft.kept(shift), epsilon=module.eps)
    return normalized(draft, step, x)


def batch_norm(draft: Draft, module: Any, x: View) -> View:
    """Batch normalisation of real numbers (images, channels, ...): a chain."""
    if module.training or module.running_mean is None or x.meta.dtype != torch.float32:
        raise Unplanned
    if module not in draft.packed:
        draft.packed[module] = [packing.vectors(part) for part in scale_and_shift(module)]
    if not side_by_side(x.meta) and x.meta.ndim != 2:
        raise Unplanned
    shape = (1, -1, *[1] * (x.meta.ndim - 2))
    scale, shift = (draft.constant(part[: x.meta.shape[1]].view(shape)) for part in draft.packed[module])
    result = draft.new(x.meta.shape, torch.float32, images=True)
    program: list[tuple[Any, ...]] = [
        (steps.LOAD, x, None), (steps.LOAD, scale, None), (steps.MULTIPLY, 0, 1), (steps.LOAD, shift, None),
        (steps.ADD, 2, 3),
    ]  # fmt: skip
    chain(draft, result, None, program)
    return result


def affine(draft: Draft, module: Int8Affine, x: View) -> View:
    """A scale and a shift for each channel of an 8-bit tensor (images, channels, ...)."""
    if x.meta.ndim not in (2, 4) or x.meta.numel() == 0:
        raise Unplanned
    x = draft.image(x) if x.meta.ndim == 4 else draft.rows(x)[0]
    if module not in draft.packed:
        draft.packed[module] = [packing.vectors(part, lanes=packing.CHUNK) for part in (module.scale, module.shift)]
    scale, shift = draft.packed[module]
    source, grid = module.input, module.output
    result = draft.made(x.meta.shape, torch.uint8, images=x.meta.ndim == 4)
    images, channels = (x.meta.shape[0], x.meta.shape[1]) if x.meta.ndim == 4 else (1, x.meta.shape[1])
    step = steps.Affine(
        source=place_of(x), result=place_of(result), images=images, pixels=x.meta.numel() // images // channels,
        channels=channels, source_scale=source.scale, source_shift=-source.scale * source.zero_point,
        scale=draft.kept(scale), shift=draft.kept(shift), inverse=inverse(grid.scale), zero=grid.zero_point,
        low=max(grid.quant_min, grid.zero_point) if module.relu else grid.quant_min, high=grid.quant_max,
    )  # fmt: skip
    draft.emit(step, x, result)
    return result


def normalized(draft: Draft, step: steps.Normalization, x: View) -> View:
    """Emit a step that normalises each row of a value (..., features)."""
    result = draft.new(x.meta.shape, torch.float32)
    x, rows = draft.rows(x)
    step.rows, step.channels = rows.meta.shape
    step.source = place_of_rows(rows)
    step.result = steps.Place(result.buffer.index, 0, 4 * step.channels, 0)
    step.kind, step.inverse, step.high = steps.FLOAT, 1.0, 255
    draft.emit(step, x, result)
    return result
