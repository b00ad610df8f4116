"""From real numbers to bytes and back."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fxcompress.emit.cpu_int8 import Dequantize, Quantize
from fxcompress.emit.cpu_numbers import channels_last_strides, inverse
from fxcompress.emit.native import steps
from fxcompress.emit.native.draft import Draft
from fxcompress.emit.native.handlers.pointwise import chain
from fxcompress.emit.native.memory import Buffer, View, meta_tensor
from fxcompress.emit.native.places import place_of, side_by_side
from fxcompress.emit.native.plan import Unplanned
from fxcompress.quant.spec import Grid


def quantize(draft: Draft, module: Quantize, x: View) -> View:
    """Bytes on a grid, of real numbers."""
    meta = x.meta
    if meta.dtype != torch.float32 or meta.numel() == 0:
        raise Unplanned
    if _stored_as_bytes(draft, x, module.grid):
        return x.other(meta_tensor(meta.shape, torch.uint8, meta.stride()))
    images = meta.ndim == 4 and not meta.is_contiguous()
    images = images or (meta.ndim == 4 and x.buffer.place == "input")
    if images and meta.stride() != channels_last_strides(meta.shape):
        result = draft.new(meta.shape, torch.uint8, images=True)
        _enter(draft, x, result, module.grid)
    else:
        result = draft.made(meta.shape, torch.uint8, images=images)
        chain(draft, result, module.grid, [(steps.LOAD, x, None)])
    return result


def dequantize(draft: Draft, module: Dequantize, x: View) -> View:
    """Real numbers, of bytes on a grid."""
    result = draft.new(x.meta.shape, torch.float32, images=side_by_side(x.meta))
    chain(draft, result, None, [(steps.LOAD, x, module.grid)])
    return result


def _stored_as_bytes(draft: Draft, x: View, grid: Grid) -> bool:
    """Let the step that makes a value store it as bytes, if nothing else reads it."""
    step = draft.plan.items[-1] if draft.plan.items else None
    source = draft.node.args[0]
    if (
        not isinstance(step, (steps.Normalization, steps.Pointwise))
        or step.kind != steps.FLOAT
        or step.result.buffer != x.buffer.index
        or not isinstance(source, fx.Node)
        or not _only_read_here(draft, source, x.buffer)
        or x.offset
    ):
        return False
    step.kind, step.inverse, step.zero = steps.BYTES, inverse(grid.scale), grid.zero_point
    step.low, step.high = grid.quant_min, grid.quant_max
    step.result.pixel, step.result.image = step.result.pixel // 4, step.result.image // 4
    x.buffer.bytes //= 4
    stored = x.other(meta_tensor(x.meta.shape, torch.uint8, x.meta.stride()))
    draft.plan.views = [stored if view.buffer is x.buffer else view for view in draft.plan.views]
    return True


def _only_read_here(draft: Draft, node: fx.Node, buffer: Buffer) -> bool:
    """Whether nobody else reads a buffer, by way of views or directly."""
    holders = [
        one for one, value in draft.values.items()
        if any(isinstance(leaf, View) and leaf.buffer is buffer for leaf in tree_leaves(value))
    ]  # fmt: skip
    return all(len(one.users) == 1 for one in holders) and node in holders


def _enter(draft: Draft, x: View, result: View, grid: Grid) -> None:
    n, c, h, w = x.meta.shape
    stride = x.meta.stride()
    step = steps.Entrance(
        source=place_of(x), result=place_of(result), images=n, height=h, width=w, channels=c, stride_image=stride[0],
        stride_channel=stride[1], stride_row=stride[2], stride_column=stride[3],
        result_row=result.strides()[2], inverse=inverse(grid.scale), zero=grid.zero_point, low=grid.quant_min,
        high=grid.quant_max,
    )  # fmt: skip
    draft.emit(step, x, result)
