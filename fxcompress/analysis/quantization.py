"""Where numbers become 8-bit: which layers, which values between them, and which values share one grid.

A value is quantised where an 8-bit layer on a fixed grid reads it; layers whose input is measured at every call, or
stays float, ask for no value (`quant.spec.MODES`). Operators that only move numbers (cat, reshape, max pooling, ...)
tie their inputs and outputs to one grid, so that they cost nothing; operators that compute between 8-bit layers (sums,
products with a gate, average pooling, batch norms that no layer could take in) are quantised as well if their inputs
are 8-bit anyway. Attention whose result an 8-bit layer reads multiplies bytes, too; what it reads is tied to nothing,
because query, key and value are often parts of one tensor, with ranges of their own. Everything else stays float, with
a reason.

A grid that several values share is a compromise. So values are joined on one only if a kernel reads what they are
joined to, and outputs of the model read them as they were before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from fxcompress.graph import ops
from fxcompress.graph.metadata import TensorInfo, info, is_tensor, tensors
from fxcompress.quant.spec import STATIC, WEIGHT_ONLY

#: Kinds whose result holds numbers of its input, and no others.
_MOVERS = frozenset(
    {"flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "getitem", "split", "chunk", "unbind",
     "narrow", "select", "index_select", "unflatten", "flip", "roll", "pixel_shuffle", "pixel_unshuffle",
     "channel_shuffle", "cat", "stack", "expand", "expand_as", "repeat", "broadcast_to", "view_as", "identity",
     "dropout", "amax"}
)  # fmt: skip

#: Kinds that compute, and that 8-bit kernels exist for besides the layers.
_COMPUTING = frozenset({"add", "mul", "avg_pool", "adaptive_avg_pool", "mean", "batch_norm"})

#: Those whose kernels compute a relu behind them, too.
_WITH_RELU = frozenset({"add", "batch_norm"})

#: Kinds that compute no tensor worth a line in the ledger.
_SILENT = frozenset({"placeholder", "output", "get_attr", "size", "ndim", "numel", "getattr", "item", "opaque_number"})

_FOR_ATTENTION = "attention brings it onto a grid itself"

Accepts = Callable[[str, nn.Module], str | None]
ModeOf = Callable[[str, nn.Module], str]


@dataclass(frozen=True)
class Anchor:
    """A layer that becomes 8-bit.

    node: name of its node. path: of its module.
    epilogues: names of the nodes that its kernel computes as well, in order.
    mode: how it gets its input, one of `quant.spec.MODES`.
    """

    node: str
    path: str
    epilogues: tuple[str, ...] = ()
    mode: str = STATIC

    @property
    def end(self) -> str:
        """Name of the node that holds the result of layer and epilogues."""
        return self.epilogues[-1] if self.epilogues else self.node


@dataclass(frozen=True)
class GridGroup:
    """Values that share one scale and zero point, and so one observer.

    values: names of the nodes that produce them, in order. layer: path of the 8-bit layer whose choice of observer
    they follow: the one that produces the first of them, or else one that reads them. outside: names of the nodes that
    read the values as they are, before they are brought onto the grid.
    """

    values: tuple[str, ...]
    layer: str
    outside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the group: that of its first value."""
        return self.values[0]


