"""Layers that would be slower than before get channels back; the clock is one that counts, and once the real one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import fx, nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.analysis import latency, layer_latency
from fxcompress.analysis.channels import analyse
from fxcompress.analysis.importance import score
from fxcompress.analysis.latency import Pair
from fxcompress.analysis.layer_latency import LayerShape, give_back, shape_of, time_layers
from fxcompress.analysis.plans import ChannelPlan, choose
from fxcompress.graph.inputs import ExampleInputs

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """Two families of channels: those of the first layer, and those of the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.left = nn.Conv2d(32, 48, 1)
        self.right = nn.Conv2d(32, 48, 1, bias=False)
        self.head = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.first(x).relu())
        return self.head((self.left(x) + self.right(x)).relu().mean((2, 3)))  # type: ignore[no-any-return]


def planned(ratio: float) -> tuple[fx.GraphModule, ChannelPlan, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    torch.manual_seed(0)
    graph = fxc.PassManager([P.Canonicalize()]).run(fxc.trace(Net().eval(), X), X).graph_module
    analysis = analyse(graph)
    scores = score(graph, analysis, "l2")
    plan = choose(graph, analysis, scores, ratio=ratio, budget=None, scope="layer", round_to=1)
    return graph, plan, scores


def widths(graph: fx.GraphModule, plan: ChannelPlan) -> dict[str, int]:
    return {one.paths[0].rpartition(".")[0]: int(plan.alive(one.axis).sum()) for one in plan.producers()}


def odd_sizes_are_slow(dense: LayerShape, pruned: LayerShape) -> Pair:
    return Pair(1.0, 2.0 if pruned.outputs % 8 and pruned.kind is nn.Conv2d else 0.5)


def test_a_slower_layer_grows_to_the_nearest_size_that_is_not() -> None:
    graph, plan, scores = planned(0.6)
    assert widths(graph, plan) == {"first": 13, "depthwise": 13, "left": 20, "right": 20, "head": 5}
    found, notes = give_back(graph, plan, scores, measure=odd_sizes_are_slow)
    assert widths(graph, found) == {"first": 16, "depthwise": 16, "left": 24, "right": 24, "head": 5}
    assert not (found.dead & ~plan.dead).any()
    returned = plan.dead & ~found.dead
    assert scores[returned].min() >= scores[found.dead & (scores > 0)].min()
    assert {str(note) for note in notes} >= {
        "first: 16 of 32 channels kept: with 13 it takes 2 ms, before 1 ms",
        "left: 24 of 48 channels kept: with 20 it takes 2 ms, before 1 ms",
    }


def test_faster_layers_keep_what_was_chosen_and_slower_ones_come_back_whole() -> None:
    graph, plan, scores = planned(0.5)
    found, notes = give_back(graph, plan, scores, measure=lambda dense, pruned: Pair(1.0, 1.04))
    assert found is plan
    assert notes == ()
    found, _ = give_back(graph, plan, scores, measure=lambda dense, pruned: Pair(1.0, 1.5))
    assert widths(graph, found) == {"first": 32, "depthwise": 32, "left": 48, "right": 48, "head": 5}


def test_sizes_on_the_way_back_are_multiples_of_what_is_asked_for() -> None:
    graph, plan, scores = planned(0.6)

    def slow(dense: LayerShape, pruned: LayerShape) -> Pair:
        return Pair(1.0, 2.0 if pruned.outputs < 22 and pruned.kind is nn.Conv2d else 0.5)

    found, _ = give_back(graph, plan, scores, round_to=6, measure=slow)
    assert widths(graph, found) == {"first": 24, "depthwise": 24, "left": 24, "right": 24, "head": 5}


def test_every_pair_of_shapes_is_timed_once() -> None:
    graph, plan, scores = planned(0.5)
    timed: list[tuple[LayerShape, LayerShape]] = []

    def count(dense: LayerShape, pruned: LayerShape) -> Pair:
        timed.append((dense, pruned))
        return Pair(1.0, 0.5)

    give_back(graph, plan, scores, batch=2.0, measure=count)
    assert len(timed) == len(set(timed)) == 5
    assert {dense.before for dense, _ in timed} == {(4,)}


def test_a_latency_budget_gives_slow_layers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_eights(dense: fx.GraphModule, pruned: fx.GraphModule, inputs: ExampleInputs) -> Pair:
        inputs.call(pruned)
        return Pair(6.0, float(-(-pruned.get_parameter("left.weight").shape[0] // 8)))

    monkeypatch.setattr(latency, "time_pair", in_eights)
    monkeypatch.setattr(layer_latency, "time_layers", odd_sizes_are_slow)
    torch.manual_seed(0)
    compact = fxc.compile(Net().eval(), [P.PruneChannels(budget=fxc.Latency(ms=4.0), scope="layer")], X)
    kept = {name: one.out_channels for name, one in compact.named_modules() if isinstance(one, nn.Conv2d)}
    assert kept == {"first": 24, "depthwise": 24, "left": 32, "right": 32}
    assert compact.report is not None
    assert any("channels kept: with" in note for line in compact.report.layers for note in line.notes)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False), (2, 8, 5, 5)),
        (nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1), (2, 8, 5, 5)),
        (nn.Linear(8, 4), (2, 7, 8)),
        (nn.Conv1d(8, 8, 3, padding="same", padding_mode="circular"), (2, 8, 9)),
    ],
)
def test_the_layer_that_is_timed_is_the_layer(layer: nn.Module, size: tuple[int, ...]) -> None:
    x = torch.randn(size)
    graph = fxc.PassManager([P.Canonicalize()]).run(fxc.trace(nn.Sequential(layer).eval(), x), x).graph_module
    [shape] = [found for node in graph.graph.nodes if (found := shape_of(node)) is not None]
    assert shape.build()().shape == layer(x).shape
    smaller = dataclasses.replace(shape, outputs=4)
    pair = time_layers(shape, smaller)
    assert pair.first_ms > 0
    assert pair.second_ms > 0
