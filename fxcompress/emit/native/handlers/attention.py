"""Products of real matrices, softmax, and attention: made of both, or on bytes in one step."""

from __future__ import annotations

from typing import Any

import torch

from fxcompress.emit.cpu_int8 import Int8Attention
from fxcompress.emit.cpu_numbers import broadcast, inverse
from fxcompress.emit.native import steps
from fxcompress.emit.native.draft import Draft
from fxcompress.emit.native.handlers.normalization import normalized
from fxcompress.emit.native.memory import View
from fxcompress.emit.native.places import start_of
from fxcompress.emit.native.plan import Unplanned
from fxcompress.quant.spec import Grid

#: With more keys or features, sums of products would not fit 32 bits.
_MOST = 2**15


def matmul(draft: Draft, given: dict[str, Any]) -> View:
    """A product of matrices (..., rows, columns)."""
    left, right = given["input"], given["other"]
    if not isinstance(left, View) or not isinstance(right, View) or min(left.meta.ndim, right.meta.ndim) < 2:
        raise Unplanned
    outer = broadcast(left.meta.shape[:-2], right.meta.shape[:-2])
    result = draft.new((*outer, left.meta.shape[-2], right.meta.shape[-1]), torch.float32)
    _multiply(draft, left, right, result, 1.0)
    return result


def attention(draft: Draft, given: dict[str, Any]) -> View:
    """Scaled dot-product attention without a mask."""
    query, key, value = given["query"], given["key"], given["value"]
    plain = given["attn_mask"] is None and not given["is_causal"] and not given.get("enable_gqa")
    if not plain or given["dropout_p"] or not all(isinstance(one, View) for one in (query, key, value)):
        raise Unplanned
    if query.meta.ndim != 4 or query.meta.shape[:2] != key.meta.shape[:2]:
        raise Unplanned
    images, heads, count, width = query.meta.shape
    scale = width**-0.5 if given["scale"] is None else given["scale"]
    scores = draft.new((images, heads, count, key.meta.shape[2]), torch.float32)
    _multiply(draft, query, key.other(key.meta.transpose(2, 3)), scores, scale)
    weights = softmax(draft, {"input": scores, "dim": -1})
    made = draft.new((images, count, heads, value.meta.shape[3]), torch.float32)  # as the next layer wants it
    result = made.other(made.meta.transpose(1, 2))
    _multiply(draft, weights, value, result, 1.0)
    return result


def int8_attention(
    draft: Draft, module: Int8Attention, query: View, key: View, value: View, mask: View | None = None
) -> View:
    """Attention on bytes, of real numbers (images, ..., length, features) with up to three dimensions in front."""
    views = [_feature_rows(draft, one) for one in (query, key, value)]
    *outer, queries, depth = query.meta.shape
    keys, width = value.meta.shape[-2:]
    alike = all(one.meta.shape[: len(outer) - 1] == query.meta.shape[: len(outer) - 1] for one in views)
    heads, key_heads, value_heads = (one.meta.shape[-3] for one in views)
    shared = heads == key_heads or (module.enable_gqa and heads % key_heads == 0)
    if not alike or len({one.meta.ndim for one in views}) != 1 or key_heads != value_heads or not shared:
        raise Unplanned
    if max(keys, depth) > _MOST:
        raise Unplanned
    output, scale = module.output, depth**-0.5 if module.scale is None else module.scale
    # Heads behind the length, as the next layer wants them.
    made = draft.new((*outer[:-1], queries, heads, width), torch.float32 if output is None else torch.uint8)
    result = made.other(made.meta.transpose(-3, -2))
    step = steps.Attention(
        key_heads=key_heads, rows=queries, keys=keys, depth=depth, width=width, mask_kind=steps.NOTHING,
        causal=int(module.is_causal), factor=module.query.scale * module.key.scale * scale,
        value_scale=module.value.scale, kind=steps.FLOAT if output is None else steps.BYTES, inverse=1.0,
    )  # fmt: skip
    for position, size in enumerate([1] * (3 - len(outer)) + outer):
        step.sizes[position] = size
    for name, view in zip(("query", "key", "value", "result"), (*views, result), strict=True):
        _set_distances(step, name, view)
    for name, grid in (("query_", module.query), ("key_", module.key), ("value_", module.value), ("", output)):
        if grid is not None:
            _set_numbers(step, name, grid)
    if mask is not None:
        views.append(_set_mask(draft, step, mask, (*outer, queries, keys)))
    draft.emit(step, *views, result)
    return result


