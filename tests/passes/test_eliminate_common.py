"""EliminateCommon: equal calls become one, unless a second call means something."""

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
from fxcompress.graph.printer import print_graph
from fxcompress.passes.eliminate_common import EliminateCommon
from fxcompress.pipeline.base import PassContext, PassResult
from fxcompress.pipeline.manager import PassManager

X = torch.randn(2, 4)


class Net(nn.Module):
    def __init__(self, function: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.twin = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bn, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.randn(4))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def canonical(function: Callable[[Any, torch.Tensor], Any], training: bool = False) -> fx.GraphModule:
    return PassManager("canonicalize", verify=False).run(trace(Net(function), X, training=training), X).graph_module


def run(graph_module: fx.GraphModule) -> PassResult:
    return EliminateCommon().run(graph_module, PassContext(ExampleInputs.of(X)))


MERGED: dict[str, tuple[Callable[[Any, torch.Tensor], Any], int]] = {
    "functions": (lambda m, x: x.relu() * F.relu(x), 1),
    "modules": (lambda m, x: m.layer(x) - m.layer(x), 1),
    "batch norm in evaluation": (lambda m, x: m.bn(x) - m.bn(x), 1),
    "chains": (lambda m, x: torch.tanh(m.layer(x) + 1.0) - torch.tanh(m.layer(x) + 1.0), 3),
    "sizes": (lambda m, x: x.reshape(x.size(0), 2, 2).sum() + x.reshape(x.size(0), 2, 2).amax(), 2),
    "lists": (lambda m, x: torch.cat([x, x], 1) - torch.cat([x, x], 1), 1),
    "slices": (lambda m, x: x[:, 1:3] * x[:, 1:3], 1),
}


@pytest.mark.parametrize("case", MERGED)
def test_equal_calls_become_one(case: str) -> None:
    function, edits = MERGED[case]
    graph_module = canonical(function)
    expected = graph_module(X)
    result = run(graph_module)
    assert (result.modified, result.edits) == (True, edits)
    assert torch.equal(graph_module(X), expected)
    again = run(graph_module)
    assert (again.modified, again.edits) == (False, 0)


def test_reads_of_one_attribute_become_one() -> None:
    graph, root = fx.Graph(), nn.Module()
    root.weight = nn.Parameter(torch.ones(4))
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.mul, (graph.call_function(torch.mul, (x, graph.get_attr("weight"))),
                                                 graph.get_attr("weight"))))  # fmt: skip
    assert run(fx.GraphModule(root, graph)).edits == 1


def test_the_graph_before_and_after() -> None:
    graph_module = canonical(lambda m, x: x.relu() + F.relu(x))
    result = run(graph_module)
    assert print_graph(graph_module) == (
        "stage FLOAT\n"
        "%0: f32[2,4] = placeholder x\n"
        "%1: f32[2,4] = relu(%0)\n"
        "%2: f32[2,4] = add(%1, %1)\n"
        "%3 = output(%2)"
    )
    assert [note.text for note in result.notes] == ["relu_1 removed: relu computes the same"]


def _two_attentions(x: torch.Tensor, dropout: float) -> torch.Tensor:
    key = x + 1.0
    left, right = (F.scaled_dot_product_attention(x, key, x, dropout_p=dropout) for _ in range(2))
    return left - right


def test_attention_without_dropout_is_merged() -> None:
    assert run(canonical(lambda m, x: _two_attentions(x, 0.0))).edits == 1


KEPT: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "dropout": lambda m, x: m.dropout(x) + m.dropout(x),
    "other modules": lambda m, x: m.layer(x) + m.twin(x),
    "other options": lambda m, x: F.leaky_relu(x, 0.1) + F.leaky_relu(x, 0.2),
    "other types": lambda m, x: (x + 1) + (x + 1.0) + (x + True),
    "other slices": lambda m, x: x[:, 1:3] * x[:, 0:2],
    "other inputs": lambda m, x: torch.tanh(x) + torch.tanh(x + 1.0),
    "two outputs": lambda m, x: (torch.tanh(x), torch.tanh(x)),
    "random": lambda m, x: torch.rand_like(x) + torch.rand_like(x),
    "attention dropout": lambda m, x: _two_attentions(x, 0.5),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_not_the_same_stays(case: str) -> None:
    graph_module = canonical(KEPT[case])
    before = print_graph(graph_module)
    result = run(graph_module)
    assert (result.modified, result.edits, result.notes) == (False, 0, ())
    assert print_graph(graph_module) == before


def test_a_batch_norm_in_training_counts_every_call() -> None:
    graph_module = canonical(lambda m, x: m.bn(x) + m.bn(x), training=True)
    assert not run(graph_module).modified


def test_one_inner_value_and_one_output_become_one() -> None:
    graph_module = canonical(lambda m, x: (torch.tanh(x), torch.tanh(x).exp()))
    assert run(graph_module).edits == 1


def test_memory_that_is_written_to_is_not_shared() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first, second = graph.call_function(torch.exp, (x,)), graph.call_function(torch.exp, (x,))
    graph.call_method("add_", (second, 1))
    graph.output(graph.call_function(torch.add, (first, second)))
    assert not run(fx.GraphModule(nn.Module(), graph)).modified


STEPS: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
    lambda a, b: a + b, lambda a, b: a * 0.5, lambda a, b: torch.tanh(a), lambda a, b: torch.cat([a, b], 1)[:, :4],
    lambda a, b: F.hardtanh(a, -0.5, 0.5), lambda a, b: F.hardtanh(a),
]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=20))
def test_random_graphs_keep_their_output_and_no_two_calls_are_equal(steps: list[tuple[int, int, int]]) -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for step, left, right in steps:
            values.append(STEPS[step](values[left % len(values)], values[right % len(values)]))
        return torch.stack(values)

    graph_module = canonical(function)
    before, expected = print_graph(graph_module), graph_module(X)
    result = run(graph_module)
    assert torch.equal(graph_module(X), expected)
    assert (print_graph(graph_module) == before) is not result.modified
    calls = [line.partition("= ")[2] for line in print_graph(graph_module).splitlines()]
    assert len(calls) == len(set(calls))
