"""Layouts for training: other places in memory, the same numbers, and afterwards the same places."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.train.layout import channels_last

torch.manual_seed(0)
X, Y = torch.randn(12, 3, 8, 8), torch.randint(0, 4, (12,))
BATCHES = list(zip(X.split(4), Y.split(4), strict=True))


class Net(nn.Module):
    """Convolutions of both directions, a depthwise one, and a linear layer behind a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.back, self.head = nn.ConvTranspose2d(8, 5, 2, 2), nn.Linear(320, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.back(F.relu(self.depthwise(F.relu(self.first(x)))))
        z: torch.Tensor = self.head(y.view(y.shape[0], -1))
        return z


def net() -> Net:
    torch.manual_seed(1)
    return Net().double().eval()


def layouts(module: nn.Module) -> list[tuple[int, ...]]:
    return [parameter.stride() for parameter in module.parameters()]


def test_it_changes_where_numbers_lie_and_nothing_else() -> None:
    seen: list[bool] = []

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, target)

    graph = fxc.compile(net(), "canonicalize", X.double())
    before, expected = layouts(graph), graph(X.double())
    with channels_last(graph, wanted=True):
        weight = graph.get_parameter("first.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
        handle = graph.get_submodule("depthwise").register_forward_hook(
            lambda module, inputs, output: seen.append(output.is_contiguous(memory_format=torch.channels_last))
        )
        loss(graph(X.double()), Y).backward()
        handle.remove()
        torch.testing.assert_close(graph(X.double()), expected)
    assert seen == [True]
    assert layouts(graph) == before
    assert not graph._forward_pre_hooks
    torch.testing.assert_close(graph(X.double()), expected)


def test_training_ends_with_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [(x.double(), y) for x, y in BATCHES]
    moved = fxc.compile(net(), [P.Train(data, epochs=2)], X.double())
    monkeypatch.setattr("fxcompress.train.layout._is_hidden", lambda node: True)
    still = fxc.compile(net(), [P.Train(data, epochs=2)], X.double())
    assert layouts(moved) == layouts(still) == layouts(net())
    for left, right in zip(moved.parameters(), still.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


def scaled(x: torch.Tensor) -> torch.Tensor:
    """Count on images lying as they usually do."""
    return x.view(-1).mul(2).view(x.shape)


def test_code_that_is_hidden_gets_what_it_counts_on() -> None:
    graph = fxc.trace(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), X)
    output = graph.graph.output_node()
    with graph.graph.inserting_before(output):
        output.args = (graph.graph.call_function(scaled, (output.args[0],)),)
    graph.recompile()
    with channels_last(graph, wanted=True):
        assert graph.get_parameter("0.weight").is_contiguous()
        graph(X)


def test_observers_work_in_any_layout() -> None:
    graph = fxc.compile(nn.Conv2d(3, 4, 3).eval(), "insert-observers{qat=true}", X)
    with channels_last(graph, wanted=True):
        assert not next(one for one in graph.parameters() if one.ndim == 4).is_contiguous()
        graph.train()(X).sum().backward()
