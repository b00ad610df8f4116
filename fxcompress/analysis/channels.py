"""Channels, index by index: which indices of which dimensions live and die together.

The graph is walked once, in order, with shapes known. Every index of every channel-like dimension carries *atoms*; an
index survives if all of its atoms do. Parameters bring fresh atoms, operators relate them (`analysis.transfer` holds
one rule per kind of operator). Atoms that are tied, directly or through others, form one *group*: it is scored, masked
and removed as one. What the walk does not understand freezes its inputs, with a reason.

Along with its atoms an index carries the constant that its whole slice holds, if it holds one: that is how a channel
whose weights were masked is followed through biases, normalisation and activations to where it is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from fxcompress.analysis.grouping import Booleans, Grouping, Integers, solve
from fxcompress.errors import PassError
from fxcompress.graph import edit, ops
from fxcompress.graph.metadata import TensorInfo, graph_info, info
from fxcompress.graph.views import writes_in_place
from fxcompress.rewrite.effects import written

Floats = npt.NDArray[np.float64]

#: How many nodes are looked at for the reason why a dimension is fixed.
_SEARCHED = 50


@dataclass(frozen=True)
class Axis:
    """One dimension of a tensor, index by index.

    atoms: shape (k, size); index i survives if all of atoms[:, i] do.
    constant: shape (size,); the value that the slice at index i holds everywhere, NaN where it varies.
    """

    atoms: Integers
    constant: Floats

    def __len__(self) -> int:
        return int(self.atoms.shape[1])

    def take(self, indices: Integers | slice) -> Axis:
        """Return the axis with the given indices, in the given order."""
        return Axis(self.atoms[:, indices], self.constant[indices])

    def with_constant(self, constant: Floats) -> Axis:
        """Return the same atoms with other constants."""
        return Axis(self.atoms, constant)

    def varying(self) -> Axis:
        """Return the same atoms with no constant known."""
        return Axis(self.atoms, np.full(len(self), np.nan))


#: The axes of one tensor; None is a dimension whose size is fixed.
Axes = tuple["Axis | None", ...]


@dataclass(frozen=True)
class Read:
    """A place where the values of channels are consumed: the input axis of a convolution or linear, a normalisation.

    node: the reader. axis: what it reads. harmless: per index, whether the index can go without changing the result
    (its constant is zero, or its weights are, or what it contributes can be folded). why: what keeps the others.
    """

    node: fx.Node
    axis: Axis
    harmless: Booleans
    why: str


@dataclass(frozen=True)
class ParameterAxis:
    """One dimension of a parameter or buffer that channels index.

    paths: every dotted path of the tensor. dimension: which of its dimensions. axis: its atoms. producer: whether the
    channels are made here (the output dimension of a convolution, linear layer or embedding).
    """

    paths: tuple[str, ...]
    dimension: int
    axis: Axis
    producer: bool


@dataclass
class Walk:
    """State of one walk over a graph; the rules of `analysis.transfer` work on it."""

    graph_module: fx.GraphModule
    follow_constants: bool
    axes: dict[fx.Node, Any] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    frozen: list[tuple[Integers, str]] = field(default_factory=list)
    edges: list[tuple[Integers, Integers]] = field(default_factory=list)
    definitions: list[tuple[Integers, Integers]] = field(default_factory=list)
    products: list[tuple[fx.Node, int, tuple[Axis | None, ...]]] = field(default_factory=list)
    sizes: set[fx.Node] = field(default_factory=set)
    written: set[tuple[fx.Node, int]] = field(default_factory=set)
    parameters: dict[tuple[int, int], Axis | None] = field(default_factory=dict)
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)
    producers: set[tuple[int, int]] = field(default_factory=set)
    divisors: set[int] = field(default_factory=set)
    atom_count: int = 0
    callers: dict[str, list[fx.Node]] = field(default_factory=dict)
    current: fx.Node | None = None
    causes: dict[fx.Node, str] = field(default_factory=dict)

    def fresh(self, size: int, constant: Floats | None = None) -> Axis:
        """Return an axis of `size` new atoms."""
        atoms = np.arange(self.atom_count, self.atom_count + size, dtype=np.int64)[None]
        self.atom_count += size
        return Axis(atoms, np.full(size, np.nan) if constant is None else constant)

    def freeze(self, axis: Axis | None, why: str) -> None:
        """Keep every index of an axis, for the reason given."""
        if axis is not None:
            self.frozen.append((axis.atoms.ravel(), why))
            if self.current is not None and len(axis) > 1:
                self.causes.setdefault(self.current, why)

    def freeze_all(self, axes: Any, why: str) -> None:
        """Keep every index of every axis in a nest of axes."""
        if isinstance(axes, Axis):
            self.freeze(axes, why)
        elif isinstance(axes, (tuple, list)):
            for item in axes:
                self.freeze_all(item, why)
        elif isinstance(axes, dict):
            self.freeze_all(tuple(axes.values()), why)

    def link(self, left: Integers, right: Integers) -> None:
        """Tie atoms pairwise."""
        self.edges.append((left.ravel(), right.ravel()))

    def define(self, atoms: Integers, parts: Integers) -> None:
        """Say that every atom lives if all of its parts do: atoms of shape (n,), parts of shape (n, m)."""
        self.definitions.append((atoms, parts))

    def tie(self, left: Axis | None, right: Axis | None, why: str) -> Axis | None:
        """Let equal indices of two axes live and die together; `why` is said where that is not possible."""
        if left is None or right is None:
            if left is not right:
                self._freeze_beside_fixed(left or right, why)
            return None
        if left.atoms.shape != right.atoms.shape:
            self.freeze(left, why)
            self.freeze(right, why)
            return left.varying()
        self.link(left.atoms, right.atoms)
        return left

    def _freeze_beside_fixed(self, axis: Axis | None, why: str) -> None:
        """Freeze an axis that is tied to a dimension of fixed size, and say what has fixed that, where it is known."""
        cause = self._cause()
        self.freeze(axis, f"{why} ({cause})" if cause is not None else why)
        if cause is not None and self.current is not None:
            self.causes[self.current] = cause

    def _cause(self) -> str | None:
        """The nearest reason for a dimension being fixed before the current node."""
        front = list(self.current.all_input_nodes) if self.current is not None else []
        seen = set(front)
        while front and len(seen) < _SEARCHED:
            node = front.pop(0)
            if node in self.causes:
                return self.causes[node]
            new = [source for source in node.all_input_nodes if source not in seen]
            seen.update(new)
            front += new
        return None

    def parameter(
        self, tensor: torch.Tensor | None, dimension: int, axis: Axis | None, why: str, producer: bool = False
    ) -> None:
        """Say that a dimension of a parameter is indexed by an axis. A tensor met before is tied to its old one."""
        if tensor is None:
            return
        key = (id(tensor), dimension)
        self.tensors[id(tensor)] = tensor
        if producer:
            self.producers.add(key)
        if key in self.parameters:
            known = self.parameters[key]
            self.parameters[key] = self.tie(known, axis, why) if known is not axis else known
        else:
            self.parameters[key] = axis

    def read(self, node: fx.Node, axis: Axis, harmless: Booleans, why: str) -> None:
        """Say that a node uses up the values of channels, see `Read`."""
        self.reads.append(Read(node, axis, harmless, why))

    def unused(self, weight: torch.Tensor, dimension: int) -> Booleans:
        """Return for every index along a dimension of a weight whether it holds nothing but zeros."""
        if not self.follow_constants:
            return np.zeros(weight.shape[dimension], dtype=bool)
        slices = weight.detach().movedim(dimension, 0).flatten(1)
        return np.asarray((slices == 0).all(1).cpu().numpy())

    def made_here(self, tensor: torch.Tensor, dimension: int) -> Axis | None:
        """Return the axis of a parameter's output dimension: fresh atoms at the first visit, the same ones later."""
        key = (id(tensor), dimension)
        if key not in self.parameters:
            self.parameter(tensor, dimension, self.fresh(tensor.shape[dimension]), "", producer=True)
        self.producers.add(key)
        known = self.parameters[key]
        return None if known is None else known.varying()

    def called_once(self, node: fx.Node) -> bool:
        """Whether a module is called by one node only and shares no parameter, so that its bias may change."""
        return len(self.callers.get(str(node.target), ())) == 1

    def of(self, node: object) -> Axes:
        """Return the axes of a tensor node; all None where nothing is known."""
        if not isinstance(node, fx.Node):
            return ()
        value = info(node).value
        found = self.axes.get(node)
        if isinstance(found, tuple) and isinstance(value, TensorInfo):
            return found
        return (None,) * len(value.shape) if isinstance(value, TensorInfo) else ()


