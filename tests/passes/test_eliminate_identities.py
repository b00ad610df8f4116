"""EliminateIdentities: what hands on its input goes; everything that only looks like it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fxcompress.graph.capture import trace
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.modules import StochasticDepth
from fxcompress.graph.printer import print_graph
from fxcompress.passes.eliminate_identities import EliminateIdentities
from fxcompress.pipeline.base import PassContext, PassResult
from fxcompress.pipeline.manager import PassManager

X = torch.randn(3, 4, 2, 2)


class Net(nn.Module):
    """A forward given as a function, between two operations that make inputs and outputs of it inner values."""

    def __init__(self, function: Callable[[Any, torch.Tensor], Any], mode: bool = False) -> None:
        super().__init__()
        self.dropout, self.depth = nn.Dropout(0.5), StochasticDepth(0.5)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return torch.tanh(self.function(self, torch.sin(x)))


def canonical(
    function: Callable[[Any, torch.Tensor], Any], x: torch.Tensor = X, training: bool = False
) -> fx.GraphModule:
    return PassManager("canonicalize", verify=False).run(trace(Net(function), x, training=training), x).graph_module


def run(graph_module: fx.GraphModule, x: torch.Tensor = X) -> PassResult:
    return EliminateIdentities().run(graph_module, PassContext(ExampleInputs.of(x)))


def calls(graph_module: fx.GraphModule) -> list[str]:
    return [node.name for node in graph_module.graph.nodes if node.op.startswith("call")]


IDENTITIES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "dropout": lambda m, x: m.dropout(x),
    "functional dropout": lambda m, x: F.dropout(x, 0.5, m.training),
    "stochastic depth": lambda m, x: m.depth(x),
    "clone": lambda m, x: x.clone(),
    "contiguous": lambda m, x: x.contiguous(),
    "to dtype": lambda m, x: x.to(torch.float32),
    "to device": lambda m, x: x.to("cpu"),
    "float": lambda m, x: x.float(),
    "type_as": lambda m, x: x.type_as(x),
    "reshape": lambda m, x: x.reshape(-1, 4, 2, 2),
    "view of sizes": lambda m, x: x.view(x.size(0), x.shape[1], 2, -1),
    "flatten one": lambda m, x: x.flatten(1, 1),
    "flatten last": lambda m, x: x.flatten(3),
    "permute": lambda m, x: x.permute(0, 1, 2, -1),
    "transpose": lambda m, x: x.transpose(1, -3),
    "pad": lambda m, x: F.pad(x, (0, 0, 0, 0)),
    "cat": lambda m, x: torch.cat([x], 1),
    "add 0": lambda m, x: x + 0,
    "0 add": lambda m, x: 0.0 + x,
    "sub 0": lambda m, x: x - 0,
    "mul 1": lambda m, x: x * 1,
    "1 mul": lambda m, x: 1.0 * x,
    "div 1": lambda m, x: x / 1,
    "pow 1": lambda m, x: x**1,
    "all of them": lambda m, x: (m.dropout(x.flatten(3).contiguous() + 0) * 1).clone().view(-1, 4, 2, 2),
}


@pytest.mark.parametrize("case", IDENTITIES)
def test_identities_go(case: str) -> None:
    graph_module = canonical(IDENTITIES[case])
    expected = graph_module(X)
    result = run(graph_module)
    assert result.modified
    assert calls(graph_module) == ["sin", "tanh"]
    assert torch.equal(graph_module(X), expected)
    assert "dropout" not in dict(graph_module.named_modules())
    again = run(graph_module)
    assert (again.modified, again.edits) == (False, 0)


OTHERS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "detach": lambda m, x: x.detach(),
    "channels last": lambda m, x: x.contiguous(memory_format=torch.channels_last),
    "to double": lambda m, x: x.double(),
    "reshape with the batch": lambda m, x: x.reshape(3, 4, 2, 2),
    "reshape of another order": lambda m, x: x.reshape(-1, 2, 4, 2),
    "size of another dimension": lambda m, x: x.reshape(-1, 4, x.size(3), 2),
    "size of another tensor": lambda m, x: x.reshape((x * 2).size(0), 4, 2, 2),
    "flatten": lambda m, x: x.flatten(2),
    "permute": lambda m, x: x.permute(0, 1, 3, 2),
    "transpose": lambda m, x: x.transpose(2, 3),
    "pad": lambda m, x: F.pad(x, (0, 1)),
    "cat": lambda m, x: torch.cat([x, x]),
    "add 1": lambda m, x: x + 1,
    "0 sub": lambda m, x: 0 - x,
    "1 div": lambda m, x: 1 / (x + 3),
    "1 pow": lambda m, x: 1**x,
    "change of dtype": lambda m, x: (x > 0) * 1,
    "mul True": lambda m, x: (x > 0) * 1.0,
    "relu of sigmoid": lambda m, x: torch.sigmoid(torch.relu(x)),
    "other bounds": lambda m, x: F.hardtanh(F.hardtanh(x, -1, 1), -2, 2),
    "gelu twice": lambda m, x: F.gelu(F.gelu(x)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_only_looks_like_an_identity_stays(case: str) -> None:
    graph_module = canonical(OTHERS[case])
    before = print_graph(graph_module)
    result = run(graph_module)
    assert (result.modified, result.edits) == (False, 0)
    assert print_graph(graph_module) == before


def test_dropout_in_training_mode_stays_and_says_so() -> None:
    graph_module = canonical(lambda m, x: m.depth(m.dropout(x)), training=True)
    result = run(graph_module)
    reason = "not removed: dropout is in training mode; call model.eval() before compiling"
    assert [str(note) for note in result.notes] == [f"dropout: {reason}", f"depth: {reason}"]
    assert not result.modified


MERGES: dict[str, tuple[Callable[[Any, torch.Tensor], Any], int]] = {
    "relu": (lambda m, x: x.relu().relu().relu(), 1),
    "relu6": (lambda m, x: F.relu6(F.relu6(x)), 1),
    "relu before relu6": (lambda m, x: F.relu6(F.relu(x)), 1),
    "relu behind relu6": (lambda m, x: F.relu(F.relu6(x)), 1),
    "hardtanh": (lambda m, x: F.hardtanh(F.hardtanh(x, -0.5, 0.5), -0.5, 0.5), 1),
    "clamp": (lambda m, x: x.clamp(-0.1, 0.2).clamp(-0.1, 0.2), 1),
    "abs": (lambda m, x: x.abs().abs(), 1),
    "reshapes": (lambda m, x: x.reshape(-1, 2, 8).reshape(-1, 4, 4).reshape(-1, 16), 1),
    "back and forth": (lambda m, x: x.reshape(-1, 16).reshape(-1, 4, 2, 2), 0),
    "flatten and reshape": (lambda m, x: x.flatten(1).reshape(-1, 8, 2), 1),
    "permutes": (lambda m, x: x.permute(0, 2, 3, 1).permute(0, 2, 1, 3), 1),
    "permute there and back": (lambda m, x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), 0),
}


@pytest.mark.parametrize("case", MERGES)
def test_two_that_are_one(case: str) -> None:
    function, left = MERGES[case]
    graph_module = canonical(function)
    expected = graph_module(X)
    assert run(graph_module).modified
    assert len(calls(graph_module)) == left + 2
    assert torch.equal(graph_module(X), expected)
    assert not run(graph_module).modified


def test_other_batch_sizes_still_run() -> None:
    graph_module = canonical(lambda m, x: x.reshape(-1, 4, 2, 2).view(x.size(0), -1).reshape(-1, 2, 8))
    model = Net(lambda m, x: x.reshape(-1, 2, 8)).eval()
    run(graph_module)
    assert len(calls(graph_module)) == 3
    for batch in (1, 3, 8):
        x = torch.randn(batch, 4, 2, 2)
        assert torch.equal(graph_module(x), model(x))


def test_a_shared_inner_reshape_is_kept_for_its_other_reader() -> None:
    graph_module = canonical(lambda m, x: (y := x.reshape(-1, 16)).reshape(-1, 4, 4).sum() + y.sum())
    result = run(graph_module)
    assert not result.modified
    assert "not removed: `reshape` is read by 2 nodes: reshape_1, sum_2" in str(result.notes[0])


# -- 7. memory --------------------------------------------------------------------------------------------------------


def test_a_copy_that_is_written_to_stays() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    copy = graph.call_method("clone", (x,))
    graph.call_method("add_", (copy, 1))
    graph.output((copy, x))
    graph_module = fx.GraphModule(nn.Module(), graph)
    result = run(graph_module)
    assert [str(note) for note in result.notes] == ["clone: not removed: `clone` is written to in place"]
    assert not result.modified


@pytest.mark.parametrize("parameter", [False, True])
def test_an_output_does_not_become_an_input_or_a_parameter(parameter: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weight if parameter else x).flatten(0).clone()

    x = torch.randn(3)
    result = run(PassManager("canonicalize").run(trace(Model(), x), x).graph_module)
    assert not result.modified or len(result.graph_module.graph.nodes) > 2 + parameter
    assert any("an output of the model would share memory with" in note.text for note in result.notes)


# -- a property -------------------------------------------------------------------------------------------------------

STEPS: list[Callable[[Any, torch.Tensor], torch.Tensor]] = [
    *[step for name, step in IDENTITIES.items() if name != "all of them"],
    lambda m, x: x.relu(),
    lambda m, x: F.relu6(x),
    lambda m, x: x.permute(0, 1, 3, 2),
    lambda m, x: x.reshape(-1, 16).reshape(-1, 4, 2, 2),
    lambda m, x: x + torch.relu(x),
    lambda m, x: x.reshape(x.size(0), 2, 8).reshape(-1, 4, 2, 2),
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, len(STEPS) - 1), max_size=12))
def test_random_chains_keep_their_output_and_a_second_run_finds_nothing(chosen: list[int]) -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        for index in chosen:
            x = STEPS[index](m, x)
        return x

    graph_module = canonical(function)
    before, expected, nodes = print_graph(graph_module), graph_module(X), len(graph_module.graph.nodes)
    result = run(graph_module)
    assert torch.equal(graph_module(X), expected)
    assert (print_graph(graph_module) == before) is not result.modified
    assert len(graph_module.graph.nodes) <= nodes
    second = print_graph(graph_module)
    again = run(graph_module)
    assert (again.modified, again.edits, print_graph(graph_module)) == (False, 0, second)
