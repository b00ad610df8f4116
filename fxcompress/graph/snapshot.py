"""A graph module as it stood at one moment: what a pass is compared with."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

#: Where a module keeps its tensors and children.
_TABLES = ("_parameters", "_buffers", "_modules")


class Snapshot:
    """Records a graph and the state of its modules without copying a tensor.

    Node arguments are immutable and tensors are shared, so taking one costs a few microseconds per node. Tensors that
    are written in place show by their version, but `restore` has them as they are, not as they were.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.nodes = _nodes(graph_module)
        self.modules = _modules(graph_module)
        self.versions = _versions(self.modules)
        self.meta = dict(graph_module.meta)

    def changed(self) -> str | None:
        """Return what differs in the graph module since then, in words, or None if nothing does."""
        return self.changed_structure() or self.changed_state()

    def changed_structure(self) -> str | None:
        """Return what differs in nodes, modules, their options and parameters; other tensors may have new values."""
        nodes = _nodes(self.graph_module)
        for old, new in zip(self.nodes, nodes, strict=False):
            if any(left is not right for left, right in zip(old, new, strict=True)):
                return f"node {new[0].name!r}"
        if len(self.nodes) != len(nodes):
            return f"the number of nodes ({len(self.nodes)} became {len(nodes)})"
        modules = _modules(self.graph_module)
        if self.modules.keys() != modules.keys():
            return "the modules of the graph"
        for module, state in modules.items():
            name = _first_difference(self.modules[module], state)
            if name is not None:
                return f"{name!r} of a {type(module).__name__}"
        return None

    def changed_state(self) -> str | None:
        """Return whether buffers and other tensors have new values, in words, or None."""
        modules = _modules(self.graph_module)
        same = all(
            state[table].get(name) is value
            for module, state in modules.items()
            for table in ("_buffers", "attributes")
            for name, value in self.modules[module][table].items()
            if isinstance(value, torch.Tensor)
        )
        return None if same and _versions(modules) == self.versions else "the values of a tensor"

    def restore(self) -> fx.GraphModule:
        """Return a graph module of its own that computes what this one did; it shares its tensors."""
        copies: dict[nn.Module, nn.Module] = {}

        def duplicate(module: nn.Module) -> nn.Module:
            if isinstance(module, fx.GraphModule):  # a region: passes edit it by itself, and a copy would own its graph
                return module
            if module not in copies:
                twin = copies[module] = nn.Module() if type(module) is nn.Module else copy.copy(module)
                twin.__dict__.update(self.modules[module]["attributes"])
                restore_tables(twin, module)
            return copies[module]

        def restore_tables(twin: nn.Module, module: nn.Module) -> None:
            state = self.modules[module]
            twin._parameters, twin._buffers = dict(state["_parameters"]), dict(state["_buffers"])
            twin._modules = {name: child and duplicate(child) for name, child in state["_modules"].items()}

        root = nn.Module()
        restore_tables(root, self.graph_module)
        graph = fx.Graph()
        twins: dict[fx.Node, fx.Node] = {}
        for node, op, name, target, args, kwargs in self.nodes:
            mapped = fx.map_arg((args, kwargs), lambda n: twins[n])
            twins[node] = graph.create_node(op, target, *mapped, name=name, type_expr=node.type)
        restored = fx.GraphModule(root, graph, type(self.graph_module).__name__)
        restored.training = self.graph_module.training
        restored.meta = dict(self.meta)
        return restored


def _nodes(graph_module: fx.GraphModule) -> list[tuple[fx.Node, str, str, Any, Any, Any]]:
    return [(node, node.op, node.name, node.target, node.args, node.kwargs) for node in graph_module.graph.nodes]


def _modules(graph_module: fx.GraphModule) -> dict[nn.Module, dict[str, dict[str, Any]]]:
    """Return the attributes of every module (a graph module's own are its code: left out), and of its three tables."""
    found: dict[nn.Module, dict[str, dict[str, Any]]] = {}
    for module in _own_modules(graph_module):
        attributes = vars(module)
        state = {name: dict(attributes[name]) for name in _TABLES}
        state["attributes"] = {} if module is graph_module else dict(attributes)
        found[module] = state
    return found


def _own_modules(graph_module: fx.GraphModule) -> Iterator[nn.Module]:
    """The modules of a graph, without those of regions inside it, which are graphs of their own."""
    pending: list[nn.Module] = [graph_module]
    seen: set[nn.Module] = set()
    while pending:
        module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        yield module
        pending += [c for c in module._modules.values() if c is not None and not isinstance(c, fx.GraphModule)]


def _versions(modules: dict[nn.Module, dict[str, dict[str, Any]]]) -> list[int]:
    tensors = (tensor for state in modules.values() for name in _TABLES[:2] for tensor in state[name].values())
    return [t._version for t in tensors if isinstance(t, torch.Tensor) and not t.is_inference()]


def _first_difference(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> str | None:
    """Return the name of the first attribute that is gone, new, or another object, state tensors aside."""
    for table, values in new.items():
        before = old[table]
        if list(before) != list(values):
            return ", ".join(before.keys() ^ values.keys()) or table
        if not all(map(operator.is_, before.values(), values.values())):
            for name, value in values.items():
                state = isinstance(value, torch.Tensor) and isinstance(before[name], torch.Tensor)
                if before[name] is not value and (table == "_parameters" or not state):
                    return name
    return None