@dataclass(frozen=True)
class ChannelAnalysis:
    """The result of a walk.

    axes: what every tensor node carries. parameters: every dimension of a parameter that channels index.
    divisors: the same for tensors that something is divided by: they follow the removal, but zeros would be wrong.
    reads: where channels are consumed. grouping: atom -> group. frozen: group -> why it stays whole.
    products: matrix products without weights, their MACs, and the axes that these are proportional to.
    sizes: nodes that compute a number from channel sizes, which no input changes.
    written: (node, dimension) of shapes in which a number has to stand instead of what computes it.
    """

    axes: dict[fx.Node, Any]
    parameters: tuple[ParameterAxis, ...]
    reads: tuple[Read, ...]
    grouping: Grouping
    frozen: dict[int, str]
    products: tuple[tuple[fx.Node, int, tuple[Axis | None, ...]], ...] = ()
    sizes: frozenset[fx.Node] = frozenset()
    written: frozenset[tuple[fx.Node, int]] = frozenset()
    divisors: tuple[ParameterAxis, ...] = ()

    @property
    def group_count(self) -> int:
        """Number of groups."""
        return self.grouping.count

    def groups(self, axis: Axis) -> Integers:
        """Return the groups of an axis, shape (k, size): index i lives if all of the groups in column i do."""
        found = self.grouping.group[axis.atoms]
        if self.grouping.parts is None:
            return found
        parts = np.moveaxis(self.grouping.parts[found], 2, 1)  # [k, parts, size]
        rows = np.where(parts >= 0, parts, parts[:, :1]).reshape(-1, len(axis))
        different = {row.tobytes(): place for place, row in reversed(list(enumerate(rows)))}
        return rows[sorted(different.values())]

    def alive(self, axis: Axis, dead: Booleans) -> Booleans:
        """Return which indices of an axis survive when the groups marked in `dead` (shape (groups,)) are removed."""
        return np.asarray(~dead[self.groups(axis)].any(axis=0))

    def free(self) -> Booleans:
        """Return which groups are not frozen, shape (groups,)."""
        free = np.ones(self.group_count, dtype=bool)
        free[list(self.frozen)] = False
        return free


