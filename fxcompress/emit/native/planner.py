"""From a lowered graph, with the shapes of one call, to a plan: steps for the kernels, and places for all values.

Each node becomes steps, a view of what another node made, or, where there are no kernels for it, a call of the same
function or module in Python, on tensors that lie in the plan's memory.

Which kernels a node gets is up to the handler that a table names for its module or kind; handlers stand in
`handlers/`, by what they compute. What they make plans with is a `Draft` (`draft.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

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
    QuantizeRows,
)
from fxcompress.emit.native.draft import Draft
from fxcompress.emit.native.handlers import (
    attention,
    convolutions,
    entrance,
    moving,
    normalization,
    pointwise,
    pooling,
    rows,
)
from fxcompress.emit.native.memory import View, extent
from fxcompress.emit.native.plan import Plan, PythonCall, Unplanned
from fxcompress.graph import edit, ops

#: What plans modules: called with the draft, the module and its inputs, returns the result, or raises `Unplanned`.
_MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    Int8Conv: convolutions.conv,
    Int8Linear: convolutions.linear,
    QuantizeRows: rows.quantize_rows,
    Int8DynamicLinear: rows.dynamic_linear,
    Int8WeightOnlyLinear: rows.weight_linear,
    Int8MaxPool: pooling.max_pool,
    Int8AvgPool: pooling.avg_pool,
    Quantize: entrance.quantize,
    Dequantize: entrance.dequantize,
    Int8Add: pointwise.add,
    Int8Mul: pointwise.multiply,
    Int8Affine: normalization.affine,
    Int8Attention: attention.int8_attention,
    nn.LayerNorm: normalization.layer_norm,
    nn.BatchNorm1d: normalization.batch_norm,
    nn.BatchNorm2d: normalization.batch_norm,
    nn.BatchNorm3d: normalization.batch_norm,
}

#: What plans functions, by kind: called with the draft and the function's arguments by name, see `ops.arguments`.
_FUNCTIONS: dict[str, Callable[[Draft, dict[str, Any]], Any]] = {
    **dict.fromkeys(moving.VIEWS, moving.view),
    "cat": moving.cat,
    "pad": moving.pad,
    "roll": moving.roll,
    **dict.fromkeys(pointwise.ELEMENTWISE, pointwise.elementwise),
    **dict.fromkeys(("avg_pool", "adaptive_avg_pool", "mean"), pooling.real_average),
    "softmax": attention.softmax,
    "matmul": attention.matmul,
    "attention": attention.attention,
}

_CPU = torch.device("cpu")  # of all that a plan computes, whatever it was recorded on

#: Tensors of which only the shape is not known.
_FILLED: dict[str, Callable[..., torch.Tensor]] = {"zeros": torch.zeros, "ones": torch.ones}


def make_plan(
    graph_module: fx.GraphModule,
    recorded: dict[fx.Node, Any],
    packed: dict[Any, Any],
    calls: Collection[str] = (),
) -> Plan:
    """Plan the calls of a lowered graph whose inputs have certain shapes.

    Args:
        graph_module: the graph.
        recorded: what each node made in a call with such inputs; tensors without memory (`meta`) for tensors.
        packed: weights that were packed for other shapes, by layer; filled here.
        calls: names of nodes that shall be run by Python.
    """
    return _Planner(graph_module, recorded, packed, calls).run()


class _Planner:
    """Goes through a graph and notes what each node makes."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        recorded: dict[fx.Node, Any],
        packed: dict[Any, Any],
        calls: Collection[str],
    ) -> None:
        self.graph_module, self.calls = graph_module, calls
        self.draft = Draft(graph_module.graph, recorded, packed)

    def run(self) -> Plan:
        for node in self.graph_module.graph.nodes:
            self.draft.node = node
            self.draft.values[node] = self._visit(node)
        return self.draft.plan

    def _visit(self, node: fx.Node) -> Any:
        value = self.draft.recorded.get(node)
        if node.op == "placeholder":
            return self._input(value)
        if node.op == "get_attr":
            return self.draft.constant(edit.attribute(self.graph_module, str(node.target)))
        if node.op == "output":
            return self._output(node)
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)):
            # Sizes, and what is computed of them: fixed by the shapes that the plan is for.
            return tree_map(lambda leaf: _CPU if isinstance(leaf, torch.device) else leaf, value)
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
            return cast("View", self.draft.constant(_FILLED[kind](value.shape, dtype=value.dtype)))
        arguments, keywords = self.draft.arguments(node.args), self.draft.arguments(node.kwargs)
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
        return cast("View", self.draft.constant(made))

    def _real(self, view: View) -> torch.Tensor:
        """The numbers of a constant."""
        tensor, meta = self.draft.plan.constants[view.buffer.index], view.meta
        return tensor.as_strided(meta.shape, meta.stride(), tensor.storage_offset() + meta.storage_offset())

    def _native(self, node: fx.Node) -> Any:
        """What the kernels for a node make; raises `Unplanned` if there are none, or if they are not wanted."""
        if node.name in self.calls:
            raise Unplanned
        module = ops.submodule(node) if node.op == "call_module" else None
        if module is not None:
            plan_module = _MODULES.get(type(module))
            if plan_module is None:
                raise Unplanned
            return plan_module(self.draft, module, *self.draft.arguments(node.args))
        plan_function = _FUNCTIONS.get(ops.kind(node))
        if plan_function is None:
            raise Unplanned
        given = {name: self.draft.arguments(value) for name, value in ops.arguments(node).items()}
        return plan_function(self.draft, given)

    # Values that come from outside, and those that leave

    def _input(self, value: Any) -> Any:
        """The value of a placeholder: a view, or a structure that holds views."""
        leaves, structure = tree_flatten(value)
        found = [View(self.draft.buffer("input", extent(leaf)), leaf) if isinstance(leaf, torch.Tensor) else leaf
                 for leaf in leaves]  # fmt: skip
        self.draft.plan.inputs += [leaf for leaf in found if isinstance(leaf, View)]
        return structure.unflatten(found)

    def _output(self, node: fx.Node) -> None:
        plan = self.draft.plan
        plan.output = self.draft.arguments(node.args[0])
        for leaf in tree_leaves(plan.output):
            if isinstance(leaf, View):
                plan.views.append(leaf)
                leaf.buffer.touch(len(plan.items))
                if leaf.buffer.place == "arena":
                    leaf.buffer.place = "output"

    def _python(self, node: fx.Node, value: Any) -> Any:
        arguments, keywords = self.draft.arguments(node.args), self.draft.arguments(node.kwargs)
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
            View(self.draft.buffer("python", extent(leaf)), leaf) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in leaves
        ]
        item = len(self.draft.plan.items)
        for leaf in (*tree_leaves((arguments, keywords)), *results):
            if isinstance(leaf, View):
                leaf.buffer.touch(item)
        made = [leaf for leaf in results if isinstance(leaf, View)]
        self.draft.add(PythonCall(function, arguments, keywords, made, node.name))
        return structure.unflatten(results)
