"""A stable text form of a graph: one line a node, values numbered in order, with shapes and dtypes.

%0: f32[1,3,8,8] = placeholder x
%1: f32[1,4,8,8] = module conv1: Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))(%0)
%2: f32[1,4,8,8] = relu(%1)  # epilogue of conv1
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxcompress.graph import ops
from fxcompress.graph.metadata import graph_info, info
from fxcompress.graph.shapes import describe


def print_graph(graph_module: fx.GraphModule, shapes: bool = True) -> str:
    """Return the text of a graph. Equal graphs give equal texts, whatever their nodes are named.

    Args:
        graph_module: the graph to print.
        shapes: whether to print what each node produces.
    """
    numbers = {node: f"%{index}" for index, node in enumerate(graph_module.graph.nodes)}
    lines = [f"stage {graph_info(graph_module).stage}"]
    for node in graph_module.graph.nodes:
        value = info(node).value
        kind = f": {describe(value)}" if shapes and value is not None and node.op != "output" else ""
        epilogue = info(node).epilogue_of
        mark = f"  # epilogue of {epilogue}" if epilogue else ""
        lines.append(f"{numbers[node]}{kind} = {_call(node, numbers)}{mark}")
    return "\n".join(lines)


def _call(node: fx.Node, numbers: dict[fx.Node, str]) -> str:
    if node.op == "placeholder":
        default = f" = {node.args[0]!r}" if node.args else ""
        return f"placeholder {node.target}{default}"
    if node.op == "get_attr":
        return f"attribute {node.target}"
    if node.op == "output":
        return f"output({_text(node.args[0], numbers)})"
    arguments = ", ".join(
        [_text(argument, numbers) for argument in node.args]
        + [f"{name}={_text(value, numbers)}" for name, value in node.kwargs.items()]
    )
    return f"{_callee(node)}({arguments})"


def _callee(node: fx.Node) -> str:
    if node.op == "call_module":
        module = ops.submodule(node)
        leaf = isinstance(module, nn.Module) and not list(module.children())
        return f"module {node.target}: {module if leaf else type(module).__name__}"
    if node.op == "call_method":
        return f".{node.target}"
    kind = ops.kind(node)
    return kind if kind != "opaque" else ops.function_name(node.target)  # type: ignore[arg-type]


def _text(value: Any, numbers: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, tuple):
        return "(" + ", ".join(_text(item, numbers) for item in value) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, list):
        return "[" + ", ".join(_text(item, numbers) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {_text(item, numbers)}" for name, item in value.items()) + "}"
    if isinstance(value, slice):
        return ":".join("" if part is None else _text(part, numbers) for part in (value.start, value.stop, value.step))
    return repr(value)
