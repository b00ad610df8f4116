"""FuseActivation: which nodes the kernel of a layer computes as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.graph.capture import trace
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.metadata import info, set_info
from fxcompress.graph.printer import print_graph
from fxcompress.passes.fuse_activation import FuseActivation
from fxcompress.pipeline.base import PassContext, PassResult
from fxcompress.pipeline.manager import PassManager

X = torch.randn(2, 3, 5, 5)


class Net(nn.Module):
    """Layers of every kind, and a forward given as a function."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.transposed, self.linear = nn.ConvTranspose2d(3, 3, 1), nn.Linear(5, 5)
        self.position = nn.Parameter(torch.randn(2, 3, 5, 5))
        self.function = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def canonical(forward: Callable[[Any, torch.Tensor], Any]) -> fx.GraphModule:
    return PassManager("canonicalize").run(trace(Net(forward), X, training=False), X).graph_module


def run(graph_module: fx.GraphModule) -> PassResult:
    return FuseActivation().run(graph_module, PassContext(ExampleInputs.of(X)))


def marks(graph_module: fx.GraphModule) -> dict[str, str]:
    return {node.name: mark for node in graph_module.graph.nodes if (mark := info(node).epilogue_of)}


def refusals(result: PassResult) -> list[str]:
    return [str(note) for note in result.notes if "not fused" in note.text]


# -- 1. activations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "activation",
    [
        F.relu, F.relu6, F.hardtanh, F.hardswish, F.silu, F.gelu, F.leaky_relu, torch.sigmoid, F.hardsigmoid,
        lambda x: F.gelu(x, approximate="tanh"), lambda x: F.leaky_relu(x, 0.2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layer", ["conv", "transposed", "linear"])
def test_every_activation_behind_every_layer(layer: str, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
    graph_module = canonical(lambda m, x: activation(getattr(m, layer)(x)))
    result = run(graph_module)
    assert (result.edits, set(marks(graph_module).values())) == (1, {layer})


def test_the_graph_shows_the_mark_and_computes_what_it_did() -> None:
    graph_module = canonical(lambda m, x: m.conv(x).relu())
    expected = graph_module(X)
    result = run(graph_module)
    assert print_graph(graph_module) == (
        "stage FLOAT\n"
        "%0: f32[2,3,5,5] = placeholder x\n"
        "%1: f32[2,3,5,5] = module conv: Conv2d(3, 3, kernel_size=(1, 1), stride=(1, 1))(%0)\n"
        "%2: f32[2,3,5,5] = relu(%1)  # epilogue of conv\n"
        "%3 = output(%2)"
    )
    assert torch.equal(graph_module(X), expected)
    assert [str(note) for note in result.notes] == [
        "relu: relu computed by the kernel of conv", "conv: computes the relu behind it",
    ]  # fmt: skip


@pytest.mark.parametrize("function", [torch.tanh, lambda x: F.max_pool2d(x, 2), F.softplus, lambda x: (x + 3.0).relu()])
def test_other_functions_are_not_marked(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    graph_module = canonical(lambda m, x: function(m.conv(x)))
    assert (run(graph_module).edits, marks(graph_module)) == (0, {})


def test_only_one_activation_belongs_to_a_layer() -> None:
    graph_module = canonical(lambda m, x: torch.sigmoid(m.conv(x).relu()))
    run(graph_module)
    assert marks(graph_module) == {"relu": "conv"}


# -- 2. adds ----------------------------------------------------------------------------------------------------------


def test_layer_add_activation() -> None:
    graph_module = canonical(lambda m, x: (m.conv(x) + x).relu())
    assert run(graph_module).edits == 2
    assert marks(graph_module) == {"add": "conv", "relu": "conv"}


def test_of_two_layers_the_later_one_adds() -> None:
    graph_module = canonical(lambda m, x: m.conv(x) + m.conv2(x))
    run(graph_module)
    assert marks(graph_module) == {"add": "conv2"}
    graph_module = canonical(lambda m, x: (y := m.conv2(x)) * 0 + (m.conv(x) + y))
    run(graph_module)
    assert marks(graph_module) == {"add": "conv"}  # conv2 is later, but read twice


def test_the_earlier_layer_adds_if_others_read_the_later_one() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        first, second = m.conv(x), m.conv2(x)
        return (first + second) * second

    graph_module = canonical(forward)
    run(graph_module)
    assert marks(graph_module) == {"add": "conv"}


def test_the_order_is_add_then_activation() -> None:
    graph_module = canonical(lambda m, x: m.conv(x).relu() + x)
    run(graph_module)
    assert marks(graph_module) == {"relu": "conv"}


def test_two_adds_are_one_too_many() -> None:
    graph_module = canonical(lambda m, x: ((m.conv(x) + x) + x).relu())
    run(graph_module)
    assert marks(graph_module) == {"add": "conv"}


# -- 3. to 5. refusals ------------------------------------------------------------------------------------------------


def _two_readers_of_the_add(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x) + x
    return y.relu() * y


REFUSALS: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "layer read twice": (
        lambda m, x: (y := m.conv(x)).relu() * y,
        "relu: not fused: `conv` is read by 2 nodes: relu, mul",
    ),
    "layer is an output": (
        lambda m, x: ((y := m.conv(x)).relu(), y),
        "relu: not fused: `conv` is read by 2 nodes: relu, output",
    ),
    "add read twice": (_two_readers_of_the_add, "relu: not fused: `add` is read by 2 nodes: relu, mul"),
    "broadcast": (
        lambda m, x: m.conv(x) + x.mean((2, 3), keepdim=True),
        "add: not fused: `add` adds f32[2,3,5,5] and f32[2,3,1,1]",
    ),
    "twice the same": (lambda m, x: (y := m.conv(x)) + y, "add: not fused: `add` does not add one tensor to another"),
    "constant": (
        lambda m, x: m.conv(x) + m.position,
        "add: not fused: `position` does not depend on the inputs, and keeps its shape at other batch sizes",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    forward, reason = REFUSALS[case]
    graph_module = canonical(forward)
    before = print_graph(graph_module)
    result = run(graph_module)
    assert [text for text in refusals(result) if reason in text], refusals(result)
    if case != "add read twice":
        assert (result.modified, print_graph(graph_module)) == (False, before)
    else:
        assert marks(graph_module) == {"add": "conv"}


def test_memory_that_is_written_to_is_left_alone() -> None:
    graph_module = canonical(lambda m, x: m.conv(x).relu())
    conv, relu = (node for node in graph_module.graph.nodes if node.op.startswith("call"))
    with graph_module.graph.inserting_after(relu):
        graph_module.graph.call_function(torch.ops.aten.mul_.Tensor, (conv.all_input_nodes[0], 2))
    result = run(graph_module)
    assert marks(graph_module) == {}
    assert "`x` is written to in place" in refusals(result)[0]


# -- truthfulness -----------------------------------------------------------------------------------------------------


def test_a_second_run_changes_nothing() -> None:
    graph_module = canonical(lambda m, x: (m.conv(x) + x).relu())
    run(graph_module)
    before = print_graph(graph_module)
    again = run(graph_module)
    assert (again.modified, again.edits) == (False, 0)
    assert print_graph(graph_module) == before


def test_marks_that_do_not_hold_any_more_are_removed() -> None:
    graph_module = canonical(lambda m, x: torch.tanh(m.conv(x)))
    node = next(node for node in graph_module.graph.nodes if node.name == "tanh")
    set_info(node, epilogue_of="conv")
    assert run(graph_module).edits == 1
    assert marks(graph_module) == {}
