"""Channels of a model that stays Python around its graphs: ranked together, and budgets of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.analysis import latency
from fxcompress.analysis.joint import join
from fxcompress.analysis.latency import Pair
from fxcompress.errors import BudgetError
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.graph.regions import regions


def stack(channels: int, last: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Conv2d(channels, last, 1), nn.ReLU())


class InPieces(nn.Module):
    """Two stacks, and Python that looks at data between them."""

    def __init__(self) -> None:
        super().__init__()
        self.left = stack(16, 4)
        self.right = stack(16, 12)
        self.outside = nn.Linear(16, 200)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = self.left(x)
        if left.sum() > 1e9:
            left = left * 0
        return self.outside(torch.cat([left, self.right(x)], 1).mean((2, 3)))  # type: ignore[no-any-return]


X = torch.randn(2, 3, 8, 8)


def model() -> InPieces:
    torch.manual_seed(0)
    made = InPieces().eval()
    with torch.no_grad():
        made.get_parameter("left.0.weight")[:8] *= 1e-3
    return made


def widths(compact: nn.Module) -> dict[str, int]:
    return {
        layer.removesuffix(".weight").replace("model.", "").replace(".graph", ""): tensor.shape[0]
        for layer, tensor in compact.named_parameters()
        if layer.endswith("0.weight")
    }


def parameters(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


def test_the_global_scope_ranks_all_pieces_together() -> None:
    by_piece = fxc.compile(model(), [P.PruneChannels(0.25, scope="layer")], X)
    assert sorted(widths(by_piece).values()) == [12, 12]
    together = fxc.compile(model(), [P.PruneChannels(0.25, scope="global")], X)
    found = widths(together)
    assert (found["left.0"], found["right.0"]) == (8, 16)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("quantity", ["parameters", "macs", "bytes"])
def test_a_budget_counts_the_whole_model(quantity: str, scope: str) -> None:
    compact = fxc.compile(model(), [P.PruneChannels(budget=f"{quantity}:0.9", scope=scope)], X)
    assert compact.report is not None
    before, after = (getattr(one, quantity) for one in (compact.report.before, compact.report.after))
    assert after == pytest.approx(0.9 * before, rel=0.03)
    with torch.no_grad():
        assert compact(X).shape == (2, 200)


def test_a_budget_below_what_stays_python_says_so() -> None:
    with pytest.raises(BudgetError, match=r"pass 2 .* the whole network 4,568, the smallest possible 3,488"):
        fxc.compile(model(), [P.PruneChannels(budget="parameters:0.5")], X)


@pytest.mark.parametrize("budget", [fxc.Latency(0.95), fxc.Latency(ms=9.5)])
def test_a_latency_budget_times_the_whole_model(monkeypatch: pytest.MonkeyPatch, budget: fxc.Latency) -> None:
    shares: list[float] = []

    def by_parameters(dense: fx.GraphModule, pruned: fx.GraphModule, inputs: ExampleInputs) -> Pair:
        inputs.call(pruned)
        shares.append(parameters(pruned) / parameters(dense))
        return Pair(10.0, 10.0 * shares[-1])

    monkeypatch.setattr(latency, "time_pair", by_parameters)
    dense = model()
    compact = fxc.compile(dense, [P.PruneChannels(budget=budget)], X)
    assert parameters(compact) / parameters(dense) == pytest.approx(0.95, abs=0.02)
    assert parameters(compact) / parameters(dense) in shares
    assert compact.report is not None
    [metrics] = [line.metrics for line in compact.report.passes if line.metrics]
    assert metrics["first_ms"] == 10.0


@pytest.mark.parametrize(
    "options", [{"ratio": 0.4}, {"budget": "parameters:0.9"}, {"ratio": 0.4, "importance": "activation", "data": [X]}]
)
def test_masked_equals_removed_and_a_second_run_does_nothing(options: dict[str, Any]) -> None:
    item = P.MaskChannels(**options)
    masked = fxc.compile(model(), [item], X)
    removed = fxc.compile(model(), [item, P.RemoveChannels()], X)
    with torch.no_grad():
        torch.testing.assert_close(removed(X), masked(X))
    assert parameters(removed) < parameters(masked)
    twice = fxc.compile(model(), [item, item], X)
    assert twice.report is not None
    assert [line.modified for line in twice.report.passes if line.name.startswith("mask")] == [True, False]
    assert str(item) in [line.name for line in twice.report.passes]


def test_a_joint_analysis_keeps_every_piece_apart() -> None:
    from fxcompress.analysis.channels import analyse
    from fxcompress.analysis.importance import families

    graph = fxc.PassManager([P.Canonicalize()]).run(fxc.trace(model(), X), X).graph_module
    pieces = regions(graph)
    parts = [analyse(piece.graph_module) for piece in pieces]
    joint = join(parts, [piece.path for piece in pieces])
    assert joint.analysis.group_count == sum(part.group_count for part in parts)
    assert joint.analysis.free().sum() == sum(part.free().sum() for part in parts)
    known = {name for name, _ in graph.named_parameters(remove_duplicate=False)}
    assert {path for one in joint.analysis.parameters for path in one.paths} <= known
    found = families(joint.analysis)
    first, second = (set(part.tolist()) - {-1} for part in joint.parted(found.astype(float)))
    assert not first & second


@pytest.mark.parametrize("importance", ["taylor", "activation", lambda weight, dimension: weight.movedim(
    dimension, 0).flatten(1).abs().sum(1)])  # fmt: skip
def test_a_criterion_that_is_asked_once_is_not_asked_again_until_channels_are_removed(importance: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(576, 4)).eval()
    data = [(X, torch.tensor([0, 1]))]
    item = P.MaskChannels(0.3, importance=importance, data=data if importance == "taylor" else [X], round_to=3)
    compact = fxc.compile(net, [item, item, P.RemoveChannels(), item, item], X)
    assert compact.report is not None
    modified = [line.modified for line in compact.report.passes if line.name.startswith("mask")]
    assert modified == [True, False, True, False]
