"""FoldConstants: what does not depend on the inputs is computed once, now."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxcompress.errors import OptionError
from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import TensorInfo, graph_info, info, set_info
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult
from fxcompress.rewrite import effects
from fxcompress.rewrite.match import layer_of


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute what does not depend on the inputs, and store the result.

    A folded tensor is a buffer, or a parameter if something that it was computed from is trained: its values are then
    trained instead. The tensors it was computed from go when nothing else reads them.

    1. Folds calls of known functions, methods and layers on parameters, buffers and other constants; of a chain, the
       last one is stored. A number (a size of a parameter) is written into its readers. A mere view of an attribute
       stays: it costs nothing.
    2. Keeps what draws random numbers, what is not in evaluation mode, what the operator table does not know, and what
       shares memory with a tensor that is written to in place.
    3. Keeps what is computed from a masked parameter: the mask would be lost; and from a trained parameter that is used
       elsewhere too: the two would be trained apart.
    4. Keeps a tensor that would take more than `max_growth` bytes beyond those it replaces.

    Args:
        max_growth: bytes by which one stored result may exceed the tensors that it replaces.
    """

    name: ClassVar[str] = "fold-constants"
    contract: ClassVar[Contract] = Contract.EXACT

    max_growth: int = 1 << 20

    def __post_init__(self) -> None:
        if isinstance(self.max_growth, bool) or not isinstance(self.max_growth, int) or self.max_growth < 0:
            raise OptionError(f"{self.name}: max_growth must be a number of bytes, at least 0, not {self.max_growth!r}")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Find the constant nodes, compute those that others read, and store them."""
        folding = _Folding(graph_module, self.max_growth)
        notes = folding.run()
        if folding.edits:
            graph_module.recompile()
        return PassResult(graph_module, folding.edits > 0, folding.edits, tuple(notes))


class _Folding:
    """One run: which nodes are constant, which of them are stored, and the edits."""

    def __init__(self, graph_module: fx.GraphModule, max_growth: int) -> None:
        self.graph_module = graph_module
        self.max_growth = max_growth
        self.paths = edit.tensor_paths(graph_module)
        self.sources = self._find_constants()
        self.readers = self._find_readers()
        self.alive = self._find_alive()
        self.computed = self._find_computed()
        self.values: dict[fx.Node, Any] = {}
        self.edits = 0

    def run(self) -> list[Note]:
        """Store every result that something else reads, and say of each what became of it."""
        notes: list[Note] = []
        for node in [node for node in self.sources if node in self.computed and self._is_read_by_others(node)]:
            reason = self._refusal(node)
            if reason is not None:
                notes.append(Note(layer_of(node), f"{node.name} not folded: {reason}"))
                continue
            notes.append(Note(layer_of(node), f"{node.name} folded: it does not depend on the inputs"))
            self._store(node)
            self.edits += 1
        self._erase_dead()
        return notes

    # -- what is constant ---------------------------------------------------------------------------------------

    def _find_constants(self) -> dict[fx.Node, frozenset[str]]:
        """Every node that does not depend on the inputs, with the attributes that it is computed from."""
        graph = self.graph_module.graph
        written, found = effects.written(graph), dict[fx.Node, frozenset[str]]()
        for node in graph.nodes:
            inputs = node.all_input_nodes
            if node in written or not effects.is_repeatable(node) or any(source not in found for source in inputs):
                continue
            if node.op == "call_module" and any(module.training for module in self._module(node).modules()):
                continue
            own = {str(node.target)} if node.op == "get_attr" else set(self._module_tensors(node))
            if not all(isinstance(edit.attribute(self.graph_module, path), torch.Tensor) for path in own):
                continue
            found[node] = frozenset(own).union(*(found[source] for source in inputs))
        return found

    def _find_readers(self) -> dict[str, set[fx.Node]]:
        """For each attribute, the constants that are computed from it."""
        found: dict[str, set[fx.Node]] = defaultdict(set)
        for node, paths in self.sources.items():
            for path in paths:
                found[path].add(node)
        return found

    def _find_alive(self) -> set[str]:
        """Paths of the tensors of layers that are called on what is not constant."""
        nodes = [node for node in self.graph_module.graph.nodes if node not in self.sources]
        return {path for node in nodes for path in self._module_tensors(node)}

    def _find_computed(self) -> set[fx.Node]:
        """The constants that take arithmetic, rather than a view of an attribute, which costs nothing."""
        found: set[fx.Node] = set()
        for node in self.sources:
            if not _is_view(node) or any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def _module(self, node: fx.Node) -> nn.Module:
        return self.graph_module.get_submodule(str(node.target))

    def _module_tensors(self, node: fx.Node) -> list[str]:
        if node.op != "call_module":
            return []
        module = self._module(node)
        return [f"{node.target}.{name}" for name, _ in (*module.named_parameters(), *module.named_buffers())]

    def _is_read_by_others(self, node: fx.Node) -> bool:
        value = info(node).value
        storable = isinstance(value, TensorInfo) or type(value) in (int, float, bool)
        return storable and any(user not in self.sources for user in node.users)

    # -- what is kept -------------------------------------------------------------------------------------------

    def _refusal(self, node: fx.Node) -> str | None:
        value = info(node).value
        if not isinstance(value, TensorInfo):
            return None
        masks = graph_info(self.graph_module).masks
        masked = sorted(path for path in self.sources[node] if path in masks)
        if masked:
            return f"`{masked[0]}` is masked"
        replaced = 0
        for path in sorted(self.sources[node]):
            tensor = edit.attribute(self.graph_module, path)
            if self._only_serves(path, tensor, node):
                replaced += tensor.nbytes
            elif tensor.requires_grad or path in self.alive:
                return f"`{path}` is used elsewhere too"
        growth = value.dtype.itemsize * torch.Size(value.shape).numel() - replaced
        if growth > self.max_growth:
            return f"the result would take {growth:,} bytes more than what it is computed from"
        return None

    def _only_serves(self, path: str, tensor: torch.Tensor, node: fx.Node) -> bool:
        """Whether nothing but `node` needs the tensor: it has one path, and its readers lead to `node` only."""
        if path in self.alive or len(self.paths.get(id(tensor), ())) > 1:
            return False
        readers = self.readers[path]
        return all(reader is node or set(reader.users) <= readers for reader in readers)

    # -- the edits ----------------------------------------------------------------------------------------------

    def _store(self, node: fx.Node) -> None:
        value = self._compute(node)
        if not isinstance(value, torch.Tensor):
            self._write_number(node, value)
            return
        sources = [edit.attribute(self.graph_module, path) for path in self.sources[node]]
        trained = value.is_floating_point() and any(tensor.requires_grad for tensor in sources)
        path = edit.unique_path(self.graph_module, f"folded_{node.name}")
        data = value.detach().clone(memory_format=torch.contiguous_format)
        if trained:
            self.graph_module.register_parameter(path, nn.Parameter(data))
        else:
            self.graph_module.register_buffer(path, data)
        with self.graph_module.graph.inserting_before(node):
            stored = self.graph_module.graph.get_attr(path)
        set_info(stored, value=info(node).value, layer=info(node).layer)
        node.replace_all_uses_with(stored, delete_user_cb=lambda user: user not in self.sources)

    def _write_number(self, node: fx.Node, number: int | float) -> None:
        for user in [user for user in node.users if user not in self.sources]:
            user.args, user.kwargs = fx.node.map_aggregate(
                (user.args, user.kwargs), lambda argument: number if argument is node else argument
            )

    def _compute(self, node: fx.Node) -> Any:
        """Return the value of a constant, and keep those on the way."""
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [source for source in current.all_input_nodes if source not in self.values]
            if missing:
                pending += missing
                continue
            pending.pop()
            if current not in self.values:
                self.values[current] = self._run(current)
        return self.values[node]

    def _run(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self.values[source])
        with torch.no_grad():
            if node.op == "get_attr":
                return edit.attribute(self.graph_module, str(node.target))
            if node.op == "call_module":
                return self._module(node)(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _erase_dead(self) -> None:
        for node in reversed(self.sources):
            if self.edits and not node.users:
                self.graph_module.graph.erase_node(node)


def _is_view(node: fx.Node) -> bool:
    """Whether a node hands on memory that it is given: no arithmetic, no conversion, no indexing by a tensor."""
    if node.op == "get_attr":
        return True
    value, given = info(node).value, info(node.all_input_nodes[0]).value if node.all_input_nodes else None
    if not isinstance(value, TensorInfo) or not isinstance(given, TensorInfo):
        return False
    by_tensor = ops.kind(node) == "getitem" and len(node.all_input_nodes) > 1
    return ops.kind(node) in ops.VIEW_KINDS and value.dtype == given.dtype and not by_tensor