def analyse(graph_module: fx.GraphModule, constants: bool = False, ignore: Iterable[str] = ()) -> ChannelAnalysis:
    """Walk a canonical graph and return which channel indices belong together.

    Args:
        graph_module: a canonical graph of stage FLOAT, shapes known.
        constants: whether to follow constants too (needed for removal, not for choosing).
        ignore: dotted paths of layers whose channels stay.
    """
    from fxcompress.analysis.products import fixed, note_sizes, rule_for

    walk = Walk(graph_module, constants, callers=edit.callers(graph_module.graph))
    _forget_shared_modules(walk)
    rewritten = _written_in_place(graph_module)
    for node in graph_module.graph.nodes:
        if node.op == "output":
            for source in node.all_input_nodes:
                walk.freeze_all(walk.axes.get(source), read_outside(graph_module))
            continue
        walk.current = node
        walk.axes[node] = rule_for(node)(walk, node)
        note_sizes(walk, node)
        if node in rewritten:  # what it holds is not what it was made with
            walk.freeze_all(walk.axes[node], "written to in place")
            walk.axes[node] = fixed(info(node).value)
    return _solve(walk, set(ignore))


def read_outside(graph_module: fx.GraphModule) -> str:
    """Why the outputs of a graph keep their channels."""
    region = graph_info(graph_module).layer
    return f"output of {region}, read by code that stays Python" if region else "output of the model"


def _written_in_place(graph_module: fx.GraphModule) -> frozenset[fx.Node]:
    """What may share memory with a tensor that a node which is not canonical writes to."""
    nodes = graph_module.graph.nodes
    return written(graph_module.graph) if any(writes_in_place(node, graph_module) for node in nodes) else frozenset()


def _forget_shared_modules(walk: Walk) -> None:
    """A module that shares a parameter with another counts as called by both."""
    users: dict[int, set[str]] = {}
    for path in list(walk.callers):
        for tensor in walk.graph_module.get_submodule(path).parameters():
            users.setdefault(id(tensor), set()).add(path)
    for paths in users.values():
        if len(paths) > 1:
            for path in paths:
                walk.callers[path] = walk.callers[path] * 2


def _solve(walk: Walk, ignore: set[str]) -> ChannelAnalysis:
    """Turn ties into groups, and freezing of atoms into freezing of groups."""
    paths = edit.tensor_paths(walk.graph_module)
    indexed = {
        key: ParameterAxis(tuple(paths[key[0]]), key[1], axis, key in walk.producers)
        for key, axis in walk.parameters.items()
        if axis is not None and key[0] in paths
    }
    parameters = tuple(found for key, found in indexed.items() if key[0] not in walk.divisors)
    frozen: dict[int, str] = {}
    found = ChannelAnalysis(
        walk.axes, parameters, tuple(walk.reads), solve(walk.atom_count, walk.edges, walk.definitions), frozen,
        tuple(walk.products), frozenset(walk.sizes), frozenset(walk.written),
        tuple(found for key, found in indexed.items() if key[0] in walk.divisors),
    )  # fmt: skip
    for parameter in parameters:
        if parameter.producer and any(path.rpartition(".")[0] in ignore or path in ignore for path in parameter.paths):
            frozen.update(dict.fromkeys(np.unique(found.groups(parameter.axis)).tolist(), "ignored on request"))
    for atoms, why in walk.frozen:
        for group in np.unique(found.groups(Axis(atoms[None], np.empty(0)))).tolist():
            frozen.setdefault(group, why)
    for group in found.grouping.tangled.tolist():
        frozen.setdefault(group, "cut into parts in two ways that contradict each other")
    return found


def numbers(tensor: torch.Tensor | None, size: int, default: float) -> Floats:
    """Return a parameter as float64 numbers, or `default` everywhere where there is none."""
    if tensor is None:
        return np.full(size, default)
    found: Floats = tensor.detach().double().cpu().reshape(-1).numpy()
    return found


def layer(node: fx.Node) -> nn.Module:
    """Return the module that a node calls.

    Raises:
        PassError: it calls none.
    """
    module = ops.submodule(node)
    if module is None:
        raise PassError(f"node {node.name!r} calls no module")
    return module
