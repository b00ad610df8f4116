"""EliminateCommon: what is computed twice is computed once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxcompress.graph.metadata import Stage
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult
from fxcompress.rewrite import effects
from fxcompress.rewrite.match import layer_of


@dataclass(frozen=True)
class EliminateCommon(Pass):
    """Merge nodes that compute the same value: one call, of one function or module, with equal arguments.

    The nodes are numbered by value in one walk (Alpern, Wegman and Zadeck, Detecting Equality of Variables in Programs,
    1988, without loops): two calls are equal if they call the same thing with arguments that are equal.

    1. Merges calls of known functions, methods and modules, and reads of one attribute.
    2. Keeps what draws random numbers (dropout in either mode, so that a later training draws as often as before),
       batch norms in training mode (each call changes the statistics), and what the operator table does not know.
    3. Keeps values that share memory with a tensor that is written to in place.
    4. Keeps two outputs of the model apart: they would become one tensor.
    """

    name: ClassVar[str] = "eliminate-common"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FLOAT, Stage.QDQ})
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Walk the graph once, and let readers of each repeated node read the first of its kind."""
        written = effects.written(graph_module.graph)
        first: dict[Hashable, fx.Node] = {}
        notes: list[Note] = []
        for node in list(graph_module.graph.nodes):
            if node in written or not effects.is_repeatable(node):
                continue
            key = (node.op, node.target, _key(node.args), _key(node.kwargs))
            earlier = first.setdefault(key, node)
            if earlier is not node and not (_is_output(node) and _is_output(earlier)):
                notes.append(Note(layer_of(node), f"{node.name} removed: {earlier.name} computes the same"))
                node.replace_all_uses_with(earlier)
                graph_module.graph.erase_node(node)
        if notes:
            graph_module.recompile()
        return PassResult(graph_module, bool(notes), len(notes), tuple(notes))


def _is_output(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _key(value: Any) -> Hashable:
    """A value as a key: equal keys are equal arguments. Types count, as 1, 1.0 and True are not the same argument."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (tuple, list)):
        return (type(value), *(_key(item) for item in value))
    if isinstance(value, dict):
        return (dict, *((name, _key(item)) for name, item in sorted(value.items(), key=lambda pair: str(pair[0]))))
    if isinstance(value, slice):
        return (slice, _key(value.start), _key(value.stop), _key(value.step))
    return (type(value), repr(value))
