"""FoldConstants: what does not depend on the inputs is computed once, unless something would be lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxcompress.errors import OptionError
from fxcompress.graph.capture import trace
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import graph_info
from fxcompress.graph.printer import print_graph
from fxcompress.passes.fold_constants import FoldConstants
from fxcompress.pipeline.base import PassContext, PassResult
from fxcompress.pipeline.manager import PassManager

X = torch.randn(2, 4)


class Net(nn.Module):
    index: torch.Tensor
    scale: torch.Tensor

    def __init__(self, function: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, 4))
        self.register_buffer("scale", torch.rand(4) + 0.5)
        self.register_buffer("index", torch.tensor([3, 2, 1, 0]))
        self.layer, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def canonical(function: Callable[[Any, torch.Tensor], Any], training: bool = False) -> fx.GraphModule:
    return PassManager("canonicalize", verify=False).run(trace(Net(function), X, training=training), X).graph_module


def run(graph_module: fx.GraphModule, **options: int) -> PassResult:
    return FoldConstants(**options).run(graph_module, PassContext(ExampleInputs.of(X)))


def test_the_graph_before_and_after() -> None:
    graph_module = canonical(lambda m, x: x * (m.weight * torch.rsqrt(m.scale + 1e-5)).reshape(1, -1))
    expected = graph_module(X)
    result = run(graph_module)
    assert print_graph(graph_module) == (
        "stage FLOAT\n"
        "%0: f32[2,4] = placeholder x\n"
        "%1: f32[1,4] = attribute folded_reshape\n"
        "%2: f32[2,4] = mul(%0, %1)\n"
        "%3 = output(%2)"
    )
    assert torch.equal(graph_module(X), expected)
    assert (result.modified, result.edits) == (True, 1)
    assert [note.text for note in result.notes] == ["reshape folded: it does not depend on the inputs"]
    assert graph_module.get_parameter("folded_reshape").requires_grad


FOLDED: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "gather": lambda m, x: x * m.scale[m.index],
    "layer on a constant": lambda m, x: x + m.layer(m.scale),
    "dtype": lambda m, x: x + m.index.to(torch.float32),
    "two readers": lambda m, x: (x + (c := m.scale.exp())) * c,
    "inner and outer": lambda m, x: (x + (c := m.scale.exp())) * c.neg(),
    "part of a tuple": lambda m, x: x[:, :2] + m.scale.exp().chunk(2)[0],
}


@pytest.mark.parametrize("case", FOLDED)
def test_constants_fold(case: str) -> None:
    graph_module = canonical(FOLDED[case])
    expected = graph_module(X)
    result = run(graph_module)
    assert result.modified
    assert torch.equal(graph_module(X), expected)
    dependent = {"x"}
    for node in graph_module.graph.nodes:
        if node.op.startswith("call"):
            assert any(source.name in dependent for source in node.all_input_nodes), node.name
            dependent.add(node.name)
    for batch in (1, 5):
        assert len(graph_module(torch.randn(batch, 4))) == batch
    again = run(graph_module)
    assert (again.modified, again.edits) == (False, 0)


def test_what_is_created_from_nothing_folds() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.add, (x, graph.call_function(torch.arange, (4,)))))
    graph_module = PassManager("canonicalize").run(fx.GraphModule(nn.Module(), graph), X).graph_module
    assert run(graph_module).edits == 1
    assert torch.equal(graph_module(X), X + torch.arange(4))


def test_a_number_is_written_into_its_readers() -> None:
    graph_module = canonical(lambda m, x: x.reshape(-1, m.other.size(0)) / m.other.size(1))
    assert run(graph_module).edits == 2
    assert "reshape(%0, (-1, 4))" in print_graph(graph_module)
    assert "div(%1, 4)" in print_graph(graph_module)


def test_what_is_not_trained_becomes_a_buffer() -> None:
    graph_module = canonical(lambda m, x: x * m.scale.exp())
    run(graph_module)
    assert "folded_exp" in dict(graph_module.named_buffers())


KEPT: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "view": lambda m, x: x @ m.other.transpose(0, 1),
    "attribute": lambda m, x: x * m.weight,
    "size of the input": lambda m, x: x + torch.zeros((x.size(0), 1)),
    "random": lambda m, x: x + torch.rand(4),
    "dropout": lambda m, x: x + m.dropout(m.scale),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_no_constant_stays(case: str) -> None:
    graph_module = canonical(KEPT[case])
    before = print_graph(graph_module)
    result = run(graph_module)
    assert (result.modified, result.edits, result.notes) == (False, 0, ())
    assert print_graph(graph_module) == before


def test_a_layer_in_training_mode_stays() -> None:
    assert not run(canonical(lambda m, x: x + m.layer(m.scale), training=True)).modified


REFUSED: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "trained elsewhere": (lambda m, x: x * m.weight.exp() + m.weight, "`weight` is used elsewhere too"),
    "layer called elsewhere": (lambda m, x: m.layer(x) + m.layer(m.scale), "`layer.bias` is used elsewhere too"),
    "masked": (lambda m, x: x @ m.other.exp(), "`other` is masked"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    function, reason = REFUSED[case]
    graph_module = canonical(function)
    graph_info(graph_module).masks["other"] = torch.ones(4, 4, dtype=torch.bool)
    before = print_graph(graph_module)
    result = run(graph_module)
    assert [note.text.partition(": ")[2] for note in result.notes] == [reason]
    assert not result.modified
    assert print_graph(graph_module) == before


def test_a_result_that_would_be_too_large_stays() -> None:
    graph_module = canonical(lambda m, x: x.unsqueeze(1) * m.scale.exp().expand(1000, 4).contiguous())
    result = run(graph_module, max_growth=1000)
    assert "not folded: the result would take 15,984 bytes more than what it is computed from" in str(result.notes[0])
    assert not result.modified
    assert not run(graph_module, max_growth=15_983).modified
    assert run(graph_module, max_growth=15_984).modified


def test_memory_that_is_written_to_is_not_constant() -> None:
    graph, root = fx.Graph(), nn.Module()
    root.register_buffer("count", torch.zeros(1))
    x, count = graph.placeholder("x"), graph.get_attr("count")
    graph.call_method("add_", (count, 1))
    graph.output(graph.call_function(torch.add, (x, graph.call_function(torch.exp, (count,)))))
    assert not run(fx.GraphModule(root, graph)).modified


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_options_are_checked(value: Any) -> None:
    with pytest.raises(OptionError, match="max_growth must be a number of bytes"):
        FoldConstants(max_growth=value)
