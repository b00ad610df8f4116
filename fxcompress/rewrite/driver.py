"""Applying rules to a graph until none fires, and passes that are nothing but rules."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxcompress.errors import PassError
from fxcompress.graph import ops
from fxcompress.pipeline.base import Contract, Note, Pass, PassContext, PassResult
from fxcompress.rewrite.match import Match, Refusal, Rule, find, layer_of
from fxcompress.rewrite.workspace import Workspace


@dataclass(frozen=True)
class Outcome:
    """What came of one rule at one node.

    rule, node, layer: names of the rule and the anchor, and the layer that the anchor came from.
    done: what the rule did, one line per layer; empty if it did not fire.
    refusal: why it did not fire, or None if it did.
    """

    rule: str
    node: str
    layer: str
    done: tuple[Note, ...] = ()
    refusal: Refusal | None = None

    def notes(self, refused: str) -> tuple[Note, ...]:
        """Return lines for the ledger; `refused` is the phrase before a reason, e.g. "not fused"."""
        return self.done if self.refusal is None else (Note(self.layer, f"{refused}: {self.refusal}"),)


@dataclass(frozen=True)
class Applied:
    """What applying rules to a graph did: the rules that fired, in order, and what was refused at the end."""

    done: tuple[Outcome, ...]
    refused: tuple[Outcome, ...]

    @property
    def edits(self) -> int:
        """Number of times a rule fired."""
        return len(self.done)

    def notes(self, refused: str = "not rewritten") -> tuple[Note, ...]:
        """Return the lines for the ledger."""
        return tuple(note for outcome in (*self.done, *self.refused) for note in outcome.notes(refused))


def apply(graph_module: fx.GraphModule, rules: Sequence[Rule]) -> Applied:
    """Apply rules to a graph until none fires. Edits the graph in place.

    Nodes are visited in topological order, and again when a rewrite has touched something that they read; the time is
    linear in nodes plus rewrites. At one node the first rule that fires wins.

    Raises:
        PassError: a rule matches without end, or fires without changing anything.
    """
    run = _Run(graph_module, rules)
    run.exhaust()
    if run.done:
        graph_module.recompile()
    refused = tuple(outcome for node in graph_module.graph.nodes for outcome in run.refused.get(node, {}).values())
    return Applied(tuple(run.done), refused)


class _Run:
    """The worklist, and what has come of it so far."""

    def __init__(self, graph_module: fx.GraphModule, rules: Sequence[Rule]) -> None:
        self.workspace = Workspace(graph_module)
        self.rules = rules
        self.by_kind: dict[str, list[Rule]] = {}
        self.depth = max((rule.pattern.depth() for rule in rules), default=1)
        self.queue: deque[fx.Node] = deque(graph_module.graph.nodes)
        self.queued: set[fx.Node] = set(self.queue)
        self.limit = 100 + 16 * len(self.queue) * len(rules)
        self.done: list[Outcome] = []
        self.refused: dict[fx.Node, dict[str, Outcome]] = {}

    def exhaust(self) -> None:
        while self.queue:
            node = self.queue.popleft()
            self.queued.discard(node)
            if not node._erased:
                self.visit(node)

    def visit(self, node: fx.Node) -> None:
        """Try the rules at one node, up to the first that fires."""
        self.refused.pop(node, None)
        for rule in self.anchored_at(ops.kind(node)):
            found = find(rule, node, self.workspace)
            if isinstance(found, Match):
                self.fire(rule, found)
                return
            if found is not None and (rule.explains_mismatch or not found.mismatch):
                outcome = Outcome(rule.name, node.name, layer_of(node), refusal=found)
                self.refused.setdefault(node, {})[rule.name] = outcome

    def anchored_at(self, kind: str) -> list[Rule]:
        """Return the rules whose anchor may be of this kind, in their order."""
        if kind not in self.by_kind:
            self.by_kind[kind] = [rule for rule in self.rules if not rule.pattern.kinds or kind in rule.pattern.kinds]
        return self.by_kind[kind]

    def fire(self, rule: Rule, match: Match) -> None:
        """Let a rule rewrite its match, and queue what it touched."""
        outcome = Outcome(rule.name, match.anchor.name, layer_of(match.anchor), done=rule.describe(match))
        self.workspace.touched.clear()
        rule.rewrite(match)
        if not self.workspace.touched and not match.anchor._erased:
            raise PassError(
                f"rule {rule.name!r} fired at {match.anchor.name!r} without changing anything; let its check refuse "
                f"such nodes, and edit through match.workspace"
            )
        self.done.append(outcome)
        if len(self.done) > self.limit:
            raise PassError(
                f"rule {rule.name!r} fires without end, at last at {match.anchor.name!r}: its result matches its own "
                f"pattern, or that of a rule that undoes it"
            )
        self.requeue((match.anchor, *self.workspace.touched))

    def requeue(self, touched: Iterable[fx.Node]) -> None:
        """Queue nodes, and those behind them whose patterns reach as far as them."""
        front = dict.fromkeys(node for node in touched if not node._erased)
        reached = dict(front)
        for _ in range(self.depth - 1):
            front = dict.fromkeys(user for node in front for user in node.users if user not in reached)
            reached.update(front)
        for node in reached:
            if node not in self.queued:
                self.queued.add(node)
                self.queue.append(node)


@dataclass(frozen=True)
class RulePass(Pass):
    """A pass that applies rules. Subclass it as a frozen dataclass and define `rules`.

    Class attributes, besides those of `Pass`:
        refused: the phrase before the reason of a refusal in the ledger.
    """

    contract: ClassVar[Contract] = Contract.EXACT
    refused: ClassVar[str] = "not rewritten"

    def rules(self) -> tuple[Rule, ...]:
        """Return the rules, in order of precedence."""
        raise NotImplementedError(f"{type(self).__name__} must define rules()")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Apply the rules until none fires."""
        applied = apply(graph_module, self.rules())
        return PassResult(graph_module, applied.edits > 0, applied.edits, applied.notes(self.refused))
