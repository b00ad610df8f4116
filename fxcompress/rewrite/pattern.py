"""What a rule looks for: small trees of operations, anchored at the last node.

    op("batch_norm", bind="norm", input=op("conv", "linear", bind="layer", readers=1))

matches a batch norm whose input comes from a convolution or linear layer that nothing else reads. Operations are named
by their canonical kinds and operands by their argument names, both from `fxcompress.graph.ops`. Compare the pattern
language of onnxscript.rewriter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Number:
    """Matches a plain number equal to one of `values` (0 matches 0.0, but not False)."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class Anything:
    """Matches any node. With a name: all operands of that name must be the same node."""

    bind: str | None = None


@dataclass(frozen=True)
class Pattern:
    """Matches a node by its kind and operands. Make one with `op`.

    kinds: canonical kinds of the node; empty for any.
    bind: name under which the match holds the node.
    operands: what the arguments must be, by argument name. Arguments that are not named may be anything.
    readers: how many nodes may read the node; None for any number.
    commutative: whether the first two operands may also stand the other way round.
    where: a further condition; returns what is wrong with a node ("its kernel is even"), or None.
    """

    kinds: frozenset[str]
    bind: str | None = None
    operands: tuple[tuple[str, Operand], ...] = ()
    readers: int | None = None
    commutative: bool = False
    where: Callable[[fx.Node], str | None] | None = None

    def orders(self) -> tuple[tuple[tuple[str, Operand], ...], ...]:
        """Return the operands in each order in which they may stand."""
        if not self.commutative or len(self.operands) < 2:
            return (self.operands,)
        (first, left), (second, right), *rest = self.operands
        return (self.operands, ((first, right), (second, left), *rest))

    def depth(self) -> int:
        """Return the number of nodes on the longest path of the pattern."""
        return 1 + max((item.depth() for _, item in self.operands if isinstance(item, Pattern)), default=0)

    def __str__(self) -> str:
        return " or ".join(sorted(self.kinds)) or "any node"


Operand = Pattern | Number | Anything


def op(
    *kinds: str,
    bind: str | None = None,
    readers: int | None = None,
    commutative: bool = False,
    where: Callable[[fx.Node], str | None] | None = None,
    **operands: Operand,
) -> Pattern:
    """Return a pattern for a node of one of the kinds, see `Pattern`."""
    return Pattern(frozenset(kinds), bind, tuple(operands.items()), readers, commutative, where)


def number(*values: float) -> Number:
    """Return a pattern for a plain number equal to one of `values`."""
    return Number(values)


def anything(bind: str | None = None) -> Anything:
    """Return a pattern for any node."""
    return Anything(bind)