@dataclass(frozen=True)
class QuantizationPlan:
    """What becomes 8-bit.

    anchors: the 8-bit layers. groups: the values to observe. computing: names of other nodes computed in 8 bits, and of
    the relu behind a sum or batch norm if there is one. attention: names of the nodes of attention that multiply bytes.
    reasons: why a layer or node stays float, by layer path or node name.
    """

    anchors: tuple[Anchor, ...]
    groups: tuple[GridGroup, ...]
    computing: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            " + ".join((f"int8 {anchor.path}", *anchor.epilogues)) + _suffix(anchor.mode) for anchor in self.anchors
        ]
        lines += [f"int8 {name}" for name in (*self.computing, *self.attention)]
        lines += [f"grid {', '.join(group.values)}" for group in self.groups]
        lines += [f"float {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def _suffix(mode: str) -> str:
    return "" if mode == STATIC else f" ({mode})"


def plan_quantization(
    graph_module: fx.GraphModule,
    accepts: Accepts,
    mode_of: ModeOf = lambda path, module: STATIC,
    attention: bool = True,
) -> QuantizationPlan:
    """Decide what becomes 8-bit in a canonical float graph whose shapes are known.

    Args:
        graph_module: the graph; marks of `FuseActivation` are respected.
        accepts: called with path and module of each convolution, linear layer and embedding; returns why it shall stay
            float, or None.
        mode_of: called likewise; returns one of `quant.spec.MODES`. Convolutions are 8-bit in the first one only,
            embeddings in the last one.
        attention: whether attention may multiply bytes.
    """
    return _Planner(graph_module, accepts, mode_of, attention).plan()


class _Planner:
    """The facts gathered about one graph."""

    def __init__(self, graph_module: fx.GraphModule, accepts: Accepts, mode_of: ModeOf, attention: bool) -> None:
        self.graph = graph_module.graph
        self.attention = attention
        self.accepts = accepts
        self.mode_of = mode_of
        self.modes: dict[str, str] = {}  # path of a layer -> its mode
        self.reasons: dict[str, str] = {}
        self.regions: dict[fx.Node, tuple[fx.Node, ...]] = {}  # end of a region -> the layer and its epilogues
        self.leader: dict[fx.Node, fx.Node] = {}  # union-find over nodes of one grid
        self.members: dict[fx.Node, list[fx.Node]] = {}

    def plan(self) -> QuantizationPlan:
        self._find_regions()
        self._tie_movers()
        computable = self._computable()
        demanded, chosen = self._demanded(computable)
        attending = self._attending(demanded)
        groups = (*self._groups(demanded), *self._read_by_attention(attending, demanded))
        self._give_reasons(demanded, chosen, attending)
        anchors = [
            Anchor(nodes[0].name, str(nodes[0].target), tuple(node.name for node in nodes[1:]), self._mode(nodes[0]))
            for nodes in self.regions.values()
        ]
        order = {node.name: index for index, node in enumerate(self.graph.nodes)}
        anchors.sort(key=lambda anchor: order[anchor.node])
        computing = sorted((node.name for node in chosen), key=lambda name: order[name])
        names = tuple(node.name for node in attending)
        return QuantizationPlan(tuple(anchors), groups, tuple(computing), names, self.reasons)

    # Layers and what their kernels compute as well

    def _find_regions(self) -> None:
        marked: dict[str, list[fx.Node]] = defaultdict(list)
        for node in self.graph.nodes:
            mark = info(node).epilogue_of
            if mark is not None:
                marked[mark].append(node)
        for node in self.graph.nodes:
            kind = ops.kind(node)
            if kind in ("conv", "linear") or (kind == "embedding" and self._mode(node) == WEIGHT_ONLY):
                reason = _unfit(node) or self.accepts(str(node.target), _module(node)) or self._unmeasured(node, kind)
                if reason is None:
                    chain = _chain(node, marked[node.name])
                    self.regions[chain[-1]] = chain
                else:
                    self.reasons.setdefault(str(node.target), reason)

    def _mode(self, node: fx.Node) -> str:
        path = str(node.target)
        if path not in self.modes:
            self.modes[path] = self.mode_of(path, _module(node))
        return self.modes[path]

    def _unmeasured(self, node: fx.Node, kind: str) -> str | None:
        """Why a layer stays float where values have no fixed grids."""
        if self._mode(node) == STATIC:
            return None
        if not _module(node).weight.numel():
            return "its weight is empty"
        if kind != "conv":
            return None
        return f"a convolution needs values on fixed grids, which mode='{self._mode(node)}' does not measure"

    # Values on one grid

    def _tie_movers(self) -> None:
        for node in self.graph.nodes:
            self.leader[node], self.members[node] = node, [node]
        read = self._read_by_kernels()
        for node in self.graph.nodes:
            sources = data_inputs(node) if moves(node) else []
            if len(sources) == 1 or node in read:
                for source in sources:
                    self._tie(source, node)

    def _read_by_kernels(self) -> set[fx.Node]:
        """Nodes whose numbers an 8-bit kernel may read, behind operators that move them."""
        inside = {node for nodes in self.regions.values() for node in nodes}
        found: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if any(user in inside or _computes(user) or (moves(user) and user in found) for user in node.users):
                found.add(node)
        return found

    def _only_outputs(self) -> set[fx.Node]:
        """The model's output, and nodes that move numbers to it and nowhere else."""
        found: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if node.op == "output" or (moves(node) and all(user in found for user in node.users)):
                found.add(node)
        return found

    def _tie(self, left: fx.Node, right: fx.Node) -> None:
        keep, lose = self.leader[left], self.leader[right]
        if keep is lose:
            return
        if len(self.members[keep]) < len(self.members[lose]):
            keep, lose = lose, keep
        for node in self.members.pop(lose):
            self.leader[node] = keep
            self.members[keep].append(node)

    def _sources(self, leader: fx.Node) -> list[fx.Node]:
        return [node for node in self.members[leader] if not moves(node)]

    # What can be, and what has to be, 8-bit

    def _computable(self) -> set[fx.Node]:
        """Nodes of `_COMPUTING` whose inputs come from 8-bit layers and computations only."""
        inside = {node for nodes in self.regions.values() for node in nodes}
        found = {node for node in self.graph.nodes if _computes(node) and node not in inside}
        while True:
            lost = {node for node in found if not all(self._available(one, found) for one in _operands(node))}
            if not lost:
                return found
            found -= lost

    def _available(self, value: fx.Node, computable: set[fx.Node]) -> bool:
        """Whether 8-bit kernels produce a value."""
        starts = {_before_relu(node) for node in self._sources(self.leader[value])}
        return all(self._stores_bytes(node) or node in computable for node in starts)

    def _stores_bytes(self, node: fx.Node) -> bool:
        """Whether an 8-bit layer ends here that multiplies integers."""
        return node in self.regions and self._mode(self.regions[node][0]) != WEIGHT_ONLY

    def _demanded(self, computable: set[fx.Node]) -> tuple[dict[fx.Node, str], set[fx.Node]]:
        """Return the grids that 8-bit kernels read, each with a layer that follows, and the computing nodes."""
        demanded: dict[fx.Node, str] = {}
        chosen: set[fx.Node] = set()
        static = [nodes[0] for nodes in self.regions.values() if self._mode(nodes[0]) == STATIC]
        waiting = [(data_inputs(layer)[0], str(layer.target)) for layer in static]
        while waiting:
            value, layer = waiting.pop()
            leader = self.leader[value]
            if leader in demanded:
                continue
            demanded[leader] = layer
            for source in self._sources(leader):
                start = _before_relu(source)
                if source in self.regions:
                    addends = self._addends(self.regions[source])
                    waiting += [(one, layer) for one in addends if self._available(one, computable)]
                elif start in computable:
                    chosen |= {start, source}
                    waiting += [(one, layer) for one in _operands(start)]
        return demanded, chosen

    def _addends(self, region: tuple[fx.Node, ...]) -> list[fx.Node]:
        """What the epilogues of a region add to it."""
        return [
            operand
            for before, node in pairwise(region)
            if ops.kind(node) == "add"
            for operand in data_inputs(node)
            if operand is not before
        ]

    def _groups(self, demanded: dict[fx.Node, str]) -> Iterator[GridGroup]:
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        outputs = self._only_outputs()
        found = []
        for leader, layer in demanded.items():
            sources = sorted(self._sources(leader), key=order.__getitem__)
            layers = [self.regions[source][0] for source in sources if source in self.regions]
            producers = [str(node.target) for node in layers if self._mode(node) == STATIC]
            found.append((order[sources[0]], sources, producers[0] if producers else layer))
        for _, sources, layer in sorted(found, key=lambda item: item[0]):
            outside = {reader for source in sources for reader in source.users} & outputs if len(sources) > 1 else set()
            outside_names = tuple(node.name for node in sorted(outside, key=order.__getitem__))
            yield GridGroup(tuple(source.name for source in sources), layer, outside_names)

    # Attention

    def _attending(self, demanded: dict[fx.Node, str]) -> dict[fx.Node, str]:
        """Attention whose result an 8-bit layer reads, with the path of that layer."""
        if not self.attention:
            return {}
        fitting = [node for node in self.graph.nodes if ops.kind(node) == "attention" and _multiplies_bytes(node)]
        return {node: demanded[self.leader[node]] for node in fitting if self.leader[node] in demanded}

    def _read_by_attention(self, attending: dict[fx.Node, str], demanded: dict[fx.Node, str]) -> Iterator[GridGroup]:
        """Grids of what attention reads, for itself alone, where it has none yet."""
        layers: dict[fx.Node, str] = {}
        for node, layer in attending.items():
            for value in _attended(node):
                if self.leader[value] not in demanded or moves(value):
                    layers.setdefault(value, layer)
        for value, layer in layers.items():
            yield GridGroup((value.name,), layer, tuple(one.name for one in value.users if one not in attending))

    # The ledger

    def _give_reasons(self, demanded: dict[fx.Node, str], chosen: set[fx.Node], attending: dict[fx.Node, str]) -> None:
        inside = {node for nodes in self.regions.values() for node in nodes} | set(attending)
        waiting = [value for node in attending for value in _attended(node)]
        attended: set[fx.Node] = set()  # moved on the way to attention
        while waiting:
            value = waiting.pop()
            if moves(value) and value not in attended:
                attended.add(value)
                waiting += data_inputs(value)
        for node in self.graph.nodes:
            kind = ops.kind(node)
            moves_integers = moves(node) and self.leader[node] in demanded
            if node in inside or node in chosen or moves_integers or kind in _SILENT or not _float_values(node):
                continue
            name = str(node.target) if node.op == "call_module" else node.name
            reason = _FOR_ATTENTION if node in attended else _reason(node, kind, self.leader[node] in demanded)
            self.reasons.setdefault(name, reason)


def _reason(node: fx.Node, kind: str, demanded: bool) -> str:
    if kind not in _COMPUTING and not moves(node):
        return f"no int8 kernel for {kind}" if kind != "opaque" else "not known to fxcompress"
    return "its inputs are float" if demanded else "no int8 layer reads it"


def _unfit(node: fx.Node) -> str | None:
    """Why a layer cannot be 8-bit, whatever the user wants."""
    module = _module(node)
    values = data_inputs(node)
    weight = module.weight
    embeds = ops.kind(node) == "embedding"
    if embeds and module.max_norm is not None:
        return "max_norm changes its weight as it is read"
    if len(values) != (0 if embeds else 1) or not isinstance(weight, torch.Tensor) or weight.dtype != torch.float32:
        return "its numbers are not float32"
    if ops.kind(node) == "conv":
        if module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r}"
        if len(info(values[0]).value.shape) != weight.ndim:
            return "its input has no batch dimension"
    return None


