"""From a lowered graph, with the shapes of one call, to a plan: steps for the kernels, and places for all values.

Each node becomes steps, a view of what another node made, or, where there are no kernels for it, a call of the same
function or module in Python, on tensors that lie in the plan's memory.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from fxcompress.emit.cpu_dynamic import MOST_FEATURES
from fxcompress.emit.cpu_int8 import (
    Dequantize,
    Int8Add,
    Int8Affine,
    Int8Attention,
    Int8AvgPool,
    Int8Conv,
    Int8DynamicLinear,
    Int8Linear,
    Int8MaxPool,
    Int8Mul,
    Int8WeightOnlyLinear,
    Quantize,
    QuantizedLayer,
    QuantizeRows,
    activation_of,
)
from fxcompress.emit.cpu_numbers import broadcast, channels_last_strides, inverse
from fxcompress.emit.native import packing, steps
from fxcompress.emit.native.memory import Buffer, View, extent, meta_tensor
from fxcompress.emit.native.slots import find_slots, joined
from fxcompress.graph import edit, ops
from fxcompress.quant.folding import scale_and_shift
from fxcompress.quant.spec import Grid

#: Kinds whose result is, or can be, a view of their input.
_VIEWS = frozenset(
    {"flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "getitem", "split", "chunk", "unbind",
     "narrow", "select", "unflatten", "expand", "expand_as", "view_as", "identity", "dropout"}
)  # fmt: skip

_ARITHMETIC = {"add": steps.ADD, "sub": steps.SUBTRACT, "mul": steps.MULTIPLY, "div": steps.DIVIDE}

#: Kinds that make one number of the numbers at each place.
ELEMENTWISE = frozenset({
    *_ARITHMETIC, "relu", "relu6", "hardtanh", "clamp", "gelu", "leaky_relu", "hardswish", "silu", "tanh", "sigmoid",
    "hardsigmoid",
})  # fmt: skip

#: Tensors of which only the shape is not known.
_FILLED: dict[str, Callable[..., torch.Tensor]] = {"zeros": torch.zeros, "ones": torch.ones}

#: With more keys, sums of weights times values would not fit 32 bits.
_MOST_KEYS = 2**15

_LARGEST = torch.finfo(torch.float32).max


class Unplanned(Exception):
    """There are no kernels for a node; it is run by Python."""


@dataclass(frozen=True)
class PythonCall:
    """A node that Python runs. `arguments` holds views in the places of tensors; `results` are views in order."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    results: list[View]
    name: str


@dataclass
class Plan:
    """What a call does, item by item, and what it needs.

    items: steps and Python calls, and names: of their nodes. inputs: views of the tensor arguments, in order.
    output: the graph's output, with views in the places of tensors. views: all that steps read and write.
    mixes: whether a step mixes what lies at different indices of the first dimension.
    keep: tensors whose addresses are written in steps. constants: buffers that are tensors of the model.
    """

    items: list[steps.Step | PythonCall] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    inputs: list[View] = field(default_factory=list)
    output: Any = None
    views: list[View] = field(default_factory=list)
    mixes: bool = False
    keep: list[torch.Tensor] = field(default_factory=list)
    constants: dict[int, torch.Tensor] = field(default_factory=dict)


def make_plan(graph_module: fx.GraphModule, recorded: dict[fx.Node, Any], packed: dict[Any, Any]) -> Plan:
    """Plan the calls of a lowered graph whose inputs have certain shapes.

    Args:
        graph_module: the graph.
        recorded: what each node made in a call with such inputs; tensors without memory (`meta`) for tensors.
        packed: weights that were packed for other shapes, by layer; filled here.
    """
    return _Planner(graph_module, recorded, packed).run()


