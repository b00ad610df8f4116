"""Why a rule fired or did not, at each node where it could have: what `fxcompress inspect --explain` shows."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

from torch import fx

from fxcompress.rewrite.driver import Outcome, RulePass, apply
from fxcompress.rewrite.match import Rule


def explain(graph_module: fx.GraphModule, rules: Sequence[Rule]) -> tuple[Outcome, ...]:
    """Say for each node that a rule is anchored at whether the rule fires, or the reason why it does not.

    The rules are applied together, to a copy: what one rule makes possible for another is taken into account.

    Args:
        graph_module: a canonical graph; not modified.
        rules: for example `FoldBatchNorm().rules()`.

    Returns:
        What was done, then what was refused, each in the order of the graph.
    """
    applied = apply(copy.deepcopy(graph_module), rules)
    order = {node.name: position for position, node in enumerate(graph_module.graph.nodes)}
    done = sorted(applied.done, key=lambda outcome: order.get(outcome.node, len(order)))
    return (*done, *applied.refused)


def rules_of(passes: Iterable[object]) -> list[Rule]:
    """Return the rules of every pass that is made of rules, groups of passes included."""
    found: list[Rule] = []
    for item in passes:
        if isinstance(item, RulePass):
            found.extend(item.rules())
        elif hasattr(item, "parts") and item.parts() != (item,):
            found.extend(rules_of(item.parts()))
    return found


def explanation(outcomes: Sequence[Outcome]) -> str:
    """Return outcomes as text, one line each: "bn1 [fold-batch-norm]: no: `conv1` is read by 2 nodes: add, relu"."""
    if not outcomes:
        return "no rule has a candidate in this graph"
    return "\n".join(_line(outcome) for outcome in outcomes)


def _line(outcome: Outcome) -> str:
    where = outcome.layer if outcome.layer == outcome.node else f"{outcome.layer} ({outcome.node})"
    if outcome.refusal is not None:
        verdict = f"no: {outcome.refusal}"
    else:
        verdict = f"yes: {'; '.join(note.text for note in outcome.done if note.layer == outcome.layer) or 'rewritten'}"
    return f"{where} [{outcome.rule}]: {verdict}"
