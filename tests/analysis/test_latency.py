"""Budgets in measured latency, with a clock that counts parameters; and the real clock once, without a promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.analysis import latency
from fxcompress.analysis.latency import Pair, time_pair, with_batch
from fxcompress.errors import BudgetError, OptionError
from fxcompress.graph.inputs import ExampleInputs
from fxcompress.pipeline.text import parse, print_pass

X = torch.randn(2, 3, 8, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 1)).eval()


def parameters(graph: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in graph.parameters()))


Clock = Callable[[float], float]


def install(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> list[tuple[int, ...]]:
    """Let a graph take clock(share of the dense parameters) times 10 ms. Returns the shapes that were timed."""
    shapes: list[tuple[int, ...]] = []

    def fake(dense: fx.GraphModule, pruned: fx.GraphModule, inputs: ExampleInputs) -> Pair:
        shapes.append(tuple(inputs.tensors()[0].shape))
        inputs.call(pruned)  # candidates run
        return Pair(10.0, 10.0 * clock(parameters(pruned) / parameters(dense)))

    monkeypatch.setattr(latency, "time_pair", fake)
    return shapes


@pytest.mark.parametrize("budget", [fxc.Latency(0.5), fxc.Latency(ms=5.0), "latency:0.5", "latency:5ms"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_latency_budget_is_met_by_what_is_measured(monkeypatch: pytest.MonkeyPatch, budget: Any, scope: str) -> None:
    install(monkeypatch, lambda share: 0.2 + 0.8 * share)
    model = net()
    compact = fxc.compile(model, [P.PruneChannels(budget=budget, scope=scope)], X)
    share = parameters(compact) / parameters(model)
    assert 0.2 + 0.8 * share == pytest.approx(0.5, rel=0.10)
    assert compact.report is not None
    [metrics] = [row.metrics for row in compact.report.passes if row.metrics]
    assert metrics["target_ms"] == 5.0
    assert metrics["latency_ms"] == pytest.approx(10 * (0.2 + 0.8 * share))
    assert len(metrics["tried"]) >= 2


def test_a_second_run_finds_the_budget_met(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda share: share)
    item = P.MaskChannels(budget=fxc.Latency(0.5))
    compact = fxc.compile(net(), [item, item], X)
    assert compact.report is not None
    assert [row.modified for row in compact.report.passes if row.name.startswith("mask")] == [True, False]


def test_what_is_fast_enough_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda share: share)
    model = net()
    assert parameters(fxc.compile(model, [P.PruneChannels(budget=fxc.Latency(ms=11.0))], X)) == parameters(model)


def test_what_is_slower_than_the_dense_model_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda share: 1.0 if share == 1 else 1.04)
    model = net()
    with pytest.raises(BudgetError, match="no choice of channels is faster than the model as it is"):
        fxc.compile(model, [P.PruneChannels(budget=fxc.Latency(0.8))], X)
    near = fxc.compile(model, [P.PruneChannels(budget=fxc.Latency(0.95))], X)
    assert parameters(near) == parameters(model)


def test_a_budget_that_cannot_be_met_says_what_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda share: 0.6 + 0.4 * share)
    with pytest.raises(BudgetError, match=r"a budget of 3 ms .* fastest choice of channels takes 6.*takes 10 ms"):
        fxc.compile(net(), [P.PruneChannels(budget="latency:3ms")], X)


def test_the_batch_of_the_budget_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = install(monkeypatch, lambda share: share)
    fxc.compile(net(), [P.PruneChannels(budget=fxc.Latency(0.5, batch=5))], X)
    assert set(shapes) == {(5, 3, 8, 8)}
    assert with_batch(ExampleInputs.of((X, torch.ones(3))), 1).args[1].shape == (3,)


def test_latency_has_a_text() -> None:
    written: list[tuple[fxc.Budget | fxc.Latency, str]] = [
        (fxc.Latency(0.5), "latency:0.5"),
        (fxc.Latency(ms=5, batch=16), "latency:5ms:batch16"),
        (fxc.Bytes(0.5), "bytes:0.5"),
    ]
    for budget, text in written:
        item = P.PruneChannels(budget=budget)
        assert print_pass(item) == f"prune-channels{{budget={text}}}"
        assert parse(print_pass(item)) == [item]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fxc.Latency(), "a fraction or a time"),
        (lambda: fxc.Latency(0.5, ms=3.0), "a fraction or a time"),
        (lambda: fxc.Latency(1.5), "above 0 and at most 1"),
        (lambda: fxc.Latency(ms=-1.0), "a positive number of milliseconds"),
        (lambda: fxc.Latency(0.5, batch=0), "batch must be a positive whole number"),
        (lambda: P.PruneChannels(budget="latency:fast"), "is written as 'latency:0.5'"),
        (lambda: P.PruneChannels(budget="latncy:0.5"), "did you mean 'latency'"),
    ],
)
def test_latencies_without_sense_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_budget_in_bytes_is_met(scope: str) -> None:
    model = nn.Sequential(net(), nn.BatchNorm2d(4)).double().eval()
    compact = fxc.compile(model, [P.PruneChannels(budget=fxc.Bytes(0.5), scope=scope)], X.double())
    assert compact.report is not None
    assert compact.report.after.bytes == pytest.approx(0.5 * compact.report.before.bytes, rel=0.03)
    stored = sum(t.numel() * t.element_size() for t in (*compact.parameters(), *compact.buffers()))
    assert compact.report.after.bytes == stored


def test_the_real_clock_times_two_graphs() -> None:
    graph = fxc.compile(net(), [], X)
    pair = time_pair(graph.train(), graph, ExampleInputs.of(X), rounds=3, seconds=0.01)
    assert pair.first_ms > 0
    assert pair.second_ms > 0
    assert graph.training
