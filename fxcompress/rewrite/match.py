"""Rules, and what comes of trying one at a node: a match, or a refusal with its reason.

A rule that a user writes is the same thing as a built-in one, and a pass of rules is one method long
(`RulePass` is in `fxcompress.rewrite.driver`):

    def to_silu(match: Match) -> None:
        silu = match.workspace.insert(match.anchor, F.silu, (match["x"],))
        match.workspace.replace(match.anchor, silu)

    gate = op("sigmoid", input=anything("x"), readers=1)
    swish = Rule("swish", op("mul", input=anything("x"), other=gate, commutative=True), to_silu)

    @dataclass(frozen=True)
    class FindSwish(RulePass):
        name = "find-swish"

        def rules(self) -> tuple[Rule, ...]:
            return (swish,)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxcompress.graph import ops
from fxcompress.graph.metadata import info
from fxcompress.pipeline.base import Note
from fxcompress.rewrite.pattern import Anything, Number, Operand, Pattern
from fxcompress.rewrite.workspace import Workspace


@dataclass(frozen=True)
class Refusal:
    """Why a rule did not fire at a node.

    reason: in words, with nodes by name: "`conv1` is read by 2 nodes: add_3, relu_4".
    nodes: names of the nodes at fault.
    mismatch: whether the nodes have not even the kinds of the pattern, rather than failing a condition.
    """

    reason: str
    nodes: tuple[str, ...] = ()
    mismatch: bool = False

    def __str__(self) -> str:
        return self.reason


def refuse(reason: str, *nodes: fx.Node) -> Refusal:
    """Return a refusal that names the nodes at fault."""
    return Refusal(reason, tuple(node.name for node in nodes))


def mismatch(reason: str, *nodes: fx.Node) -> Refusal:
    """Return a refusal for nodes that have not the form of the rule at all, see `Refusal.mismatch`."""
    return Refusal(reason, tuple(node.name for node in nodes), mismatch=True)


@dataclass(frozen=True)
class Match:
    """The nodes that a pattern was found at, by their names in the pattern.

    anchor: the last node, the one the rule was tried at.
    workspace: the graph, its facts, and the edits that a rewrite may make.
    findings: what the check has worked out and the rewrite can use.
    """

    anchor: fx.Node
    bound: dict[str, fx.Node]
    workspace: Workspace
    findings: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> fx.Node:
        return self.bound[name]

    def module(self, name: str) -> Any:
        """Return the module that the node of that name calls, of the class that its kind says."""
        return self.workspace.module(self.bound[name])


@dataclass(frozen=True)
class Rule:
    """One rewriting: what to look for, what must hold besides, and what to do.

    name: shown in explanations, e.g. "fold-batch-norm".
    pattern: see `fxcompress.rewrite.pattern.op`.
    rewrite: edits the graph through `match.workspace`.
    check: returns why the rule does not apply although the pattern was found, or None. It must not edit.
    done: what the ledger says afterwards: of the anchor, or of each of several bound nodes by name. `{name}` stands for
        the layer of the node bound to that name, `{kind}` for the kind of the anchor.
    explains_mismatch: whether an anchor with operands of other kinds is worth an explanation: yes for "batch norm
        without a convolution before it", no for "this add does not add 0".
    """

    name: str
    pattern: Pattern
    rewrite: Callable[[Match], None]
    check: Callable[[Match], Refusal | None] = field(default=lambda match: None)
    done: str | dict[str, str] = "rewritten"
    explains_mismatch: bool = False

    def describe(self, match: Match) -> tuple[Note, ...]:
        """Return what `done` says of a match, with the names filled in."""
        layers = {name: layer_of(node) for name, node in match.bound.items()}
        words = {**layers, "kind": ops.kind(match.anchor)}
        if isinstance(self.done, str):
            return (Note(layer_of(match.anchor), self.done.format(**words)),)
        return tuple(Note(layers[name], text.format(**words)) for name, text in self.done.items())


def layer_of(node: fx.Node) -> str:
    """Return the layer of the caller's model that a node came from, or the node's own name."""
    return info(node).layer or node.name


def find(rule: Rule, node: fx.Node, workspace: Workspace) -> Match | Refusal | None:
    """Try a rule at a node. None: the node is not of the kind that the rule is anchored at."""
    if rule.pattern.kinds and ops.kind(node) not in rule.pattern.kinds:
        return None
    bound: dict[str, fx.Node] = {}
    refusal = _match_node(rule.pattern, node, bound)
    if refusal is not None:
        return refusal
    match = Match(node, bound, workspace)
    return rule.check(match) or match


def _match_node(pattern: Pattern, node: fx.Node, bound: dict[str, fx.Node]) -> Refusal | None:
    """Match below `node`, whose kind fits. Adds to `bound`."""
    best: Refusal | None = None
    before = dict(bound)
    for operands in pattern.orders():
        bound.clear()
        bound.update(before)
        refusal = _bind(pattern.bind, node, bound) or _match_operands(operands, node, bound)
        refusal = refusal or _conditions(pattern, node)
        if refusal is None:
            return None
        if best is None or (best.mismatch and not refusal.mismatch):
            best = refusal
    return best


def _match_operands(
    operands: tuple[tuple[str, Operand], ...], node: fx.Node, bound: dict[str, fx.Node]
) -> Refusal | None:
    given = ops.arguments(node) if operands else {}
    for name, operand in operands:
        refusal = _match_operand(operand, given.get(name), name, node, bound)
        if refusal is not None:
            return refusal
    return None


def _match_operand(operand: Operand, value: Any, name: str, node: fx.Node, bound: dict[str, fx.Node]) -> Refusal | None:
    if isinstance(operand, Number):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and value in operand.values
        return None if fits else mismatch(f"`{name}` of `{node.name}` is not {_listed(operand.values)}", node)
    if not isinstance(value, fx.Node):
        return mismatch(f"`{name}` of `{node.name}` is no tensor", node)
    if isinstance(operand, Anything):
        return _bind(operand.bind, value, bound)
    if operand.kinds and ops.kind(value) not in operand.kinds:
        return mismatch(f"the {name} of `{node.name}` is `{value.name}` ({ops.kind(value)}), not {operand}", value)
    return _match_node(operand, value, bound)


def _bind(name: str | None, node: fx.Node, bound: dict[str, fx.Node]) -> Refusal | None:
    if name is None:
        return None
    if bound.setdefault(name, node) is not node:
        return mismatch(f"`{bound[name].name}` and `{node.name}` are not the same value", node)
    return None


def _conditions(pattern: Pattern, node: fx.Node) -> Refusal | None:
    wrong = pattern.where(node) if pattern.where else None
    if wrong:
        return mismatch(wrong, node)
    return too_many_readers(node, pattern.readers) if pattern.readers is not None else None


def too_many_readers(node: fx.Node, allowed: int = 1) -> Refusal | None:
    """Return a refusal if a node is not read by exactly `allowed` nodes."""
    if len(node.users) == allowed:
        return None
    readers = sorted(node.users)  # in the order of the graph
    count = f"{len(readers)} node{'s' * (len(readers) != 1)}"
    return refuse(f"`{node.name}` is read by {count}: {', '.join(reader.name for reader in readers)}", node, *readers)


def _listed(values: tuple[float, ...]) -> str:
    return " or ".join(map(str, values))
