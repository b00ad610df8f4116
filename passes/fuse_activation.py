"""FuseActivation: which activations and residual adds the kernel of a layer computes as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcompress.graph import ops
from fxcompress.graph.metadata import info, set_info
from fxcompress.pipeline.base import PassContext, PassResult
from fxcompress.rewrite.driver import RulePass, apply
from fxcompress.rewrite.match import Match, Refusal, Rule, mismatch, refuse, too_many_readers
from fxcompress.rewrite.pattern import anything, op
from fxcompress.rewrite.workspace import Workspace, tensor_of

#: Activations that kernels compute on their result.
ACTIVATIONS = ("relu", "relu6", "hardtanh", "hardswish", "silu", "gelu", "leaky_relu", "sigmoid", "hardsigmoid")


@dataclass(frozen=True)
class FuseActivation(RulePass):
    """Mark activations and residual adds behind a convolution, transposed convolution or linear layer.

    The marked nodes stay in the graph, which computes what it did before; a lowering reads the marks
    (`NodeInfo.epilogue_of`) and gives layer, add and activation to one kernel. The order is

        layer -> [add of another tensor] -> [activation]

    1. Marks an activation that is the only reader of a layer, or of an add that is marked.
    2. Marks an add that is the only reader of a layer; of two layers the later one is taken, as its kernel runs when
       the other addend is known.
    3. Refuses a layer or add that other nodes read as well: its own value is needed then.
    4. Refuses an add of two shapes or dtypes, of a value to itself, and of a value that does not depend on the model's
       inputs: it would be of another shape at another batch size.
    5. Refuses if a value involved is written to in place somewhere.

    Marks that do not hold any more are removed.
    """

    name: ClassVar[str] = "fuse-activation"
    refused: ClassVar[str] = "not fused"

    def rules(self) -> tuple[Rule, ...]:
        """Return the rule for adds and the one for activations."""
        add = op("add", bind="node", input=anything(), other=anything())
        activation = op(*ACTIVATIONS, bind="node", input=anything("input"))
        done = {"node": "{kind} computed by the kernel of {layer}", "layer": "computes the {kind} behind it"}
        return (
            Rule("fuse-add", add, _mark, _check_add, done),
            Rule("fuse-activation", activation, _mark, _check_activation, done),
        )

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Work out the marks anew, and compare them with those there were."""
        before = {node: info(node).epilogue_of for node in graph_module.graph.nodes}
        for node, mark in before.items():
            if mark is not None:
                set_info(node, epilogue_of=None)
        applied = apply(graph_module, self.rules())
        edits = sum(info(node).epilogue_of != mark for node, mark in before.items())
        return PassResult(graph_module, edits > 0, edits, applied.notes(self.refused))


def _mark(match: Match) -> None:
    match.workspace.set_epilogue(match["node"], match["layer"])


def _check_add(match: Match) -> Refusal | None:
    return _accept(match, _layer_of_add(match["node"], match.workspace))


def _check_activation(match: Match) -> Refusal | None:
    source = match["input"]
    if ops.kind(source) in ops.ANCHOR_KINDS:
        return too_many_readers(source) or _accept(match, source)
    if ops.kind(source) == "add" and isinstance(layer := _layer_of_add(source, match.workspace), fx.Node):
        return too_many_readers(source) or _accept(match, layer)
    return mismatch(f"`{source.name}` ({ops.kind(source)}) has no kernel that computes activations", source)


def _accept(match: Match, layer: fx.Node | Refusal) -> Refusal | None:
    """Bind the layer whose kernel shall compute the node, unless it does already."""
    if isinstance(layer, Refusal):
        return layer
    node = match["node"]
    if info(node).epilogue_of == layer.name:
        return mismatch(f"`{node.name}` is marked already", node)
    if tensor_of(node) is None or tensor_of(node) != tensor_of(layer):
        return refuse(f"`{node.name}` gives {info(node).value}, `{layer.name}` {info(layer).value}", node, layer)
    for involved in (node, layer, *layer.all_input_nodes):
        if match.workspace.is_written(involved):
            return refuse(f"`{involved.name}` is written to in place", involved)
    match.bound["layer"] = layer
    return None


def _layer_of_add(add: fx.Node, workspace: Workspace) -> fx.Node | Refusal:
    """Return the layer whose kernel can add the other addend to its result."""
    arguments = ops.arguments(add)
    addends = [value for value in (arguments["input"], arguments["other"]) if isinstance(value, fx.Node)]
    layers = [value for value in addends if ops.kind(value) in ops.ANCHOR_KINDS]
    if not layers:
        return mismatch(f"`{add.name}` adds no result of a layer with a kernel", add)
    if len(set(addends)) < 2 or "alpha" in arguments:
        return refuse(f"`{add.name}` does not add one tensor to another", add)
    single = [layer for layer in layers if len(layer.users) == 1]
    if not single:
        return too_many_readers(layers[0]) or mismatch("", add)
    layer = max(single)
    other = addends[0] if layer is addends[1] else addends[1]
    if tensor_of(other) is None or tensor_of(other) != tensor_of(layer):
        return refuse(f"`{add.name}` adds {info(layer).value} and {info(other).value}", add, layer, other)
    if not workspace.depends_on_input(other):
        return refuse(f"`{other.name}` does not depend on the inputs, and keeps its shape at other batch sizes", other)
    return layer