def _chain(layer: fx.Node, marked: list[fx.Node]) -> tuple[fx.Node, ...]:
    """The layer and the marked nodes that follow one another behind it."""
    chain = [layer]
    for node in marked:
        if chain[-1] not in node.all_input_nodes or len(chain[-1].users) != 1:
            break
        chain.append(node)
    return tuple(chain)


def _module(node: fx.Node) -> Any:
    return ops.submodule(node)


def _float_values(node: fx.Node) -> bool:
    """Whether a node produces float32 tensors and nothing else."""
    found = list(tensors(info(node).value))
    return bool(found) and all(value.dtype == torch.float32 for value in found)


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the inputs of a node that carry float32 tensors."""
    return [source for source in node.all_input_nodes if _float_values(source)]


def moves(node: fx.Node) -> bool:
    """Whether a node only moves numbers, so that its result lies on the grid of its inputs."""
    kind = ops.kind(node)
    if not _float_values(node) or not data_inputs(node):
        return False
    given = ops.arguments(node)
    if kind == "max_pool":
        return not given["return_indices"]
    if kind == "adaptive_max_pool":
        size = given["output_size"]
        return not given["return_indices"] and (size == 1 or (isinstance(size, (tuple, list)) and set(size) == {1}))
    if kind == "interpolate":
        return str(given["mode"]).startswith("nearest")
    if kind == "pad":
        return given["mode"] == "constant" and not given["value"]
    if kind == "getitem" and isinstance(node.args[0], fx.Node) and not is_tensor(node.args[0]):
        return ops.kind(node.args[0]) in _MOVERS  # a piece of a split; not an entry of a list that is an input
    return kind in _MOVERS


def _computes(node: fx.Node) -> bool:
    """Whether there is an 8-bit kernel for a node, if its inputs are 8-bit."""
    kind = ops.kind(node)
    if kind not in _COMPUTING or not isinstance(info(node).value, TensorInfo) or not _float_values(node):
        return False
    given = ops.arguments(node)
    if kind == "mean":
        return given["dtype"] is None and given["dim"] is not None
    if kind == "batch_norm":
        return _module(node).running_mean is not None
    if kind in ("add", "mul"):
        values = [given["input"], given["other"]]
        return "alpha" not in given and all(isinstance(value, fx.Node) and _float_values(value) for value in values)
    return True


def _operands(node: fx.Node) -> list[fx.Node]:
    """The inputs of a computing node that must be 8-bit. The smaller factor of a product need not be."""
    values = data_inputs(node)
    if ops.kind(node) != "mul":
        return values
    shape = info(node).value.shape
    return [value for value in values if info(value).value.shape == shape] or values


def _attended(node: fx.Node) -> list[fx.Node]:
    """Query, key and value of attention."""
    given = ops.arguments(node)
    return [given[name] for name in ("query", "key", "value")]


def _multiplies_bytes(node: fx.Node) -> bool:
    """Whether 8-bit kernels could compute a node of attention."""
    values = _attended(node)
    plain = all(isinstance(one, fx.Node) and is_tensor(one) and _float_values(one) for one in values)
    return plain and ops.arguments(node)["dropout_p"] == 0 and _float_values(node)


def _before_relu(node: fx.Node) -> fx.Node:
    """What stands in front of a relu and nothing else reads, if its kernel computes both. Else the node itself."""
    if ops.kind(node) == "relu" and info(node).epilogue_of is None:
        (source,) = node.all_input_nodes
        if ops.kind(source) in _WITH_RELU and len(source.users) == 1 and info(source).epilogue_of is None:
            return source
    return node
