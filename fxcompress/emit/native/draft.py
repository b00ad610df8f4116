"""A plan that is being made: what the planner and its handlers make values, copies and steps with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.emit.cpu_numbers import channels_last_strides
from fxcompress.emit.native import packing, steps
from fxcompress.emit.native.memory import Buffer, View, extent, meta_tensor
from fxcompress.emit.native.places import place_of
from fxcompress.emit.native.plan import Plan, PythonCall, Unplanned
from fxcompress.emit.native.slots import find_slots


class Draft:
    """A plan up to a node, and what is needed to go on.

    A handler asks for its inputs as its step wants them (`image`, `rows`, `contiguous`), for a place for its result
    (`made` for the node's own value, `new` for any other), keeps what the step points to (`kept`), and calls `emit`.

    Attributes:
        plan: what has been planned.
        node: the node whose turn it is.
        values: what each node made: a view, a structure that holds views, or what is no tensor.
        recorded: what each node makes, tensors without memory (`meta`) for tensors.
        packed: weights as the kernels want them, by layer; shared by the plans for all shapes.
    """

    def __init__(self, graph: fx.Graph, recorded: dict[fx.Node, Any], packed: dict[Any, Any]) -> None:
        self.recorded, self.packed = recorded, packed
        self.plan = Plan()
        self.values: dict[fx.Node, Any] = {}
        self.node: fx.Node = next(iter(graph.nodes))
        self._slots = find_slots(graph, recorded)
        self._wholes: dict[fx.Node, View] = {}

    # Memory

    def buffer(self, place: str, size: int) -> Buffer:
        """Return memory for a value; `place` says what provides it, see `Buffer`."""
        buffer = Buffer(len(self.plan.buffers), place, size)
        self.plan.buffers.append(buffer)
        return buffer

    def new(self, shape: Sequence[int], dtype: torch.dtype, images: bool = False) -> View:
        """A new value; `images` for one whose channels shall lie side by side."""
        meta = meta_tensor(shape, dtype, channels_last_strides(shape) if images else None)
        return View(self.buffer("arena", extent(meta)), meta)

    def made(self, shape: Sequence[int], dtype: torch.dtype, images: bool = False) -> View:
        """Where the value of the node itself goes: its slot if it has one."""
        slot = self.slot(self.node) if images and dtype == torch.uint8 else None
        return slot if slot is not None and list(slot.meta.shape) == list(shape) else self.new(shape, dtype, images)

    def slot(self, node: fx.Node) -> View | None:
        """Return the place of a node's value in the whole that it becomes a part of; None if there is no whole."""
        slot = self._slots.get(node)
        if slot is None:
            return None
        if slot.whole not in self._wholes:
            self._wholes[slot.whole] = self.new(self.recorded[slot.whole].shape, torch.uint8, images=True)
        whole = self._wholes[slot.whole]
        return whole.other(whole.meta.narrow(1, slot.start, self.recorded[node].shape[1]))

    def constant(self, value: Any) -> Any:
        """Return a tensor of the model's as a view; what is no tensor as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        meta = meta_tensor(value.shape, value.dtype, value.stride())
        view = View(self.buffer("constant", extent(meta)), meta)
        self.plan.constants[view.buffer.index] = value.detach()
        return view

    # What the plan does and holds

    def kept(self, tensor: torch.Tensor) -> Any:
        """Return the address of a tensor, which the plan keeps alive."""
        self.plan.keep.append(tensor)
        return packing.address(tensor)

    def emit(self, step: steps.Step, *views: View) -> None:
        """Add a step; `views` are all that it reads and writes."""
        step.op = step.number
        for view in views:
            view.buffer.touch(len(self.plan.items))
        self.plan.views += views
        self.add(step)

    def add(self, item: steps.Step | PythonCall) -> None:
        """Add a step or a call, for the node whose turn it is."""
        self.plan.items.append(item)
        self.plan.names.append(self.node.name)

    def arguments(self, arguments: Any) -> Any:
        """Return arguments of a node with the values of nodes in their places."""
        return fx.map_arg(arguments, lambda node: self.values[node])

    # Copies, and values as steps want them

    def copy(self, source: View, result: View) -> None:
        """Copy between views of one shape.

        Raises:
            Unplanned: it takes more loops than the kernel has.
        """
        size = source.meta.element_size()
        steps_ = sorted(
            zip(source.meta.shape, source.strides(), result.strides(), strict=True), key=lambda one: -one[2]
        )
        dims: list[tuple[int, int, int]] = []
        for count, from_, to in steps_:
            if count == 1:
                continue
            if dims and dims[-1][1] == from_ * count and dims[-1][2] == to * count:
                dims[-1] = (dims[-1][0] * count, from_, to)
            else:
                dims.append((count, from_, to))
        piece = size
        if dims and dims[-1][1:] == (size, size):
            piece = dims.pop()[0] * size
        if len(dims) > 4:
            raise Unplanned
        dims = [(1, 0, 0)] * (4 - len(dims)) + dims
        in_turn = dims[-1][::2] == (2, 1) and dims[-2][1:] == (1, 2)  # the kernel has a loop of its own for it
        if dims[-1][0] < dims[-2][0] and not in_turn:  # threads share the outer loops
            dims = [*dims[:-2], dims[-1], dims[-2]]
        step = steps.Copy(source=place_of(source), result=place_of(result), bytes=piece)
        for index, (count, from_, to) in enumerate(dims):
            step.sizes[index], step.from_[index], step.to[index] = count, from_, to
        self.emit(step, source, result)

    def contiguous(self, view: View) -> View:
        """Return a copy of a value in the order of its dimensions."""
        copy = self.new(view.meta.shape, view.meta.dtype)
        self.copy(view, copy)
        return copy

    def image(self, view: View, room: bool = False) -> View:
        """Return a value (images, channels, height, width) whose channels lie side by side, and with room behind it.

        Raises:
            Unplanned: it is no 8-bit image.
        """
        meta = view.meta
        if meta.ndim != 4 or meta.dtype != torch.uint8:
            raise Unplanned
        moved = room and view.buffer.place != "arena"
        if not moved and (meta.stride(1) == 1 or meta.shape[1] == 1):
            return view
        copy = self.new(meta.shape, meta.dtype, images=True)
        self.copy(view, copy)
        return copy

    def rows(self, view: View, room: bool = False) -> tuple[View, View]:
        """Return a value (..., features), with room behind it: as it is, and as (rows, features)."""
        self.plan.mixes |= view.meta.ndim < 2
        if not room or view.buffer.place == "arena":
            flat = view.meta.reshape(-1, view.meta.shape[-1])
            shared = flat.untyped_storage()._cdata == view.meta.untyped_storage()._cdata
            if shared and (flat.stride(1) == 1 or flat.shape[1] == 1):
                return view, view.other(flat)
        copy = self.contiguous(view)
        return copy, copy.other(copy.meta.view(-1, copy.meta.shape[-1]))
