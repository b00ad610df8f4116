"""Side effects: what may be removed, merged or moved."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.graph.capture import trace
from fxcompress.rewrite.effects import has_effects, is_repeatable, writes, written


def call(function: object, *more: object, **options: object) -> fx.Node:
    graph = fx.Graph()
    x = graph.placeholder("x")
    return graph.call_function(function, (x, *more), options)  # type: ignore[arg-type]


def unknown(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (call(F.relu), False),
        (call(F.relu_), True),
        (call(F.relu, inplace=True), True),
        (call(operator.iadd, 1), True),
        (call(operator.setitem, 0, 1.0), True),
        (call(torch.fft.fft), False),
        (call(torch.Tensor.add_, 1), True),
        (call(torch.ops.aten.relu_.default), True),
        (call(torch.ops.aten.relu.default), False),
        (call(unknown), True),
        (call(torch._assert, "message"), True),
        (call(F.embedding, torch.ones(2, 2), max_norm=1.0), True),
    ],
)
def test_functions(node: fx.Node, expected: bool) -> None:
    assert has_effects(node) is expected
    if expected:
        assert not is_repeatable(node)


@pytest.mark.parametrize(
    ("module", "effects", "repeatable"),
    [
        (nn.Conv2d(1, 1, 1), False, True),
        (nn.BatchNorm2d(1).train(), True, False),
        (nn.BatchNorm2d(1).eval(), False, True),
        (nn.Dropout().eval(), False, False),
        (nn.Embedding(3, 3, max_norm=1.0), True, False),
        (nn.Embedding(3, 3), False, True),
        (nn.LSTM(2, 2, 2, dropout=0.5).train(), False, False),
        (nn.LSTM(2, 2, 2, dropout=0.5).eval(), False, True),
        (nn.CosineSimilarity().eval(), False, False),
        (nn.Sequential(nn.ReLU()).eval(), False, False),
    ],
)
def test_modules(module: nn.Module, effects: bool, repeatable: bool) -> None:
    graph = fx.Graph()
    root = nn.Module()
    root.add_module("layer", module)
    node = graph.call_module("layer", (graph.placeholder("x"),))
    graph.output(node)
    graph_module = fx.GraphModule(root, graph)
    copied = next(node for node in graph_module.graph.nodes if node.op == "call_module")
    assert (has_effects(copied), is_repeatable(copied)) == (effects, repeatable)


class Own(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_unknown_modules_may_write_to_whatever_they_are_given() -> None:
    graph = fx.Graph()
    root = nn.Module()
    root.add_module("layer", Own())
    x = graph.placeholder("x")
    node = graph.call_module("layer", (x,))
    graph.output(node)
    fx.GraphModule(root, graph)
    assert writes(node) == (x,)
    assert has_effects(node)


def test_methods() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert has_effects(graph.call_method("add_", (x, 1)))
    assert not has_effects(graph.call_method("expand", (x, 1)))
    assert not has_effects(graph.call_method("cos", (x,)))
    assert has_effects(graph.call_method("no_such_method", (x,)))


def test_what_shares_memory_with_a_written_tensor_is_found() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            other = x * 2.0
            base = x + 1.0
            view = base.flatten(1)
            part = view[:, :2]
            part.fill_(0.0)
            return base + other

    graph_module = trace(Model(), torch.randn(2, 2, 2), training=False)
    names = {node.name for node in written(graph_module.graph)}
    assert {"add", "flatten", "getitem"} <= names
    assert not {"x", "mul", "add_1"} & names


def test_nothing_is_written_in_a_graph_without_writes() -> None:
    assert written(trace(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()), torch.randn(1, 1, 2, 2)).graph) == frozenset()