def _feature_rows(draft: Draft, view: View) -> View:
    """Real numbers with the features of each row in one piece."""
    if view.meta.dtype != torch.float32 or not 3 <= view.meta.ndim <= 5 or view.meta.numel() == 0:
        raise Unplanned
    return view if view.meta.stride(-1) == 1 or view.meta.shape[-1] == 1 else draft.contiguous(view)


def _set_mask(draft: Draft, step: steps.Attention, mask: View, shape: tuple[int, ...]) -> View:
    """Let attention read a mask, with the keys of each query in one piece."""
    if mask.meta.dtype not in (torch.float32, torch.bool):
        raise Unplanned
    draft.plan.mixes |= mask.meta.ndim < len(shape) and mask.buffer.place != "constant"
    if mask.meta.shape[-1] != shape[-1] or mask.meta.stride(-1) != 1:
        mask = draft.contiguous(mask.other(mask.meta.expand(*mask.meta.shape[:-1], shape[-1])))
    step.mask_kind = steps.FLOAT if mask.meta.dtype == torch.float32 else steps.BYTES
    _set_distances(step, "mask", mask.other(mask.meta.expand(shape)))
    return mask


def _set_distances(step: steps.Attention, name: str, view: View) -> None:
    """Where an operand lies, and the distances of what stands in front of its rows, and of the rows."""
    *outer, row, _ = view.strides()
    setattr(step, name, start_of(view))
    setattr(step, f"{name}_row", row)
    for position, distance in enumerate([0] * (3 - len(outer)) + outer):
        getattr(step, f"{name}_outer")[position] = distance


def _set_numbers(step: steps.Attention, prefix: str, grid: Grid) -> None:
    """How real numbers become integers."""
    setattr(step, f"{prefix}inverse", inverse(grid.scale))
    setattr(step, f"{prefix}zero", grid.zero_point)
    setattr(step, f"{prefix}low", grid.quant_min)
    setattr(step, f"{prefix}high", grid.quant_max)


def _multiply(draft: Draft, left: View, right: View, result: View, factor: float) -> None:
    """Emit result = factor * left @ right for each index of the outer dimensions."""
    if any(view.meta.dtype != torch.float32 or view.meta.numel() == 0 for view in (left, right)):
        raise Unplanned
    outer = result.meta.shape[:-2]
    draft.plan.mixes |= min(left.meta.ndim, right.meta.ndim) < 3 or left.meta.ndim != right.meta.ndim
    loops: list[tuple[int, ...]] = [(1, 0, 0, 0)] * (3 - len(outer))
    spread = [view.meta.expand(*outer, *view.meta.shape[-2:]).stride() for view in (left, right, result)]
    loops += [(size, *(4 * strides[i] for strides in spread)) for i, size in enumerate(outer)]
    if len(loops) > 3:
        loops = [loop for loop in loops if loop[0] > 1]
        loops = [(1, 0, 0, 0)] * (3 - len(loops)) + loops
    if len(loops) > 3:
        raise Unplanned
    step = steps.Product(
        left=start_of(left), right=start_of(right), result=start_of(result), rows=result.meta.shape[-2],
        columns=result.meta.shape[-1], depth=left.meta.shape[-1], left_row=left.strides()[-2],
        left_depth=left.strides()[-1], right_depth=right.strides()[-2], right_column=right.strides()[-1],
        result_row=result.strides()[-2], factor=factor,
    )  # fmt: skip
    for i, (size, *strides) in enumerate(loops):
        step.sizes[i] = size
        step.left_outer[i], step.right_outer[i], step.result_outer[i] = strides
    draft.emit(step, left, right, result)


def softmax(draft: Draft, given: dict[str, Any]) -> View:
    """Softmax along the last dimension."""
    x = given["input"]
    if not isinstance(x, View) or x.meta.dtype != torch.float32 or x.meta.numel() == 0 or given.get("dtype"):
        raise Unplanned
    if given["dim"] is None or given["dim"] % x.meta.ndim != x.meta.ndim - 1:
        raise Unplanned
    return normalized(draft, steps.Normalization(softmax=1), x)