class _Planner:
    def __init__(self, graph_module: fx.GraphModule, recorded: dict[fx.Node, Any], packed: dict[Any, Any]) -> None:
        self.graph_module, self.recorded, self.packed = graph_module, recorded, packed
        self.plan = Plan()
        self.values: dict[fx.Node, Any] = {}
        self.slots = find_slots(graph_module.graph, recorded)
        self.wholes: dict[fx.Node, View] = {}
        self.node: fx.Node = next(iter(graph_module.graph.nodes))

    def run(self) -> Plan:
        for node in self.graph_module.graph.nodes:
            self.node = node
            self.values[node] = self._visit(node)
        return self.plan

    def _visit(self, node: fx.Node) -> Any:
        value = self.recorded.get(node)
        if node.op == "placeholder":
            return self._input(value)
        if node.op == "get_attr":
            return self._constant(edit.attribute(self.graph_module, str(node.target)))
        if node.op == "output":
            return self._output(node)
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)):
            return value  # sizes, and what is computed of them: fixed by the shapes that the plan is for
        try:
            return self._fixed(node, value) or self._native(node)
        except Unplanned:
            return self._python(node, value)

    def _fixed(self, node: fx.Node, value: Any) -> View | None:
        """A tensor that depends on shapes and on the model's own tensors only is computed once, here."""
        if not isinstance(value, torch.Tensor) or node.op == "call_module":
            return None
        kind = ops.kind(node)
        if kind in _FILLED:
            return cast("View", self._constant(_FILLED[kind](value.shape, dtype=value.dtype)))
        arguments, keywords = self._arguments(node.args), self._arguments(node.kwargs)
        views = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, View)]
        if not views or kind == "opaque" or any(one.buffer.place != "constant" for one in views):
            return None
        real = lambda leaf: self._real(leaf) if isinstance(leaf, View) else leaf  # noqa: E731
        arguments, keywords = tree_map(real, (arguments, keywords))
        with torch.no_grad():
            if node.op == "call_method":
                made = getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
            else:
                made = cast("Callable[..., Any]", node.target)(*arguments, **keywords)
        return cast("View", self._constant(made))

    def _real(self, view: View) -> torch.Tensor:
        """The numbers of a constant."""
        tensor, meta = self.plan.constants[view.buffer.index], view.meta
        return tensor.as_strided(meta.shape, meta.stride(), tensor.storage_offset() + meta.storage_offset())

    def _native(self, node: fx.Node) -> Any:
        module: Any = ops.submodule(node) if node.op == "call_module" else None
        if module is not None:
            handler = _MODULES.get(type(module))
            if handler is None:
                raise Unplanned
            return handler(self, module, *self._arguments(node.args))
        kind = ops.kind(node)
        if kind in _VIEWS:
            return self._view(node)
        if kind == "cat":
            given = {name: self._arguments(value) for name, value in ops.arguments(node).items()}
            in_place = self._in_slot(node)
            return in_place if in_place is not None else self._cat(list(given["tensors"]), int(given["dim"]))
        if kind in _MOVED:
            given = {name: self._arguments(value) for name, value in ops.arguments(node).items()}
            return _MOVED[kind](self, given)
        return self._function(node, kind)

    def _arguments(self, arguments: Any) -> Any:
        return fx.map_arg(arguments, lambda node: self.values[node])

    # Values that come from outside, and those that leave

    def _input(self, value: Any) -> Any:
        """The value of a placeholder: a view, or a structure that holds views."""
        leaves, structure = tree_flatten(value)
        found = [View(self._buffer("input", extent(leaf)), leaf) if isinstance(leaf, torch.Tensor) else leaf
                 for leaf in leaves]  # fmt: skip
        self.plan.inputs += [leaf for leaf in found if isinstance(leaf, View)]
        return structure.unflatten(found)

    def _constant(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        meta = meta_tensor(value.shape, value.dtype, value.stride())
        view = View(self._buffer("constant", extent(meta)), meta)
        self.plan.constants[view.buffer.index] = value.detach()
        return view

    def _output(self, node: fx.Node) -> None:
        self.plan.output = self._arguments(node.args[0])
        for leaf in tree_leaves(self.plan.output):
            if isinstance(leaf, View):
                self.plan.views.append(leaf)
                leaf.buffer.touch(len(self.plan.items))
                if leaf.buffer.place == "arena":
                    leaf.buffer.place = "output"

    def _python(self, node: fx.Node, value: Any) -> Any:
        arguments, keywords = self._arguments(node.args), self._arguments(node.kwargs)
        if node.op == "call_module":
            function: Callable[..., Any] = self.graph_module.get_submodule(str(node.target))
        elif node.op == "call_method":
            function = operator.methodcaller(str(node.target), *arguments[1:], **keywords)
            if any(isinstance(leaf, View) for leaf in tree_leaves((arguments[1:], keywords))):
                function = getattr(torch.Tensor, str(node.target))
            else:
                arguments, keywords = arguments[:1], {}
        else:
            function = cast("Callable[..., Any]", node.target)
        leaves, structure = tree_flatten(value)
        results = [
            View(self._buffer("python", extent(leaf)), leaf) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in leaves
        ]
        item = len(self.plan.items)
        for leaf in (*tree_leaves((arguments, keywords)), *results):
            if isinstance(leaf, View):
                leaf.buffer.touch(item)
        made = [leaf for leaf in results if isinstance(leaf, View)]
        self._add(PythonCall(function, arguments, keywords, made, node.name))
        return structure.unflatten(results)

    def _add(self, item: steps.Step | PythonCall) -> None:
        self.plan.items.append(item)
        self.plan.names.append(self.node.name)

    # Memory

    def _buffer(self, place: str, size: int) -> Buffer:
        buffer = Buffer(len(self.plan.buffers), place, size)
        self.plan.buffers.append(buffer)
        return buffer

    def _new(self, shape: Sequence[int], dtype: torch.dtype, images: bool = False) -> View:
        """A new value; `images` for one whose channels shall lie side by side."""
        meta = meta_tensor(shape, dtype, channels_last_strides(shape) if images else None)
        return View(self._buffer("arena", extent(meta)), meta)

    def _made(self, shape: Sequence[int], dtype: torch.dtype, images: bool = False) -> View:
        """Where the value of the node itself goes: its slot if it has one."""
        slot = self._slot(self.node) if images and dtype == torch.uint8 else None
        return slot if slot is not None and list(slot.meta.shape) == list(shape) else self._new(shape, dtype, images)

    def _emit(self, step: steps.Step, *views: View) -> None:
        step.op = step.number
        for view in views:
            view.buffer.touch(len(self.plan.items))
        self.plan.views += views
        self._add(step)

    def _kept(self, tensor: torch.Tensor) -> Any:
        self.plan.keep.append(tensor)
        return packing.address(tensor)

    # Views and copies

    def _view(self, node: fx.Node) -> Any:
        tensors = [self.values[one] for one in node.all_input_nodes if isinstance(self.values[one], View)]
        if not tensors:  # a piece of a split
            container, index = self._arguments(node.args)
            return container[index]
        if len(tensors) != 1:
            raise Unplanned
        if ops.kind(node) in ("identity", "dropout"):
            return tensors[0]
        found = self._seen(node, tensors[0])
        if found is not None:
            return found
        copied = self._reshaped_images(tensors[0], self.recorded[node])
        return copied if copied is not None else self._seen(node, self._contiguous(tensors[0]))

    def _reshaped_images(self, view: View, result: Any) -> View | None:
        """Images in a new shape that need a copy, with their channels side by side; None if these are none.

        The copy is done in the shape of the source, so that only dimensions may be joined that the result can split.
        """
        if not isinstance(result, torch.Tensor) or result.ndim != 4 or view.meta.stride(-1) == 1:
            return None
        copy = self._new(result.shape, result.dtype, images=True)
        try:
            split = copy.meta.view(view.meta.shape)
        except RuntimeError:
            return None
        self._copy(view, copy.other(split))
        return copy

    def _seen(self, node: fx.Node, view: View) -> Any:
        """The node's result as a view of its only tensor; None if it would need a copy."""
        replace = lambda value: view.meta if isinstance(value, View) else value  # noqa: E731
        arguments, keywords = tree_map(replace, self._arguments((node.args, node.kwargs)), is_leaf=_is_view)
        if node.op == "call_method":
            result = getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
        else:
            result = cast("Callable[..., Any]", node.target)(*arguments, **keywords)
        leaves, structure = tree_flatten(result)
        if any(leaf.untyped_storage()._cdata != view.meta.untyped_storage()._cdata for leaf in leaves):
            return None
        return structure.unflatten([view.other(leaf) for leaf in leaves])

    def _contiguous(self, view: View) -> View:
        copy = self._new(view.meta.shape, view.meta.dtype)
        self._copy(view, copy)
        return copy

    def _copy(self, source: View, result: View) -> None:
        """Copy between views of one shape."""
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
        step = steps.Copy(source=_place(source), result=_place(result), bytes=piece)
        for index, (count, from_, to) in enumerate(dims):
            step.sizes[index], step.from_[index], step.to[index] = count, from_, to
        self._emit(step, source, result)

    def _cat(self, views: list[Any], dim: int) -> View:
        if not all(isinstance(view, View) for view in views) or len({view.meta.dtype for view in views}) > 1:
            raise Unplanned
        views = [view for view in views if view.meta.numel()]
        if not views:
            raise Unplanned
        shape = list(views[0].meta.shape)
        dim = dim % len(shape)
        shape[dim] = sum(view.meta.shape[dim] for view in views)
        result = self._new(shape, views[0].meta.dtype, images=_side_by_side(views[0].meta))
        start = 0
        for view in views:
            count = view.meta.shape[dim]
            self._copy(view, result.other(result.meta.narrow(dim, start, count)))
            start += count
        return result

    def _in_slot(self, node: fx.Node) -> View | None:
        """A concatenation whose pieces were made in place, but for those that have to be copied."""
        whole, start = self._slot(node), 0
        if whole is None:
            return None
        for piece in joined(node, self.recorded):
            view = self.values[piece]
            slot = whole.other(whole.meta.narrow(1, start, view.meta.shape[1]))
            if view.buffer is not slot.buffer or view.offset != slot.offset:
                self._copy(view, slot)
            start += view.meta.shape[1]
        return whole

    def _slot(self, node: fx.Node) -> View | None:
        """The place of a value in the whole that it becomes a part of."""
        slot = self.slots.get(node)
        if slot is None:
            return None
        if slot.whole not in self.wholes:
            self.wholes[slot.whole] = self._new(self.recorded[slot.whole].shape, torch.uint8, images=True)
        whole = self.wholes[slot.whole]
        return whole.other(whole.meta.narrow(1, slot.start, self.recorded[node].shape[1]))

    def _pad(self, given: dict[str, Any]) -> View:
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
        result = self._new(shape, x.meta.dtype, images=_side_by_side(x.meta))
        self._emit(steps.Fill(result=_place(result), bytes=result.buffer.bytes, value=int(value)), result)
        inside = result.meta
        for dim, start in enumerate(starts):
            inside = inside.narrow(dim, start, x.meta.shape[dim])
        self._copy(x, result.other(inside))
        return result

    def _roll(self, given: dict[str, Any]) -> View:
        x, shifts, dims = given["input"], given["shifts"], given["dims"]
        if not isinstance(x, View) or dims is None or x.meta.numel() == 0:
            raise Unplanned
        shifts, dims = ([one] if isinstance(one, int) else list(one) for one in (shifts, dims))
        result = self._new(x.meta.shape, x.meta.dtype, images=_side_by_side(x.meta))
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
            self._copy(x.other(source), result.other(target))
        return result

    def _image(self, view: View, room: bool = False) -> View:
        """A value (images, channels, height, width) whose channels lie side by side, and with room behind it."""
        meta = view.meta
        if meta.ndim != 4 or meta.dtype != torch.uint8:
            raise Unplanned
        moved = room and view.buffer.place != "arena"
        if not moved and (meta.stride(1) == 1 or meta.shape[1] == 1):
            return view
        copy = self._new(meta.shape, meta.dtype, images=True)
        self._copy(view, copy)
        return copy

    # Layers

    def _conv(self, module: Int8Conv, x: View, residual: View | None = None) -> View:
        if len(module.stride) == 1:
            lifted = None if residual is None else residual.other(residual.meta.unsqueeze(2))
            result = self._conv2d(module, x.other(x.meta.unsqueeze(2)), lifted, _flat_geometry(module))
            return result.other(result.meta.squeeze(2))
        if len(module.stride) != 2:
            raise Unplanned
        geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
        return self._conv2d(module, x, residual, geometry)

    def _conv2d(self, module: Int8Conv, x: View, residual: View | None, geometry: tuple[list[int], ...]) -> View:
        if x.meta.ndim != 4 or x.meta.numel() == 0:
            raise Unplanned
        kernel, stride, padding, dilation = geometry
        if math.prod(kernel) > steps.MAX_PLACES:
            raise Unplanned
        shape = [x.meta.shape[0], module.out_channels]
        for index in range(2):
            reach = dilation[index] * (kernel[index] - 1) + 1
            shape.append((x.meta.shape[2 + index] + 2 * padding[index] - reach) // stride[index] + 1)
        if residual is not None:
            residual = self._residual(residual, shape)
        result = self._result(module, shape, residual)
        if module.groups == module.in_channels == module.out_channels > 1 and residual is None:
            self._depthwise(module, x, result, geometry)
            return result
        channels = module.in_channels // module.groups
        in_rows = module.groups == 1 and channels % packing.DEPTH != 0 and kernel[1] > 1 and dilation[1] == 1
        if in_rows:  # a row of the window is one run of bytes
            x, padding = self._padded(x, padding, module.input.zero_point), [0, 0]
        else:
            joined = packing.joined_groups(module.out_channels, channels, module.groups)
            outside = packing.rounded_up(module.groups, joined) > module.groups or joined * channels % packing.DEPTH > 0
            x = self._image(x, outside)
        key = (module, "rows" if in_rows else "taps")
        if key not in self.packed:
            self.packed[key] = _packed_convolution(module, kernel, in_rows)
        weights, groups, group, run, bias, scale = self.packed[key]
        row, column = x.strides()[2], x.strides()[3]
        rows = packing.windows(x.meta.shape[2], kernel[0], stride[0], padding[0], dilation[0], shape[2], row)
        places = 1 if in_rows else kernel[1]
        columns = packing.windows(x.meta.shape[3], places, stride[1], padding[1], dilation[1], shape[3], column)
        step = steps.Convolution(
            source=_place(x), result=_place(result), images=shape[0], height=shape[2], width=shape[3],
            channels=module.out_channels, groups=groups, group_in=group * module.in_channels // module.out_channels,
            group_out=group, rows_of_window=kernel[0], columns_of_window=places,
            run=packing.rounded_up(run, packing.DEPTH), rows=self._kept(rows.contiguous()),
            columns=self._kept(columns.contiguous()),
            padding=self._kept(torch.full((run + packing.CHUNK,), module.input.zero_point, dtype=torch.uint8)),
            weights=self._kept(weights), group_weights=weights.numel() // groups,
            finish=self._finish(module, scale, bias, residual),
        )  # fmt: skip
        self._emit(step, x, result, *([residual] if residual else []))
        return result

    def _residual(self, view: View, shape: Sequence[int]) -> View:
        """What is added to images of a shape, with its channels side by side and its rows one after the other."""
        meta = view.meta
        if meta.shape != torch.Size(shape):
            raise Unplanned
        if meta.stride(1) == 1 and meta.stride(2) == meta.shape[3] * meta.stride(3):
            return view
        copy = self._new(shape, meta.dtype, images=True)
        self._copy(view, copy)
        return copy

    def _padded(self, x: View, padding: Sequence[int], value: int) -> View:
        """A copy of images with a margin."""
        n, c, h, w = x.meta.shape
        if not any(padding) and x.meta.stride(1) == 1 and x.meta.stride(3) == c and x.buffer.place == "arena":
            return x
        result = self._new((n, c, h + 2 * padding[0], w + 2 * padding[1]), torch.uint8, images=True)
        if any(padding):
            step = steps.Fill(result=_place(result), bytes=result.buffer.bytes, value=value)
            self._emit(step, result)
        inside = result.meta[:, :, padding[0] : padding[0] + h, padding[1] : padding[1] + w]
        self._copy(x, result.other(inside))
        return result

    def _depthwise(self, module: Int8Conv, x: View, result: View, geometry: tuple[list[int], ...]) -> None:
        kernel, stride, padding, dilation = geometry
        x = self._image(x)
        if module not in self.packed:
            bias = module._bias_with_zero_point()
            zeros = torch.zeros(module.out_channels)
            self.packed[module] = (
                packing.depthwise(module.weight.view(module.out_channels, *kernel)),
                packing.depthwise_vectors(zeros if bias is None else bias),
                packing.depthwise_vectors(module.weight_scale.double() * module.input.scale),
            )
        weights, bias, scale = self.packed[module]
        n, c, height, width = result.meta.shape
        row = x.strides()[2]
        rows = packing.windows(x.meta.shape[2], kernel[0], stride[0], padding[0], dilation[0], height, row)
        step = steps.Depthwise(
            source=_place(x), result=_place(result), images=n, height=height, width=width, channels=c,
            rows_of_window=kernel[0], columns_of_window=kernel[1], source_width=x.meta.shape[3], stride=stride[1],
            dilation=dilation[1], padding_left=padding[1], rows=self._kept(rows.contiguous()),
            padding=self._kept(torch.full((packing.CHUNK,), module.input.zero_point, dtype=torch.uint8)),
            weights=self._kept(weights), finish=self._finish(module, scale, bias, None),
        )  # fmt: skip
        self._emit(step, x, result)

    def _linear(self, module: Int8Linear, x: View, residual: View | None = None) -> View:
        shape = [*x.meta.shape[:-1], module.out_features]
        if x.meta.numel() == 0 or (residual is not None and list(residual.meta.shape) != shape):
            raise Unplanned
        x, rows = self._rows(x, room=module.in_features % packing.DEPTH > 0)
        if residual is not None:
            residual, added = self._rows(residual)
        result = self._result(module, shape, residual)
        if module not in self.packed:
            bias = module._bias_with_zero_point()
            zeros = torch.zeros(module.out_features)
            self.packed[module] = (
                packing.convolution(module.weight[None, :, None, :]),
                packing.vectors(zeros if bias is None else bias),
                packing.vectors(module.weight_scale.double() * module.input.scale),
            )
        weights, bias, scale = self.packed[module]
        count = x.meta.numel() // module.in_features
        step = steps.Convolution(
            source=_place(rows), result=_rows_place(result), images=1, height=1, width=count,
            channels=module.out_features, groups=1, group_out=module.out_features,
            rows_of_window=1, columns_of_window=1,
            run=packing.rounded_up(module.in_features, packing.DEPTH),
            rows=self._kept(torch.zeros(1, dtype=torch.int64)),
            columns=self._kept(torch.arange(count) * rows.strides()[0]),
            padding=self._kept(torch.zeros(packing.CHUNK, dtype=torch.uint8)),
            weights=self._kept(weights), group_weights=weights.numel(),
            finish=self._finish(module, scale, bias, None if residual is None else added),
        )  # fmt: skip
        self._emit(step, x, result, *([residual] if residual else []))
        return result

    def _quantize_rows(self, module: QuantizeRows, x: View) -> tuple[View, View, View]:
        if x.meta.dtype != torch.float32 or x.meta.numel() == 0:
            raise Unplanned
        q = self._new(x.meta.shape, torch.uint8)
        scales, zeros = (self._new((*x.meta.shape[:-1], 1), dtype) for dtype in (torch.float32, torch.int32))
        x, rows = self._rows(x)
        step = steps.RowEntrance(
            source=_rows_place(rows), result=steps.Place(q.buffer.index, 0, rows.meta.shape[1], 0),
            scales=steps.Place(scales.buffer.index, 0, 4, 0), zeros=steps.Place(zeros.buffer.index, 0, 4, 0),
            rows=rows.meta.shape[0], channels=rows.meta.shape[1], low=module.quant_min, high=module.quant_max,
        )  # fmt: skip
        self._emit(step, x, q, scales, zeros)
        return q, scales, zeros

    def _dynamic_linear(
        self, module: Int8DynamicLinear, quantized: tuple[View, View, View], residual: View | None = None
    ) -> View:
        if module.in_features > MOST_FEATURES:
            raise Unplanned
        q, scales, zeros = quantized
        if module not in self.packed:
            weights = packing.convolution(module.weight[None, :, None, :])
            self.packed[module] = (weights, *_scaled(module), packing.integer_vectors(module.column_sums()))
        weights, bias, scale, sums = self.packed[module]
        step = steps.RowLinear(
            run=packing.rounded_up(module.in_features, packing.DEPTH), weights=self._kept(weights),
            sums=self._kept(sums),
        )  # fmt: skip
        (scales, scale_rows), (zeros, zero_rows) = self._rows(scales), self._rows(zeros)
        step.scales, step.zeros = _rows_place(scale_rows), _rows_place(zero_rows)
        return self._multiplied_rows(module, step, q, residual, (scale, bias), scales, zeros)

    def _weight_linear(self, module: Int8WeightOnlyLinear, x: View, residual: View | None = None) -> View:
        if x.meta.dtype != torch.float32:
            raise Unplanned
        if module not in self.packed:
            self.packed[module] = (packing.float_linear(module.weight), *_scaled(module))
        weights, bias, scale = self.packed[module]
        step = steps.WeightLinear(depth=module.in_features, weights=self._kept(weights))
        return self._multiplied_rows(module, step, x, residual, (scale, bias))

    def _multiplied_rows(
        self,
        module: QuantizedLayer,
        step: steps.RowLinear | steps.WeightLinear,
        x: View,
        residual: View | None,
        numbers: tuple[torch.Tensor, torch.Tensor],
        *read: View,
    ) -> View:
        """Emit a step over rows once its places and its finish are filled in; `read` is what else it reads."""
        shape = [*x.meta.shape[:-1], module.weight.shape[0]]
        if x.meta.numel() == 0 or not module.weight.numel():
            raise Unplanned
        if residual is not None:
            if list(residual.meta.shape) != shape:
                raise Unplanned
            residual, added = self._rows(residual)
        x, rows = self._rows(x, room=x.meta.dtype == torch.uint8)
        result = self._result(module, shape, residual)
        step.source, step.result = _rows_place(rows), _rows_place(result)
        step.rows, step.channels = rows.meta.shape[0], shape[-1]
        step.finish = self._finish(module, *numbers, None if residual is None else added)
        self._emit(step, x, result, *read, *([residual] if residual else []))
        return result

    def _rows(self, view: View, room: bool = False) -> tuple[View, View]:
        """A value (..., features), with room behind it: as it is, and as (rows, features)."""
        self.plan.mixes |= view.meta.ndim < 2
        if not room or view.buffer.place == "arena":
            flat = view.meta.reshape(-1, view.meta.shape[-1])
            shared = flat.untyped_storage()._cdata == view.meta.untyped_storage()._cdata
            if shared and (flat.stride(1) == 1 or flat.shape[1] == 1):
                return view, view.other(flat)
        copy = self._contiguous(view)
        return copy, copy.other(copy.meta.view(-1, copy.meta.shape[-1]))

    def _result(self, module: QuantizedLayer, shape: Sequence[int], residual: View | None) -> View:
        dtype = torch.float32 if module.output is None else torch.uint8
        if residual is not None and module.overwrite and residual.buffer.place == "arena":
            strides = channels_last_strides(shape) if isinstance(module, Int8Conv) else None
            fresh = meta_tensor(shape, dtype, strides)
            if residual.meta.dtype == dtype and residual.meta.stride() == fresh.stride():
                return residual
        return self._made(shape, dtype, images=isinstance(module, Int8Conv))

    def _finish(
        self, module: QuantizedLayer, scale: torch.Tensor, bias: torch.Tensor, residual: View | None
    ) -> steps.Finish:
        finish = steps.Finish(
            scale=self._kept(scale), bias=self._kept(bias), inverse=1.0, high=255, residual_kind=steps.NOTHING
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
                finish.argument0 = -_LARGEST if low is None else low
                finish.argument1 = _LARGEST if high is None else high
            else:  # storing clips: a clamp of the real number is one of the integer
                finish.low = max(grid.quant_min, _integer(low, grid))
                finish.high = max(finish.low, min(grid.quant_max, _integer(high, grid, grid.quant_max)))
        elif word != "none":
            finish.activation, finish.argument0, finish.argument1 = _activation(word, arguments)
        if residual is not None:
            finish.residual = _place(residual) if isinstance(module, Int8Conv) else _rows_place(residual)
            finish.residual_kind, finish.residual_scale = steps.FLOAT, 1.0
            if isinstance(module.residual, Grid):
                finish.residual_kind, finish.residual_scale = steps.BYTES, module.residual.scale
                finish.residual_shift = -module.residual.scale * module.residual.zero_point
        return finish

    # Pooling

    def _max_pool(self, module: Int8MaxPool, x: View) -> View:
        if len(module.kernel_size) != 2 or x.meta.ndim != 4:
            raise Unplanned
        x = self._image(x)
        sizes, pads = module._geometry(x.meta)
        result = self._made((*x.meta.shape[:2], *sizes), torch.uint8, images=True)
        tables = [
            packing.windows(x.meta.shape[2 + i], module.kernel_size[i], module.stride[i], pads[i][0],
                            module.dilation[i], sizes[i], x.strides()[2 + i])
            for i in range(2)
        ]  # fmt: skip
        self._pool(x, result, tables, steps.Pooling(high=255))
        return result

    def _avg_pool(self, module: Int8AvgPool, x: View) -> View:
        if x.meta.ndim != 4:
            raise Unplanned
        x = self._image(x)
        tables, sizes, count_padding = _average_windows(module, x)
        result = self._made((*x.meta.shape[:2], *sizes), torch.uint8, images=True)
        step = steps.Pooling(
            average=1, count_padding=count_padding, source_zero=module.input.zero_point,
            factor=module.input.scale * inverse(module.output.scale), zero=module.output.zero_point,
            low=module.output.quant_min, high=module.output.quant_max,
        )  # fmt: skip
        self._pool(x, result, tables, step)
        if module.operation == "mean" and not module.arguments.get("keepdim"):
            return result.other(result.meta.flatten(1))
        return result

    def _pool(self, x: View, result: View, tables: Sequence[torch.Tensor], step: steps.Pooling) -> None:
        step.source, step.result = _place(x), _place(result)
        step.images, step.channels, step.height, step.width = result.meta.shape
        step.rows_of_window, step.columns_of_window = tables[0].shape[1], tables[1].shape[1]
        step.rows, step.columns = (self._kept(table.contiguous()) for table in tables)
        self._emit(step, x, result)

    # Elementwise operations

    def _quantize(self, module: Quantize, x: View) -> View:
        meta = x.meta
        if meta.dtype != torch.float32 or meta.numel() == 0:
            raise Unplanned
        if self._stored_as_bytes(x, module.grid):
            return x.other(meta_tensor(meta.shape, torch.uint8, meta.stride()))
        images = meta.ndim == 4 and not meta.is_contiguous()
        images = images or (meta.ndim == 4 and x.buffer.place == "input")
        if images and meta.stride() != channels_last_strides(meta.shape):
            result = self._new(meta.shape, torch.uint8, images=True)
            self._enter(x, result, module.grid)
        else:
            result = self._made(meta.shape, torch.uint8, images=images)
            self._pointwise(result, module.grid, [(steps.LOAD, x, None)])
        return result

    def _stored_as_bytes(self, x: View, grid: Grid) -> bool:
        """Let the step that makes a value store it as bytes, if nothing else reads it."""
        step = self.plan.items[-1] if self.plan.items else None
        source = self.node.args[0]
        if (
            not isinstance(step, (steps.Normalization, steps.Pointwise))
            or step.kind != steps.FLOAT
            or step.result.buffer != x.buffer.index
            or not isinstance(source, fx.Node)
            or not self._only_read_here(source, x.buffer)
            or x.offset
        ):
            return False
        step.kind, step.inverse, step.zero = steps.BYTES, inverse(grid.scale), grid.zero_point
        step.low, step.high = grid.quant_min, grid.quant_max
        step.result.pixel, step.result.image = step.result.pixel // 4, step.result.image // 4
        x.buffer.bytes //= 4
        stored = x.other(meta_tensor(x.meta.shape, torch.uint8, x.meta.stride()))
        self.plan.views = [stored if view.buffer is x.buffer else view for view in self.plan.views]
        return True

    def _only_read_here(self, node: fx.Node, buffer: Buffer) -> bool:
        """Whether nobody else reads a buffer, by way of views or directly."""
        holders = [
            one for one, value in self.values.items()
            if any(isinstance(leaf, View) and leaf.buffer is buffer for leaf in tree_leaves(value))
        ]  # fmt: skip
        return all(len(one.users) == 1 for one in holders) and node in holders

    def _layer_norm(self, module: nn.LayerNorm, x: View) -> View:
        size = math.prod(module.normalized_shape)
        if len(module.normalized_shape) != 1 or x.meta.dtype != torch.float32 or x.meta.numel() == 0:
            raise Unplanned
        if module not in self.packed:
            ones, zeros = torch.ones(size), torch.zeros(size)
            self.packed[module] = (
                packing.vectors(ones if module.weight is None else module.weight),
                packing.vectors(zeros if module.bias is None else module.bias),
            )
        scale, shift = self.packed[module]
        step = steps.Normalization(scale=self._kept(scale), shift=self._kept(shift), epsilon=module.eps)
        return self._normalized(step, x)

    def _matmul(self, given: dict[str, Any]) -> View:
        left, right = given["input"], given["other"]
        if not isinstance(left, View) or not isinstance(right, View) or min(left.meta.ndim, right.meta.ndim) < 2:
            raise Unplanned
        outer = broadcast(left.meta.shape[:-2], right.meta.shape[:-2])
        result = self._new((*outer, left.meta.shape[-2], right.meta.shape[-1]), torch.float32)
        self._multiply(left, right, result, 1.0)
        return result

    def _attention(self, given: dict[str, Any]) -> View:
        query, key, value = given["query"], given["key"], given["value"]
        plain = given["attn_mask"] is None and not given["is_causal"] and not given.get("enable_gqa")
        if not plain or given["dropout_p"] or not all(isinstance(one, View) for one in (query, key, value)):
            raise Unplanned
        if query.meta.ndim != 4 or query.meta.shape[:2] != key.meta.shape[:2]:
            raise Unplanned
        images, heads, count, width = query.meta.shape
        scale = width**-0.5 if given["scale"] is None else given["scale"]
        scores = self._new((images, heads, count, key.meta.shape[2]), torch.float32)
        self._multiply(query, key.other(key.meta.transpose(2, 3)), scores, scale)
        weights = self._softmax({"input": scores, "dim": -1})
        made = self._new((images, count, heads, value.meta.shape[3]), torch.float32)  # as the next layer wants it
        result = made.other(made.meta.transpose(1, 2))
        self._multiply(weights, value, result, 1.0)
        return result

    def _int8_attention(
        self, module: Int8Attention, query: View, key: View, value: View, mask: View | None = None
    ) -> View:
        shape = (*query.meta.shape[:-1], value.meta.shape[-1])
        views = [self._feature_rows(one) for one in (query, key, value)]
        heads = [one.meta.shape[1] if one.meta.ndim == 4 else 1 for one in views]
        images, keys = shape[0], key.meta.shape[-2]
        alike = all(one.meta.ndim == len(shape) and one.meta.shape[0] == images for one in views)
        if not alike or heads[1] != heads[2] or heads[0] % heads[1] or (heads[0] != heads[1] and not module.enable_gqa):
            raise Unplanned
        if keys > _MOST_KEYS or query.meta.shape[-1] > MOST_FEATURES:
            raise Unplanned
        dtype = torch.float32 if module.output is None else torch.uint8
        made = self._new((images, shape[-2], heads[0], shape[-1]), dtype)  # as the next layer wants it
        result = made.other(made.meta.transpose(1, 2) if len(shape) == 4 else made.meta[:, :, 0])
        step = steps.Attention(
            images=images, heads=heads[0], key_heads=heads[1], rows=shape[-2], keys=keys, depth=query.meta.shape[-1],
            width=shape[-1], mask_kind=steps.NOTHING, causal=int(module.is_causal),
            factor=module.query.scale * module.key.scale * (
                query.meta.shape[-1] ** -0.5 if module.scale is None else module.scale
            ), value_scale=module.value.scale,
        )  # fmt: skip
        for name, view in zip(("query", "key", "value", "result"), (*views, result), strict=True):
            _set_distances(step, name, view)
        for name in ("query", "key", "value"):
            grid = getattr(module, name)
            _set_numbers(step, f"{name}_", inverse(grid.scale), grid)
        step.kind, step.inverse = steps.FLOAT, 1.0
        if module.output is not None:
            step.kind = steps.BYTES
            _set_numbers(step, "", inverse(module.output.scale), module.output)
        if mask is not None:
            views.append(self._set_mask(step, mask, (*shape[:-1], keys)))
        self._emit(step, *views, result)
        return result

    def _feature_rows(self, view: View) -> View:
        """Real numbers (batch, length, features) or (batch, heads, length, features) with rows in one piece."""
        if view.meta.dtype != torch.float32 or view.meta.ndim not in (3, 4) or view.meta.numel() == 0:
            raise Unplanned
        return view if view.meta.stride(-1) == 1 or view.meta.shape[-1] == 1 else self._contiguous(view)

    def _set_mask(self, step: steps.Attention, mask: View, shape: tuple[int, ...]) -> View:
        """Let attention read a mask, in one piece for each query."""
        if mask.meta.dtype not in (torch.float32, torch.bool):
            raise Unplanned
        self.plan.mixes |= mask.meta.ndim < len(shape) and mask.buffer.place != "constant"
        if mask.meta.shape[-1] != shape[-1] or mask.meta.stride(-1) != 1:
            mask = self._contiguous(mask.other(mask.meta.expand(*mask.meta.shape[:-1], shape[-1])))
        step.mask_kind = steps.FLOAT if mask.meta.dtype == torch.float32 else steps.BYTES
        _set_distances(step, "mask", mask.other(mask.meta.expand(shape)))
        return mask

    def _multiply(self, left: View, right: View, result: View, factor: float) -> None:
        """Emit result = factor * left @ right for each index of the outer dimensions."""
        if any(view.meta.dtype != torch.float32 or view.meta.numel() == 0 for view in (left, right)):
            raise Unplanned
        outer = result.meta.shape[:-2]
        self.plan.mixes |= min(left.meta.ndim, right.meta.ndim) < 3 or left.meta.ndim != right.meta.ndim
        loops: list[tuple[int, ...]] = [(1, 0, 0, 0)] * (3 - len(outer))
        spread = [view.meta.expand(*outer, *view.meta.shape[-2:]).stride() for view in (left, right, result)]
        loops += [(size, *(4 * strides[i] for strides in spread)) for i, size in enumerate(outer)]
        if len(loops) > 3:
            loops = [loop for loop in loops if loop[0] > 1]
            loops = [(1, 0, 0, 0)] * (3 - len(loops)) + loops
        if len(loops) > 3:
            raise Unplanned
        step = steps.Product(
            left=_start(left), right=_start(right), result=_start(result), rows=result.meta.shape[-2],
            columns=result.meta.shape[-1], depth=left.meta.shape[-1], left_row=left.strides()[-2],
            left_depth=left.strides()[-1], right_depth=right.strides()[-2], right_column=right.strides()[-1],
            result_row=result.strides()[-2], factor=factor,
        )  # fmt: skip
        for i, (size, *strides) in enumerate(loops):
            step.sizes[i] = size
            step.left_outer[i], step.right_outer[i], step.result_outer[i] = strides
        self._emit(step, left, right, result)

    def _softmax(self, given: dict[str, Any]) -> View:
        x = given["input"]
        if not isinstance(x, View) or x.meta.dtype != torch.float32 or x.meta.numel() == 0 or given.get("dtype"):
            raise Unplanned
        if given["dim"] is None or given["dim"] % x.meta.ndim != x.meta.ndim - 1:
            raise Unplanned
        return self._normalized(steps.Normalization(softmax=1), x)

    def _normalized(self, step: steps.Normalization, x: View) -> View:
        result = self._new(x.meta.shape, torch.float32)
        x, rows = self._rows(x)
        step.rows, step.channels = rows.meta.shape
        step.source = _rows_place(rows)
        step.result = steps.Place(result.buffer.index, 0, 4 * step.channels, 0)
        step.kind, step.inverse, step.high = steps.FLOAT, 1.0, 255
        self._emit(step, x, result)
        return result

    def _enter(self, x: View, result: View, grid: Grid) -> None:
        n, c, h, w = x.meta.shape
        stride = x.meta.stride()
        step = steps.Entrance(
            source=_place(x), result=_place(result), images=n, height=h, width=w, channels=c, stride_image=stride[0],
            stride_channel=stride[1], stride_row=stride[2], stride_column=stride[3],
            result_row=result.strides()[2], inverse=inverse(grid.scale), zero=grid.zero_point, low=grid.quant_min,
            high=grid.quant_max,
        )  # fmt: skip
        self._emit(step, x, result)

    def _dequantize(self, module: Dequantize, x: View) -> View:
        result = self._new(x.meta.shape, torch.float32, images=_side_by_side(x.meta))
        self._pointwise(result, None, [(steps.LOAD, x, module.grid)])
        return result

    def _sum(self, module: Int8Add, left: View, right: View) -> View:
        program: list[tuple[Any, ...]] = [
            (steps.LOAD, left, module.left), (steps.LOAD, right, module.right), (steps.ADD, 0, 1),
        ]  # fmt: skip
        return self._stored(program, module.output, (left, right), relu=module.relu)

    def _product(self, module: Int8Mul, left: View, right: View) -> View:
        program: list[tuple[Any, ...]] = [
            (steps.LOAD, left, module.left), (steps.LOAD, right, module.right), (steps.MULTIPLY, 0, 1),
        ]  # fmt: skip
        return self._stored(program, module.output, (left, right), relu=module.relu)

    def _stored(self, program: list[tuple[Any, ...]], grid: Grid, views: Sequence[View], relu: bool) -> View:
        shape = broadcast(*(view.meta.shape for view in views))
        largest = max(views, key=lambda view: view.meta.numel())
        result = self._made(shape, torch.uint8, images=_side_by_side(largest.meta))
        low = max(grid.quant_min, grid.zero_point) if relu else grid.quant_min
        self._pointwise(result, Grid(grid.scale, grid.zero_point, grid.quant_min, grid.quant_max), program, low)
        return result

    def _batch_norm(self, module: Any, x: View) -> View:
        if module.training or module.running_mean is None or x.meta.dtype != torch.float32:
            raise Unplanned
        if module not in self.packed:
            self.packed[module] = [packing.vectors(part) for part in scale_and_shift(module)]
        if not _side_by_side(x.meta) and x.meta.ndim != 2:
            raise Unplanned
        shape = (1, -1, *[1] * (x.meta.ndim - 2))
        scale, shift = (self._constant(part[: x.meta.shape[1]].view(shape)) for part in self.packed[module])
        result = self._new(x.meta.shape, torch.float32, images=True)
        program: list[tuple[Any, ...]] = [
            (steps.LOAD, x, None), (steps.LOAD, scale, None), (steps.MULTIPLY, 0, 1), (steps.LOAD, shift, None),
            (steps.ADD, 2, 3),
        ]  # fmt: skip
        self._pointwise(result, None, program)
        return result

    def _affine(self, module: Int8Affine, x: View) -> View:
        if x.meta.ndim not in (2, 4) or x.meta.numel() == 0:
            raise Unplanned
        x = self._image(x) if x.meta.ndim == 4 else self._rows(x)[0]
        if module not in self.packed:
            self.packed[module] = [packing.vectors(part, lanes=packing.CHUNK) for part in (module.scale, module.shift)]
        scale, shift = self.packed[module]
        source, grid = module.input, module.output
        result = self._made(x.meta.shape, torch.uint8, images=x.meta.ndim == 4)
        images, channels = (x.meta.shape[0], x.meta.shape[1]) if x.meta.ndim == 4 else (1, x.meta.shape[1])
        step = steps.Affine(
            source=_place(x), result=_place(result), images=images, pixels=x.meta.numel() // images // channels,
            channels=channels, source_scale=source.scale, source_shift=-source.scale * source.zero_point,
            scale=self._kept(scale), shift=self._kept(shift), inverse=inverse(grid.scale), zero=grid.zero_point,
            low=max(grid.quant_min, grid.zero_point) if module.relu else grid.quant_min, high=grid.quant_max,
        )  # fmt: skip
        self._emit(step, x, result)
        return result

    def _function(self, node: fx.Node, kind: str) -> View:
        given = {name: self._arguments(value) for name, value in ops.arguments(node).items()}
        operands = [given.get("input"), given.get("other")] if kind in _ARITHMETIC else [given.get("input")]
        if "alpha" in given or given.get("rounding_mode") is not None:
            raise Unplanned
        program: list[tuple[Any, ...]] = []
        views = []
        for operand in operands:
            if isinstance(operand, View):
                views.append(operand)
            elif isinstance(operand, bool) or not isinstance(operand, (int, float)):
                raise Unplanned
            program.append((steps.LOAD, operand, None))
        if not views or any(view.meta.dtype != torch.float32 or view.meta.numel() == 0 for view in views):
            raise Unplanned
        if kind in _ARITHMETIC:
            program.append((_ARITHMETIC[kind], 0, 1))
        else:
            program.append((steps.ACTIVATE, 0, *_elementwise(kind, given)))
        shape = broadcast(*(view.meta.shape for view in views))
        largest = max(views, key=lambda view: view.meta.numel())
        result = self._new(shape, torch.float32, images=_side_by_side(largest.meta))
        self._pointwise(result, None, program)
        return result

    def _pointwise(
        self, result: View, grid: Grid | None, program: Sequence[tuple[Any, ...]], low: int | None = None
    ) -> None:
        """Emit a chain of elementwise operations, of which the last is stored.

        program: (LOAD, view or number, grid or None), (ACTIVATE, index, number, argument, argument) or
        (operation, index, index); indices are those of earlier operations.
        """
        if result.meta.numel() == 0:
            raise Unplanned
        strides = result.meta.stride()
        order = sorted(range(result.meta.ndim), key=lambda i: -strides[i])
        order = [i for i in order if result.meta.shape[i] > 1] or [0]
        sizes = [result.meta.shape[i] for i in order]
        images, channels = (sizes[0] if len(sizes) > 2 else 1), sizes[-1]
        step = steps.Pointwise(
            images=images, pixels=result.meta.numel() // images // channels, channels=channels,
            operations=len(program), kind=steps.FLOAT if grid is None else steps.BYTES, inverse=1.0, high=255,
            result=_walk(result, order, result.meta.shape)[0],
        )  # fmt: skip
        if grid is not None:
            step.inverse, step.zero, step.high = inverse(grid.scale), grid.zero_point, grid.quant_max
            step.low = grid.quant_min if low is None else low
        program = [self._walkable(one, order, result.meta.shape) for one in program]
        views = [result]
        for index, (code, *rest) in enumerate(program):
            operation = step.operation[index]
            operation.code = code
            if code == steps.LOAD:
                operation.first = step.operands
                step.operand[step.operands] = self._operand(rest[0], rest[1], order, result.meta.shape)
                step.operands += 1
                if isinstance(rest[0], View):
                    views.append(rest[0])
            else:
                operation.first, operation.second = rest[0], rest[1]
                if code == steps.ACTIVATE:
                    operation.argument0, operation.argument1 = rest[2], rest[3]
        self._emit(step, *views)

    def _walkable(self, operation: tuple[Any, ...], order: list[int], shape: torch.Size) -> tuple[Any, ...]:
        """The same operation, on a copy of its operand if that cannot be read in constant steps."""
        code, value, *rest = operation
        if code != steps.LOAD or not isinstance(value, View):
            return operation
        try:
            _walk(value, order, shape)
        except Unplanned:
            strides = [0] * len(shape)
            step = 1
            for i in reversed(order):
                strides[i], step = step, step * shape[i]
            meta = meta_tensor(shape, value.meta.dtype, strides)
            copy = View(self._buffer("arena", step * meta.element_size()), meta)
            self._copy(value.other(value.meta.expand(shape)), copy)
            return code, copy, *rest
        return operation

    def _operand(self, value: Any, grid: Grid | None, order: list[int], shape: torch.Size) -> steps.Operand:
        if not isinstance(value, View):
            return steps.Operand(shape=steps.WHOLE, shift=float(value))
        place, kind = _walk(value, order, shape)
        operand = steps.Operand(shape=kind, kind=steps.FLOAT, place=place)
        if value.meta.dtype == torch.uint8:
            if grid is None:
                raise Unplanned
            operand.kind, operand.scale, operand.shift = steps.BYTES, grid.scale, -grid.scale * grid.zero_point
        elif value.meta.dtype != torch.float32:
            raise Unplanned
        return operand


def _packed_convolution(module: Int8Conv, kernel: Sequence[int], in_rows: bool) -> tuple[Any, ...]:
    """Weights, number of groups, output channels of one, bytes at each place, bias and scale of a convolution."""
    weight = module.weight.flatten(2)  # (out, in of a group, places)
    groups, group = 1, module.out_channels
    if in_rows:
        window = module.weight.view(*module.weight.shape[:2], *kernel)
        rows = window.permute(0, 2, 3, 1).flatten(2)  # (out, rows of the window, columns x channels)
        packed, run = packing.convolution(rows[None]), rows.shape[2]
    else:
        dense, joined = packing.merged_groups(weight, module.groups)
        groups, group, run = dense.shape[0], joined * (module.out_channels // module.groups), dense.shape[2]
        packed = packing.convolution(dense.transpose(2, 3))
    bias = module._bias_with_zero_point()
    bias = torch.zeros(module.out_channels) if bias is None else bias
    scale = module.weight_scale.double() * module.input.scale
    return packed, groups, group, run, packing.vectors(bias, group), packing.vectors(scale, group)


def _scaled(module: QuantizedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Bias and scale of the output channels of a layer whose input has no scale of its own."""
    bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias
    return packing.vectors(bias), packing.vectors(module.weight_scale)


def _flat_geometry(module: Int8Conv) -> tuple[list[int], ...]:
    """A convolution with one spatial dimension, as one with two of which the first has size one."""
    return [1, *module.kernel_size], [1, *module.stride], [0, *module.padding], [1, *module.dilation]


def _average_windows(module: Int8AvgPool, x: View) -> tuple[list[torch.Tensor], list[int], int]:
    """Tables of rows and columns, sizes of the result, and whether the padding counts."""
    shape, strides, given = x.meta.shape, x.strides(), module.arguments
    if module.operation == "mean":
        dims = given["dim"]
        if dims is None or sorted(dim % 4 for dim in ([dims] if isinstance(dims, int) else dims)) != [2, 3]:
            raise Unplanned
        return [packing.adaptive_windows(shape[i], 1, strides[i]) for i in (2, 3)], [1, 1], 0
    if module.dimensions != 2:
        raise Unplanned
    if module.operation == "adaptive_avg_pool":
        wanted = given["output_size"]
        wanted = [wanted, wanted] if isinstance(wanted, int) else list(wanted)
        sizes = [shape[2 + i] if size is None else int(size) for i, size in enumerate(wanted)]
        return [packing.adaptive_windows(shape[2 + i], sizes[i], strides[2 + i]) for i in range(2)], sizes, 0
    if given.get("ceil_mode") or given.get("divisor_override"):
        raise Unplanned
    kernel, padding = _pair(given["kernel_size"]), _pair(given.get("padding") or 0)
    stride = _pair(given.get("stride") or kernel)
    sizes = [(shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
    tables = [
        packing.windows(shape[2 + i], kernel[i], stride[i], padding[i], 1, sizes[i], strides[2 + i]) for i in range(2)
    ]
    return tables, sizes, int(bool(given.get("count_include_pad", True)))


def _place(view: View) -> steps.Place:
    """Where a value lies, with the strides of its images and pixels if it has any."""
    strides = view.strides()
    if len(strides) == 4:
        return steps.Place(view.buffer.index, view.offset, strides[3], strides[0])
    return steps.Place(view.buffer.index, view.offset, strides[0] if len(strides) == 2 else 0, 0)


def _start(view: View) -> steps.Place:
    """Where the first number of a value lies."""
    return steps.Place(view.buffer.index, view.offset, 0, 0)


def _rows_place(view: View) -> steps.Place:
    """Where a value (..., features) lies whose rows have equal distances."""
    pixel = view.strides()[-2] if view.meta.ndim > 1 else 0
    return steps.Place(view.buffer.index, view.offset, pixel, 0)


def _set_distances(step: steps.Attention, name: str, view: View) -> None:
    """Where an operand of attention lies, and the distances of its images, heads and rows."""
    strides = view.strides()
    setattr(step, name, _start(view))
    setattr(step, f"{name}_image", strides[0])
    setattr(step, f"{name}_head", strides[1] if len(strides) == 4 else 0)
    setattr(step, f"{name}_row", strides[-2])


def _set_numbers(step: steps.Attention, prefix: str, inverse_: float, grid: Grid) -> None:
    """How real numbers become integers."""
    for name, number in (
        ("inverse", inverse_), ("zero", grid.zero_point), ("low", grid.quant_min), ("high", grid.quant_max),
    ):  # fmt: skip
        setattr(step, f"{prefix}{name}", number)


def _walk(view: View, order: list[int], shape: torch.Size) -> tuple[steps.Place, int]:
    """How a value is read along the dimensions of a result in their order in memory: place, and what it has one for.

    Raises:
        Unplanned: no constant steps lead from image to image, pixel to pixel and channel to channel.
    """
    size = view.meta.element_size()
    strides = [stride * size for stride in view.meta.expand(shape).stride()]
    ordered = [strides[i] for i in order]
    sizes = [shape[i] for i in order]
    image = ordered[0] if len(order) > 2 else 0
    middle = ordered[1:-1] if len(order) > 2 else ordered[:-1]
    counts = sizes[1:-1] if len(order) > 2 else sizes[:-1]
    for i in range(len(middle) - 1):
        if middle[i] != middle[i + 1] * counts[i + 1]:
            raise Unplanned
    pixel = middle[-1] if middle else ordered[-1] * sizes[-1]
    if ordered[-1] != size:
        raise Unplanned
    kind = steps.IMAGE_CHANNEL if middle and pixel == 0 else steps.ELEMENT
    return steps.Place(view.buffer.index, view.offset, pixel, image), kind


def _side_by_side(meta: torch.Tensor) -> bool:
    """Whether a tensor holds images whose channels lie side by side."""
    return meta.ndim == 4 and meta.stride(1) == 1 and (meta.shape[1] > 1 or meta.shape[2:].numel() == 1)


def _is_view(value: Any) -> bool:
    return isinstance(value, View)


def _integer(limit: float | None, grid: Grid, otherwise: int = 0) -> int:
    """The integer that a real number is rounded to, within 0..255."""
    if limit is None or math.isinf(limit):
        return otherwise if limit is None or limit > 0 else 0
    return max(0, min(255, round(limit / grid.scale) + grid.zero_point))


def _activation(word: str, arguments: Sequence[Any]) -> tuple[int, float, float]:
    if word == "gelu":
        return steps.ACTIVATIONS["gelu_tanh" if arguments and arguments[0] == "tanh" else "gelu"], 0.0, 0.0
    if word not in steps.ACTIVATIONS:
        raise Unplanned
    numbers = [float(one) for one in arguments] + [0.0, 0.0]
    return steps.ACTIVATIONS[word], numbers[0], numbers[1]


def _elementwise(kind: str, given: dict[str, Any]) -> tuple[int, float, float]:
    """The number of an activation that stands by itself, and its arguments."""
    found = activation_of(kind, given)
    if found is None:
        if kind not in ("sigmoid", "hardsigmoid"):  # the others have arguments that are not in `given` as numbers
            raise Unplanned
        return _activation(kind, ())
    if found[0] == "clamp":
        low, high = found[1:]
        return steps.ACTIVATIONS["clamp"], -_LARGEST if low is None else low, _LARGEST if high is None else high
    return _activation(found[0], found[1:])


def _pair(value: Any) -> list[int]:
    return [int(value)] * 2 if isinstance(value, int) else [int(one) for one in (list(value) * 2)[:2]]


_MOVED: dict[str, Callable[[_Planner, dict[str, Any]], View]] = {
    "pad": _Planner._pad,
    "roll": _Planner._roll,
    "softmax": _Planner._softmax,
    "matmul": _Planner._matmul,
    "attention": _Planner._attention,
}

_MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    Int8Conv: _Planner._conv,
    Int8Linear: _Planner._linear,
    QuantizeRows: _Planner._quantize_rows,
    Int8DynamicLinear: _Planner._dynamic_linear,
    Int8WeightOnlyLinear: _Planner._weight_linear,
    Int8MaxPool: _Planner._max_pool,
    Int8AvgPool: _Planner._avg_pool,
    Quantize: _Planner._quantize,
    Dequantize: _Planner._dequantize,
    Int8Add: _Planner._sum,
    Int8Mul: _Planner._product,
    Int8Affine: _Planner._affine,
    Int8Attention: _Planner._int8_attention,
    nn.LayerNorm: _Planner._layer_norm,
    nn.BatchNorm1d: _Planner._batch_norm,
    nn.BatchNorm2d: _Planner._batch_norm,
    nn.BatchNorm3d: _Planner._batch_norm,
}
