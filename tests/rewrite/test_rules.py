"""Patterns, rules and the driver: matches, refusals with reasons, edits counted, termination, rules of a user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.errors import PassError, VerificationError
from fxcompress.graph import ops
from fxcompress.graph.capture import trace
from fxcompress.graph.printer import print_graph
from fxcompress.pipeline.base import Pass
from fxcompress.pipeline.manager import PassManager, PipelineResult
from fxcompress.rewrite.driver import RulePass, apply
from fxcompress.rewrite.match import Match, Refusal, Rule, find, refuse
from fxcompress.rewrite.pattern import Pattern, anything, number, op
from fxcompress.rewrite.workspace import Workspace


def run(item: Pass, model: nn.Module, x: torch.Tensor) -> PipelineResult:
    return PassManager([item]).run(trace(model, x, training=False), x)


class Swish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1.0
        return torch.sigmoid(y) * y


def to_silu(match: Match) -> None:
    made = match.workspace.insert(match.anchor, F.silu, (match["x"],))
    match.workspace.replace(match.anchor, made)


GATE = op("sigmoid", input=anything("x"), readers=1)
SWISH = Rule("swish", op("mul", input=anything("x"), other=GATE, commutative=True), to_silu)


@dataclass(frozen=True)
class FindSwish(RulePass):
    name: ClassVar[str] = "find-swish"

    def rules(self) -> tuple[Rule, ...]:
        return (SWISH,)


def test_a_users_rule_rewrites_what_its_pattern_finds() -> None:
    result = run(FindSwish(), Swish(), torch.randn(2, 3))
    assert print_graph(result.graph_module) == (
        "stage FLOAT\n"
        "%0: f32[2,3] = placeholder x\n"
        "%1: f32[2,3] = add(%0, 1.0)\n"
        "%2: f32[2,3] = silu(%1)\n"
        "%3 = output(%2)"
    )
    assert result.rows[-1].edits == 1
    assert result.rows[-1].modified
    assert result.rows[-1].difference is not None


def test_a_wrong_rule_is_caught_by_the_comparison() -> None:
    def to_gelu(match: Match) -> None:
        match.workspace.replace(match.anchor, match.workspace.insert(match.anchor, F.gelu, (match["x"],)))

    @dataclass(frozen=True)
    class Wrong(RulePass):
        name: ClassVar[str] = "wrong"

        def rules(self) -> tuple[Rule, ...]:
            return (Rule("wrong", SWISH.pattern, to_gelu),)

    with pytest.raises(VerificationError, match=r"wrong.* changed the outputs"):
        run(Wrong(), Swish(), torch.randn(2, 3))


class TwoReaders(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(x)
        return x * gate + gate


def test_one_name_binds_one_node_and_readers_are_counted() -> None:
    graph_module = trace(TwoReaders(), torch.randn(2, 3), training=False)
    applied = apply(graph_module, [SWISH])
    assert applied.edits == 0
    assert [str(outcome.refusal) for outcome in applied.refused] == ["`sigmoid` is read by 2 nodes: mul, add"]
    assert applied.refused[0].refusal == Refusal(
        "`sigmoid` is read by 2 nodes: mul, add", ("sigmoid", "mul", "add"), mismatch=False
    )

    class Other(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(y)

    other = trace(Other(), (torch.randn(2), torch.randn(2)), training=False)
    anchor = next(node for node in other.graph.nodes if ops.kind(node) == "mul")
    found = find(SWISH, anchor, Workspace(other))
    assert isinstance(found, Refusal)
    assert found.mismatch
    assert found.reason == "`x` and `y` are not the same value"


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (op("add", other=number(0)), "`other` of `add` is not 0"),
        (op("add", other=anything()), "`other` of `add` is no tensor"),
        (op("add", input=op("relu", "relu6")), "the input of `add` is `x` (placeholder), not relu or relu6"),
        (op("add", where=lambda node: "it is a bad day"), "it is a bad day"),
    ],
)
def test_a_mismatch_says_what_is_different(pattern: Pattern, reason: str) -> None:
    graph_module = trace(Swish(), torch.randn(2, 3), training=False)
    anchor = next(node for node in graph_module.graph.nodes if ops.kind(node) == "add")
    rule = Rule("rule", pattern, lambda match: None)
    found = find(rule, anchor, Workspace(graph_module))
    assert isinstance(found, Refusal)
    assert (found.reason, found.mismatch) == (reason, True)
    assert apply(graph_module, [rule]).refused == ()
    explained = Rule("rule", pattern, lambda match: None, explains_mismatch=True)
    assert [str(outcome.refusal) for outcome in apply(graph_module, [explained]).refused] == [reason]


def test_a_number_is_not_a_truth_value() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * True) * 1.0

    graph_module = trace(Model(), torch.randn(2), training=False)
    anchors = [node for node in graph_module.graph.nodes if ops.kind(node) == "mul"]
    rule = Rule("one", op("mul", other=number(1)), lambda match: None)
    found = [find(rule, anchor, Workspace(graph_module)) for anchor in anchors]
    assert [isinstance(one, Match) for one in found] == [False, True]


class Chain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(40):
            x = torch.abs(x)
        return x


def _drop(match: Match) -> None:
    match.workspace.replace(match.anchor, match["inner"])


DOUBLE_ABS = Rule("double-abs", op("abs", input=op("abs", bind="inner")), _drop, done="{kind} dropped for {inner}")


def test_a_chain_collapses_and_every_edit_is_counted() -> None:
    graph_module = trace(Chain(), torch.randn(3), training=False)
    applied = apply(graph_module, [DOUBLE_ABS])
    assert applied.edits == 39
    assert [node.op for node in graph_module.graph.nodes] == ["placeholder", "call_function", "output"]
    assert applied.notes()[0].text == "abs dropped for abs_1"
    assert apply(graph_module, [DOUBLE_ABS]).edits == 0


def test_the_first_rule_that_fires_wins() -> None:
    names: list[str] = []

    def note(name: str) -> Rule:
        def rewrite(match: Match) -> None:
            names.append(name)
            _drop(match)

        return Rule(name, DOUBLE_ABS.pattern, rewrite)

    apply(trace(Chain(), torch.randn(3), training=False), [note("first"), note("second")])
    assert set(names) == {"first"}


def test_a_rewrite_behind_a_match_makes_its_readers_be_looked_at_again() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.abs(-torch.abs(x))

    def skip(match: Match) -> None:
        match.workspace.reconnect(match.anchor, match["neg"], match["x"])

    drop_neg = Rule("drop-neg", op("abs", input=op("neg", bind="neg", input=anything("x"))), skip)
    graph_module = trace(Model(), torch.randn(3), training=False)
    assert apply(graph_module, [DOUBLE_ABS, drop_neg]).edits == 2
    assert sum(node.op == "call_function" for node in graph_module.graph.nodes) == 1


def test_what_a_later_rewrite_makes_possible_further_up_is_found() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = torch.abs(x)
            first = torch.exp(torch.tanh(inner + 1.0))
            return first - torch.neg(inner)

    def to_input(match: Match) -> None:
        match.workspace.replace(match.anchor, match["x"])

    x = op("placeholder", bind="x")
    single = op("abs", readers=1, input=x)
    rules = [
        Rule("deep", op("tanh", input=op("add", input=single)), to_input),
        Rule("behind", op("exp", input=x), to_input),
        Rule("frees", op("neg", input=op("abs", input=x)), to_input),
    ]
    graph_module = trace(Model(), torch.randn(3), training=False)
    applied = apply(graph_module, rules)
    assert [outcome.rule for outcome in applied.done] == ["frees", "deep", "behind"]
    assert [node.name for node in graph_module.graph.nodes] == ["x", "sub", "output"]


def test_a_rule_that_undoes_itself_is_stopped() -> None:
    def turn(match: Match) -> None:
        made = match.workspace.insert(match.anchor, torch.abs, (match["x"],))
        match.workspace.replace(match.anchor, made)

    with pytest.raises(PassError, match="'turn' fires without end"):
        apply(trace(Chain(), torch.randn(3), training=False), [Rule("turn", op("abs", input=anything("x")), turn)])


def test_a_rule_that_changes_nothing_is_stopped() -> None:
    with pytest.raises(PassError, match="'idle' fired at 'abs_1' without changing anything"):
        apply(trace(Chain(), torch.randn(3), training=False), [Rule("idle", op("abs"), lambda match: None)])


def test_a_check_refuses_with_its_own_reason() -> None:
    rule = Rule("picky", op("abs"), _drop, check=lambda match: refuse(f"not `{match.anchor.name}`", match.anchor))
    applied = apply(trace(Chain(), torch.randn(3), training=False), [rule])
    assert len(applied.refused) == 40
    assert applied.notes("left alone")[0].text == "left alone: not `abs_1`"


def test_modules_that_nothing_calls_any_more_go_with_their_last_call() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return self.layer(self.layer(x))

    graph_module = trace(Model(), torch.randn(2, 3), training=False)
    workspace = Workspace(graph_module)
    first, second = (node for node in graph_module.graph.nodes if node.op == "call_module")
    assert workspace.calls(first) == [first, second]
    workspace.replace(second, first)
    assert workspace.calls(first) == [first]
    assert "layer.weight" in graph_module.state_dict()
    workspace.replace(first, first.all_input_nodes[0])
    assert graph_module.state_dict() == {}


class Blocks(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.count):
            x = torch.abs(torch.abs(x)) + 1.0
        return x


def test_the_number_of_visits_is_linear_in_the_nodes() -> None:
    def visits(count: int) -> int:
        seen = 0

        def where(node: object) -> None:
            nonlocal seen
            seen += 1

        pattern = op("abs", input=op("abs", bind="inner"), where=where)
        applied = apply(trace(Blocks(count), torch.randn(3), training=False), [Rule("count", pattern, _drop)])
        assert applied.edits == count
        return seen

    assert visits(400) <= 2.1 * visits(200)
