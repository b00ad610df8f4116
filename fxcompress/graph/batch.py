"""Other batch sizes: numbers that tracing took from the batch of the example become sizes read from the input.

A model is traced at the batch size of its example. Where its code turned a size into a plain number (`len(x)`,
`int(x.size(0))`), that number is written in the graph. A second trace at another batch size shows which numbers these
are: those that are k times the batch in both.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from fxcompress.graph.examples import ExampleValues
from fxcompress.graph.specialise import Specialisation

_CONSTANT = "_tensor_constant"  # fx's name for tensors that the code made while it was traced


class DifferentGraphError(Exception):
    """Two graphs differ in more than numbers that are multiples of the batch."""


@dataclass(frozen=True)
class Batch:
    """The batch size of an example, and of another one made from it.

    name: the input that it is read from. size, other: the two sizes. arguments: the other example, by input.
    """

    name: str
    size: int
    other: int
    arguments: dict[str, Any]

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> Batch | None:
        """Return the batch of the first tensor among the inputs, and inputs of another batch size; None without one."""
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.ndim}
        name = next((name for name, value in tensors.items() if len(value)), None)
        if name is None:
            return None
        size = len(tensors[name])
        other = size + 1 if size > 1 else 3
        return cls(name, size, other, tree_map(lambda leaf: _resized(leaf, size, other), arguments))


def _resized(leaf: Any, size: int, other: int) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == size:
        return leaf.detach()[torch.arange(other, device=leaf.device) % size]
    return leaf


def depending(specialisations: list[Specialisation], values: ExampleValues) -> list[Specialisation]:
    """Return the specialisations whose value is another one in `values`, the values at another batch size."""
    found = []
    for item in specialisations:
        try:
            value = values.concrete(item.node)
        except Exception:  # the graph does not run there: a number in it is wrong
            found.append(item)
            continue
        if isinstance(value, torch.Tensor) or isinstance(item.value, torch.Tensor):
            continue
        if type(value) is not type(item.value) or value != item.value:
            found.append(item)
    return found


def follow(root: nn.Module, graph: fx.Graph, other: fx.Graph, batch: Batch) -> int:
    """Let the numbers of `graph` that are multiples of the batch follow its size. Returns how many there are.

    Args:
        root: the module that the graphs' attributes belong to.
        graph: traced at `batch.size`, edited in place. other: the same model traced at `batch.other`.

    Raises:
        DifferentGraphError: the graphs differ in anything else.
    """
    if len(graph.nodes) != len(other.nodes):
        raise DifferentGraphError("another number of nodes")
    pairs = dict(zip(graph.nodes, other.nodes, strict=True))
    changes: list[Callable[[], None]] = []
    comparison = _Comparison(graph, pairs, batch)
    for node, twin in pairs.items():
        if node.op == "get_attr" and str(node.target).startswith(_CONSTANT):
            _compare_constants(root, node, twin, comparison, changes)
        elif node.op != twin.op or node.target != twin.target:
            raise DifferentGraphError(f"{node.name!r} is another operation")
        else:
            _compare_arguments(node, twin, comparison, changes)
    for change in changes:  # only now that all of it is known to be possible
        change()
    return comparison.count


@dataclass
class _Comparison:
    """Compares arguments, and makes the nodes that stand for multiples of the batch."""

    graph: fx.Graph
    pairs: dict[fx.Node, fx.Node]
    batch: Batch
    count: int = 0
    made: dict[int, fx.Node] = field(default_factory=dict)

    def differs(self, left: Any, right: Any) -> bool:
        """Whether two arguments differ, in multiples of the batch.

        Raises:
            DifferentGraphError: they differ in anything else.
        """
        if isinstance(left, fx.Node):
            if self.pairs.get(left) is not right:
                raise DifferentGraphError(f"{left.name!r} is read elsewhere")
            return False
        if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)) and len(left) == len(right):
            found = [self.differs(one, two) for one, two in zip(left, right, strict=True)]  # every one is checked
            return any(found)
        if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
            return self.differs(list(left.values()), [right[name] for name in left])
        if isinstance(left, slice) and isinstance(right, slice):
            return self.differs((left.start, left.stop, left.step), (right.start, right.stop, right.step))
        if type(left) is type(right) and (left is right or left == right):
            return False
        if self.multiple(left, right) is None:
            raise DifferentGraphError(f"{left!r} became {right!r}")
        return True

    def multiple(self, left: Any, right: Any) -> int | None:
        """Return k where two numbers are k times the two batch sizes, else None."""
        if type(left) is not int or type(right) is not int or left == right:
            return None
        factor = left // self.batch.size
        return factor if (left, right) == (factor * self.batch.size, factor * self.batch.other) else None

    def repaired(self, left: Any, right: Any) -> Any:
        """Return the argument `left` with nodes for the multiples of the batch."""
        factor = self.multiple(left, right)
        if factor is not None:
            self.count += 1
            return self.size(factor)
        if isinstance(left, (tuple, list)):
            return type(left)([self.repaired(one, two) for one, two in zip(left, right, strict=True)])
        if isinstance(left, dict):
            return {name: self.repaired(left[name], right[name]) for name in left}
        if isinstance(left, slice):
            parts = ((left.start, right.start), (left.stop, right.stop), (left.step, right.step))
            return slice(*(self.repaired(one, two) for one, two in parts))
        return left

    def size(self, factor: int) -> fx.Node:
        """Return the node for `factor` times the batch size."""
        if factor not in self.made:
            placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
            source = next(node for node in placeholders if node.target == self.batch.name)
            after = placeholders[-1] if factor == 1 else self.size(1)
            with self.graph.inserting_after(after):
                self.made[factor] = (
                    self.graph.call_method("size", (source, 0)) if factor == 1
                    else self.graph.call_function(operator.mul, (self.size(1), factor))
                )  # fmt: skip
        return self.made[factor]


def _compare_arguments(
    node: fx.Node, twin: fx.Node, comparison: _Comparison, changes: list[Callable[[], None]]
) -> None:
    given, wanted = (node.args, node.kwargs), (twin.args, twin.kwargs)
    if not comparison.differs(given, wanted):
        return

    def change() -> None:
        node.args, node.kwargs = comparison.repaired(given, wanted)

    changes.append(change)


def _compare_constants(
    root: nn.Module, node: fx.Node, twin: fx.Node, comparison: _Comparison, changes: list[Callable[[], None]]
) -> None:
    """A constant with one row per sample, all of them equal, becomes one row that is repeated."""
    left = getattr(root, str(node.target))
    right = getattr(root, str(twin.target)) if twin.op == "get_attr" else None
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor) or left.dtype != right.dtype:
        raise DifferentGraphError(f"{node.name!r} is another constant")
    if left.shape == right.shape and torch.equal(left, right):
        return
    same_rows = left.ndim == right.ndim and left.ndim and len(left) and len(right)
    if not same_rows or not torch.equal(left[:1].expand_as(left), left) or not torch.equal(
        left[:1].expand_as(right) if left.shape[1:] == right.shape[1:] else left, right
    ):  # fmt: skip
        raise DifferentGraphError(f"the constant {node.name!r} has other values")
    factor = comparison.multiple(len(left), len(right))
    if factor is None:
        raise DifferentGraphError(f"the constant {node.name!r} has another shape")

    def change() -> None:
        comparison.count += 1
        setattr(root, str(node.target), left[:1].clone())
        size = comparison.size(factor)
        with comparison.graph.inserting_after(node):
            repeated = comparison.graph.call_method("repeat", (node, size, *[1] * (left.ndim - 1)))
        node.replace_all_uses_with(repeated, delete_user_cb=lambda user: user is not repeated)

    changes.append(change)
