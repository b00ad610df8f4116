"""What computes nothing: views, concatenations, padding, and rolling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_map

from fxcompress.emit.native import steps
from fxcompress.emit.native.draft import Draft
from fxcompress.emit.native.memory import View
from fxcompress.emit.native.places import place_of, side_by_side
from fxcompress.emit.native.plan import Unplanned
from fxcompress.emit.native.slots import joined
from fxcompress.graph import ops

#: Kinds whose result is, or can be, a view of their input.
VIEWS = frozenset(
    {"flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "getitem", "split", "chunk", "unbind",
     "narrow", "select", "unflatten", "expand", "expand_as", "view_as", "identity", "dropout"}
)  # fmt: skip


def view(draft: Draft, given: dict[str, Any]) -> Any:
    """A view of the node's only tensor; of a copy where the tensor does not lie as the view wants it.

    The node itself is called, on tensors without memory; its arguments by name are not needed.
    """
    node = draft.node
    tensors = [draft.values[one] for one in node.all_input_nodes if isinstance(draft.values[one], View)]
    if not tensors:  # a piece of a split
        container, index = draft.arguments(node.args)
        return container[index]
    if len(tensors) != 1:
        raise Unplanned
    if ops.kind(node) in ("identity", "dropout"):
        return tensors[0]
    found = _seen(draft, node, tensors[0])
    if found is not None:
        return found
    copied = _reshaped_images(draft, tensors[0], draft.recorded[node])
    return copied if copied is not None else _seen(draft, node, draft.contiguous(tensors[0]))


def _seen(draft: Draft, node: fx.Node, view: View) -> Any:
    """The node's result as a view of its only tensor; None if it would need a copy."""
    replace = lambda value: view.meta if isinstance(value, View) else value  # noqa: E731
    arguments, keywords = tree_map(replace, draft.arguments((node.args, node.kwargs)), is_leaf=_is_view)
    if node.op == "call_method":
        result = getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
    else:
        result = cast("Callable[..., Any]", node.target)(*arguments, **keywords)
    leaves, structure = tree_flatten(result)
    if any(leaf.untyped_storage()._cdata != view.meta.untyped_storage()._cdata for leaf in leaves):
        return None
    return structure.unflatten([view.other(leaf) for leaf in leaves])


def _reshaped_images(draft: Draft, view: View, result: Any) -> View | None:
    """Images in a new shape that need a copy, with their channels side by side; None if these are none.

    The copy is done in the shape of the source, so that only dimensions may be joined that the result can split.
    """
    if not isinstance(result, torch.Tensor) or result.ndim != 4 or view.meta.stride(-1) == 1:
        return None
    copy = draft.new(result.shape, result.dtype, images=True)
    try:
        split = copy.meta.view(view.meta.shape)
    except RuntimeError:
        return None
    draft.copy(view, copy.other(split))
    return copy


def cat(draft: Draft, given: dict[str, Any]) -> View:
    """A concatenation; nothing is copied if the pieces have been made in place."""
    in_place = _in_slot(draft, draft.node)
    return in_place if in_place is not None else _copied_together(draft, list(given["tensors"]), int(given["dim"]))


def _copied_together(draft: Draft, views: list[Any], dim: int) -> View:
    if not all(isinstance(view, View) for view in views) or len({view.meta.dtype for view in views}) > 1:
        raise Unplanned
    views = [view for view in views if view.meta.numel()]
    if not views:
        raise Unplanned
    shape = list(views[0].meta.shape)
    dim = dim % len(shape)
    shape[dim] = sum(view.meta.shape[dim] for view in views)
    result = draft.new(shape, views[0].meta.dtype, images=side_by_side(views[0].meta))
    start = 0
    for view in views:
        count = view.meta.shape[dim]
        draft.copy(view, result.other(result.meta.narrow(dim, start, count)))
        start += count
    return result


def _in_slot(draft: Draft, node: fx.Node) -> View | None:
    """A concatenation whose pieces were made in place, but for those that have to be copied."""
    whole, start = draft.slot(node), 0
    if whole is None:
        return None
    for piece in joined(node, draft.recorded):
        view = draft.values[piece]
        slot = whole.other(whole.meta.narrow(1, start, view.meta.shape[1]))
        if view.buffer is not slot.buffer or view.offset != slot.offset:
            draft.copy(view, slot)
        start += view.meta.shape[1]
    return whole


def pad(draft: Draft, given: dict[str, Any]) -> View:
    """Padding with one number."""
    x, amounts, value = given["input"], list(given["pad"]), given["value"] or 0
    if not isinstance(x, View) or given["mode"] != "constant" or min(amounts, default=0) < 0:
        raise Unplanned
    if not any(amounts):
        return x
    if x.meta.dtype != torch.uint8 and value:
        raise Unplanned
    shape = list(x.meta.shape)
    starts = [0] * len(shape)
    for index in range(len(amounts) // 2):
        before, behind = amounts[2 * index : 2 * index + 2]
        shape[-1 - index] += before + behind
        starts[-1 - index] = before
    result = draft.new(shape, x.meta.dtype, images=side_by_side(x.meta))
    draft.emit(steps.Fill(result=place_of(result), bytes=result.buffer.bytes, value=int(value)), result)
    inside = result.meta
    for dim, start in enumerate(starts):
        inside = inside.narrow(dim, start, x.meta.shape[dim])
    draft.copy(x, result.other(inside))
    return result


def roll(draft: Draft, given: dict[str, Any]) -> View:
    """Rolling along some dimensions."""
    x, shifts, dims = given["input"], given["shifts"], given["dims"]
    if not isinstance(x, View) or dims is None or x.meta.numel() == 0:
        raise Unplanned
    shifts, dims = ([one] if isinstance(one, int) else list(one) for one in (shifts, dims))
    result = draft.new(x.meta.shape, x.meta.dtype, images=side_by_side(x.meta))
    pieces = [(x.meta, result.meta)]
    for shift, dim in zip(shifts, dims, strict=True):
        size = x.meta.shape[dim]
        cut = size - shift % size  # what lies before it moves to the end
        pieces = [
            (source.narrow(dim, start, count), target.narrow(dim, to, count))
            for source, target in pieces
            for start, count, to in ((0, cut, size - cut), (cut, size - cut, 0)) if count
        ]  # fmt: skip
    for source, target in pieces:
        draft.copy(x.other(source), result.other(target))
    return result


def _is_view(value: Any) -> bool:
    return isinstance(value, View)
