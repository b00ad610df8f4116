"""A captured graph runs at batch sizes other than the example's, or says why it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fxcompress.graph import capture
from fxcompress.graph.capture import trace
from fxcompress.graph.metadata import graph_info
from fxcompress.graph.tracer import Tracer

Function = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Model(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.function = function
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer, x)


def length(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = layer(x)
    return y.view(len(x), -1)


def number(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    batch, count = int(x.shape[0]), int(x.shape[1])
    y: torch.Tensor = layer(x.reshape(batch * count, 6))
    return y.reshape([batch, count, 4]) + torch.zeros(batch, 1, 4)


def sliced(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    double = torch.cat([x, x + 1])
    y: torch.Tensor = layer(double)
    return y[: int(x.size(0))] - y[int(x.size(0)) : 2 * int(x.size(0))]


@pytest.mark.parametrize("example", [1, 2, 5])
@pytest.mark.parametrize("function", [length, number, sliced])
def test_numbers_that_came_from_the_batch_follow_it(function: Function, example: int) -> None:
    model = Model(function)
    traced = trace(model, torch.randn(example, 3, 6))
    for batch in (1, 2, 3, 7):
        x = torch.randn(batch, 3, 6)
        assert torch.equal(traced(x), model(x))
    assert not [note for note in graph_info(traced).notes if "shape[0] = " in note]


def test_a_loop_over_the_batch_is_for_one_batch_size_and_says_so() -> None:
    def loop(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(x[index]) for index in range(x.shape[0])])

    model, x = Model(loop), torch.randn(2, 3, 6)
    traced = trace(model, x)
    assert torch.equal(traced(x), model(x))
    (note,) = graph_info(traced).notes
    assert note.startswith("specialised on x.shape[0] = 2 at ")
    assert "batch size 2 only (another number of nodes)" in note


def test_a_model_is_traced_again_only_if_the_batch_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Tracer] = []
    run = capture._run

    def count(tracer: Tracer, model: nn.Module, concrete: dict[str, object]) -> torch.fx.Graph:
        runs.append(tracer)
        return run(tracer, model, concrete)

    def width(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = layer(x)
        return y if x.shape[1] > 2 else -y

    monkeypatch.setattr(capture, "_run", count)
    trace(Model(width), torch.randn(2, 3, 6))
    assert len(runs) == 1
    trace(Model(length), torch.randn(2, 3, 6))
    assert len(runs) == 3


def test_batch_that_no_input_holds_is_left_alone() -> None:
    model = nn.Sequential(nn.Flatten(0), nn.Linear(6, 2)).eval()
    x = torch.randn(2, 3)
    assert torch.equal(trace(model, x)(x), model(x))
