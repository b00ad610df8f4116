"""The graph as a rule sees it: facts that would be slow to look up per node, and edits that keep them true."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from fxcompress.errors import PassError
from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import TensorInfo, graph_info, info, set_info
from fxcompress.rewrite import effects


class Workspace:
    """Facts about one graph, and the edits that rules make to it.

    Rules change the graph through the methods below `touched` only: these keep the facts up to date, and tell the
    driver which nodes to look at again.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.touched: dict[fx.Node, None] = {}  # in the order in which they were touched

    # -- facts --------------------------------------------------------------------------------------------------

    def module(self, node: fx.Node) -> nn.Module:
        """Return the module that a `call_module` node calls.

        Raises:
            PassError: the node calls no module.
        """
        found = ops.submodule(node)
        if found is None:
            raise PassError(f"node {node.name!r} calls no module")
        return found

    def calls(self, node: fx.Node) -> list[fx.Node]:
        """Return all nodes that call the module that `node` calls."""
        return list(self._calls.get(id(self.module(node)), ()))

    def sharers(self, node: fx.Node) -> list[str]:
        """Return what else uses the tensors of the module that `node` calls: paths of tensors, names of nodes."""
        module = self.module(node)
        tensors = [*module.parameters(), *module.buffers()]
        found = [
            path for tensor in tensors for path in self._paths.get(id(tensor), ())
            if edit.owner(self.graph_module, path)[0] is not module
        ]  # fmt: skip
        return found + [reader for tensor in tensors for reader in self._attribute_readers.get(id(tensor), ())]

    def is_written(self, node: fx.Node) -> bool:
        """Whether the node's value may share memory with a tensor that is written to in place."""
        return node in self._written

    def depends_on_input(self, node: fx.Node) -> bool:
        """Whether the node's value depends on an input of the model, and so on the batch."""
        return node in self._dependent or node.op == "placeholder"

    @cached_property
    def _calls(self) -> dict[int, dict[fx.Node, None]]:
        found: dict[int, dict[fx.Node, None]] = defaultdict(dict)
        for node in self.graph.nodes:
            if node.op == "call_module":
                for module in self.module(node).modules():  # a module that is not traced calls those inside it
                    found[id(module)][node] = None
        return found

    @cached_property
    def _paths(self) -> dict[int, list[str]]:
        return edit.tensor_paths(self.graph_module)

    @cached_property
    def _attribute_readers(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = defaultdict(list)
        for node in self.graph.nodes:
            if node.op == "get_attr":
                found[id(edit.attribute(self.graph_module, str(node.target)))].append(node.name)
        return found

    @cached_property
    def _written(self) -> frozenset[fx.Node]:
        return effects.written(self.graph)

    @cached_property
    def _dependent(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    # -- edits --------------------------------------------------------------------------------------------------

    def insert(
        self, after: fx.Node, function: ops.Function, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """Insert a call of `function` behind a node, of whose layer and value it inherits the record."""
        with self.graph.inserting_after(after):
            made = self.graph.call_function(function, args, kwargs or {})
        set_info(made, layer=info(after).layer, value=info(after).value)
        if any(self.depends_on_input(source) for source in made.all_input_nodes):
            self._dependent.add(made)
        self._touch(made)
        return made

    def replace(self, node: fx.Node, replacement: fx.Node) -> None:
        """Let every reader of `node` read `replacement` instead, and erase `node`."""
        readers = list(node.users)
        node.replace_all_uses_with(replacement)
        self._touch(*readers)
        self.erase(node)

    def reconnect(self, node: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let `node` read `new` wherever it read `old`."""
        node.replace_input_with(old, new)
        self._touch(node)
        self._sweep(old)

    def set_arguments(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Replace the arguments of a node."""
        sources = list(node.all_input_nodes)
        node.args, node.kwargs = args, kwargs
        self._touch(node)
        for source in sources:
            self._sweep(source)

    def erase(self, node: fx.Node) -> None:
        """Erase a node that nothing reads, then whatever only it read, and modules that nothing calls any more."""
        pending = [node]
        while pending:
            dead = pending.pop()
            sources = list(dead.all_input_nodes)
            if dead.op == "call_module":
                self._forget_call(dead)
            elif dead.op == "get_attr":
                self._attribute_readers[id(edit.attribute(self.graph_module, str(dead.target)))].remove(dead.name)
            self.graph.erase_node(dead)
            pending += [source for source in sources if self._is_dead(source)]

    def set_epilogue(self, node: fx.Node, anchor: fx.Node | None) -> None:
        """Record that the kernel of `anchor` computes `node` as well."""
        set_info(node, epilogue_of=anchor.name if anchor is not None else None)
        self._touch(node)

    def set_tensor(self, path: str, data: torch.Tensor, requires_grad: bool | None = None) -> None:
        """Replace the parameter or buffer at `path`; a parameter is made where there was none.

        Args:
            path: dotted path.
            data: new values.
            requires_grad: whether a parameter that is made now is trained; replaced ones stay as they were.
        """
        module, name = edit.owner(self.graph_module, path)
        old = getattr(module, name, None)
        if old is None:
            made = nn.Parameter(data.detach().clone(), requires_grad=bool(requires_grad))
            module.register_parameter(name, made)
        else:
            edit.set_tensor(self.graph_module, path, data)

    def set_mask(self, path: str, mask: torch.Tensor | None) -> None:
        """Replace the mask of the parameter at `path`; None, or a mask that is True everywhere, removes it."""
        masks = graph_info(self.graph_module).masks
        if mask is None or bool(mask.all()):
            masks.pop(path, None)
        else:
            masks[path] = mask

    def _touch(self, *nodes: fx.Node) -> None:
        self.touched.update(dict.fromkeys(nodes))

    def _sweep(self, source: fx.Node) -> None:
        """Erase a node if nothing reads it any more."""
        if self._is_dead(source):
            self.erase(source)

    def _is_dead(self, source: fx.Node) -> bool:
        """Whether a node that has lost a reader can go. One that has a single reader left is looked at again."""
        if len(source.users) == 1:
            self._touch(*source.users)
        return not source.users and not effects.has_effects(source)

    def _forget_call(self, node: fx.Node) -> None:
        calls = self._calls[id(self.module(node))]
        del calls[node]
        path = str(node.target)
        if not calls and not any(other.startswith(f"{path}.") for other in self._attribute_targets):
            del self._calls[id(self.module(node))]
            remove_module(self.graph_module, path)

    @cached_property
    def _attribute_targets(self) -> frozenset[str]:
        return frozenset(str(node.target) for node in self.graph.nodes if node.op == "get_attr")


def remove_module(graph_module: fx.GraphModule, path: str) -> None:
    """Take the module at `path` out of the graph module, and the masks of its parameters with it."""
    parent, name = edit.owner(graph_module, path)
    masks = graph_info(graph_module).masks
    for parameter, _ in getattr(parent, name).named_parameters(prefix=path):
        masks.pop(parameter, None)
    delattr(parent, name)


def tensor_of(node: object) -> TensorInfo | None:
    """Return shape, dtype and device of the tensor that a node produces, or None where that is not known."""
    value = info(node).value if isinstance(node, fx.Node) else None
    return value if isinstance(value, TensorInfo) else None
