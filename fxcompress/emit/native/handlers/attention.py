"""Products of real matrices, softmax, and attention, which is made of both."""

from __future__ import annotations

from typing import Any

import torch

from fxcompress.emit.cpu_numbers import broadcast
from fxcompress.emit.native import steps
from fxcompress.emit.native.draft import Draft
from fxcompress.emit.native.handlers.normalization import normalized
from fxcompress.emit.native.memory import View
from fxcompress.emit.native.places import start_of
from fxcompress.emit.native.plan import Unplanned


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
