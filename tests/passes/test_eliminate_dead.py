"""EliminateDead: what the outputs do not need goes, effects and inputs stay."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxcompress.graph.capture import trace
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import Stage, graph_info
from fxcompress.graph.printer import print_graph
from fxcompress.passes.eliminate_dead import EliminateDead
from fxcompress.pipeline.base import PassContext, PassResult
from fxcompress.pipeline.manager import PassManager

X = torch.randn(2, 4)


def run(graph_module: fx.GraphModule) -> PassResult:
    return EliminateDead().run(graph_module, PassContext(ExampleInputs.of(X)))


class Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.dead = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.block = nn.Module()
        self.block.layer = nn.Linear(4, 4)
        self.block.scale = nn.Parameter(torch.ones(4))
        self.block.shift = nn.Parameter(torch.zeros(4))
        self.block.other = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        self.dead(y).relu()
        x.flatten(1).cos()
        return self.block.layer(self.used(x)) * self.block.scale  # type: ignore[operator]


def test_dead_nodes_modules_and_parameters_go() -> None:
    graph_module = trace(Dead(), (X, X), training=False)
    graph_module.register_buffer("forgotten", torch.ones(2))
    graph_module.add_module("unused", nn.Sequential(nn.Linear(1, 1), nn.ReLU()))
    graph_info(graph_module).masks = {
        "dead.0.weight": torch.ones(4, 4, dtype=torch.bool), "used.weight": torch.ones(4, 4, dtype=torch.bool),
    }  # fmt: skip
    expected = graph_module(X, X)
    result = run(graph_module)
    assert torch.equal(graph_module(X, X), expected)
    assert print_graph(graph_module) == (
        "stage FLOAT\n"
        "%0: f32[2,4] = placeholder x\n"
        "%1: f32[2,4] = placeholder y\n"
        "%2: f32[2,4] = module used: Linear(in_features=4, out_features=4, bias=True)(%0)\n"
        "%3: f32[2,4] = module block.layer: Linear(in_features=4, out_features=4, bias=True)(%2)\n"
        "%4: f32[2,4] = attribute block.scale\n"
        "%5: f32[2,4] = mul(%3, %4)\n"
        "%6 = output(%5)"
    ).replace("%4: f32[2,4]", "%4: f32[4]")
    assert list(graph_module.state_dict()) == [
        "used.weight", "used.bias", "block.scale", "block.layer.weight", "block.layer.bias",
    ]  # fmt: skip
    assert list(graph_info(graph_module).masks) == ["used.weight"]
    assert result.modified
    assert {"forgotten", "unused.0.weight"} <= {note.layer for note in result.notes}
    again = run(graph_module)
    assert (again.modified, again.edits, again.notes) == (False, 0, ())


def test_unused_parameters_alone_count_as_a_change() -> None:
    graph_module = trace(nn.Sequential(nn.Linear(4, 4)), X)
    graph_module.register_parameter("forgotten", nn.Parameter(torch.ones(2)))
    before = print_graph(graph_module)
    result = run(graph_module)
    assert (result.modified, result.edits) == (True, 1)
    assert print_graph(graph_module) == before
    assert "forgotten" not in graph_module.state_dict()


@torch.fx.wrap
def record(x: torch.Tensor) -> torch.Tensor:
    return x


class Own(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


EFFECTS = ["setitem", "method", "operator", "function", "module", "batch norm", "assert"]


@pytest.mark.parametrize("case", EFFECTS)
def test_effects_stay_and_so_does_what_they_read(case: str) -> None:
    graph, root = fx.Graph(), nn.Module()
    x = graph.placeholder("x")
    root.bn, root.own = nn.BatchNorm1d(4).train(), Own()
    needed = graph.call_function(torch.exp, (x,))
    if case == "setitem":
        graph.call_function(operator.setitem, (x, 0, needed))
    elif case == "method":
        graph.call_method("add_", (x, needed))
    elif case == "operator":
        graph.call_function(operator.iadd, (x, needed))
    elif case == "function":
        graph.call_function(record, (needed,))
    elif case == "assert":
        graph.call_function(torch._assert, (needed, "must hold"))
    else:
        graph.call_module({"module": "own", "batch norm": "bn"}[case], (needed,))
    graph.output(x)
    graph_module = fx.GraphModule(root, graph)
    nodes = len(graph_module.graph.nodes)
    run(graph_module)
    assert len(graph_module.graph.nodes) == nodes == 4


def test_a_batch_norm_in_evaluation_is_no_effect() -> None:
    graph, root = fx.Graph(), nn.Module()
    x = graph.placeholder("x")
    root.bn = nn.BatchNorm1d(4).eval()
    graph.call_module("bn", (x,))
    graph.output(x)
    assert run(fx.GraphModule(root, graph)).edits >= 1


def test_it_runs_at_every_stage() -> None:
    assert EliminateDead.requires == frozenset(Stage)


def test_it_is_exact_in_a_pipeline() -> None:
    captured = trace(Dead(), (X, X), training=False)
    captured.register_buffer("forgotten", torch.ones(2))
    assert PassManager([EliminateDead()]).run(captured, (X, X)).rows[-1].difference == 0.0
