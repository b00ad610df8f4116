"""MaskWeights, MaskChannels and PruneChannels: what is chosen, budgets, rounding, what stays and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.errors import BudgetError, OptionError
from fxcompress.graph.metadata import graph_info
from fxcompress.train.masks import hold_masks

X = torch.randn(1, 3, 32, 32)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}


def sparsity(tensors: list[torch.Tensor]) -> float:
    return sum(int((t == 0).sum()) for t in tensors) / sum(t.numel() for t in tensors)


def test_global_l1_masks_the_smallest_weights_of_all_layers() -> None:
    model = small()
    masked = weights(fxc.compile(model, [P.MaskWeights(0.4)], X))
    before = weights(model)
    zeroed = torch.cat([before[name][masked[name] == 0].abs() for name in before])
    kept = torch.cat([before[name][masked[name] != 0].abs() for name in before])
    assert sparsity(list(masked.values())) == pytest.approx(0.4, abs=1e-3)
    assert zeroed.max() <= kept.min()


def test_layer_scope_masks_the_same_share_of_each() -> None:
    for method in ("l1", "random"):
        masked = weights(fxc.compile(small(), [P.MaskWeights(0.3, method=method, scope="layer")], X))
        for tensor in masked.values():
            assert sparsity([tensor]) == pytest.approx(0.3, abs=0.01)


def test_random_masks_depend_on_the_seed_only() -> None:
    first, again, other = (weights(fxc.compile(small(), [P.MaskWeights(0.3, "random", seed=s)], X)) for s in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name] == 0, other[name] == 0) for name in first)


def test_two_of_four_along_the_input_channels() -> None:
    compact = fxc.compile(small(), [P.MaskWeights(pattern="2:4")], X)
    for name in ("3.weight", "7.weight"):
        weight = weights(compact)[name].movedim(1, -1).reshape(-1, 4)
        assert ((weight != 0).sum(1) == 2).all()
    assert compact.report is not None
    notes = {line.layer: line.notes for line in compact.report.layers}
    assert notes["0"] == ("not masked: 3 input channels are no multiple of 4",)


def test_masks_are_held_while_training() -> None:
    compact = fxc.compile(small(), [P.MaskWeights(0.5)], X).train()
    optimiser = torch.optim.SGD(compact.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        compact(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimiser.step()
        hold_masks(compact)
    assert sparsity(list(weights(compact).values())) == pytest.approx(0.5, abs=1e-3)


def test_train_holds_the_masks_of_channels_and_weights() -> None:
    data = [(torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))) for _ in range(3)]
    passes = [P.MaskWeights(0.5), P.MaskChannels(0.25), P.Train(data, optimiser="sgd", weight_decay=0.1)]
    compact = fxc.compile(small(), passes, X)
    for path, mask in graph_info(compact).masks.items():
        assert not compact.get_parameter(path)[~mask].any()


@pytest.mark.parametrize("importance", ["l1", "l2", "bn_scale", "random"])
def test_the_least_important_channels_of_a_layer_are_masked(importance: str) -> None:
    model = small()
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.rand(16) + 0.1)
    compact = fxc.compile(model, [P.MaskChannels(0.5, importance=importance, scope="layer")], X)
    dead = (compact.get_parameter("0.weight") == 0).flatten(1).all(1)
    assert int(dead.sum()) == 8
    scores = {
        "l1": model.get_parameter("0.weight").flatten(1).abs().sum(1),
        "l2": model.get_parameter("0.weight").flatten(1).norm(dim=1),
        "bn_scale": model.get_parameter("1.weight"),
    }
    if importance in scores:
        assert scores[importance][dead].max() <= scores[importance][~dead].min()
    assert not compact.get_parameter("1.bias")[dead].any()
    assert not compact.get_parameter("3.weight")[:, dead].any()


def test_round_to_and_ignore() -> None:
    compact = fxc.compile(small(), [P.PruneChannels(0.55, scope="layer", round_to=8, ignore="3")], X)
    assert [m.weight.shape[0] for m in compact.modules() if isinstance(m, (nn.Conv2d, nn.Linear))] == [8, 32, 10]
    assert compact.report is not None
    notes = {line.layer: line.notes for line in compact.report.layers}
    assert notes["3"][0] == "not masked: ignored on request"
    assert notes["7"][0] == "not masked: output of the model"
    with pytest.raises(OptionError, match="ignore='conv1' matches no layer"):
        fxc.compile(small(), [P.PruneChannels(0.5, ignore=("conv1",))], X)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("budget", [fxc.Parameters(0.5), fxc.MACs(0.5), fxc.MACs(0.25), "parameters:0.3"])
@pytest.mark.parametrize("build", [resnet18, mobilenet_v2])
def test_budgets_are_met_within_three_percent(build: type, budget: object, scope: str) -> None:
    compact = fxc.compile(build(weights=None), [P.PruneChannels(budget=budget, scope=scope)], X)  # type: ignore[arg-type]
    assert compact.report is not None
    kind, _, limit = str(budget).partition(":")
    before, after = getattr(compact.report.before, kind), getattr(compact.report.after, kind)
    assert after == pytest.approx(float(limit) * before, rel=0.03)


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(BudgetError, match=r"5 parameters cannot be met within 3 %.*the smallest possible"):
        fxc.compile(small(), [P.PruneChannels(budget=fxc.Parameters(5))], X)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: P.PruneChannels(1.0), "ratio must be at least 0 and below 1, not 1.0"),
        (lambda: P.MaskChannels(-0.1), "ratio must be"),
        (lambda: P.MaskChannels(float("nan")), "ratio must be"),
        (lambda: P.MaskWeights(1.5), "amount must be"),
        (lambda: P.MaskWeights(0.5, method="l3"), "method must be one of 'l1', 'random', not 'l3'"),
        (lambda: P.PruneChannels(), "either a ratio or a budget"),
        (lambda: P.PruneChannels(0.5, budget="macs:0.5"), "either a ratio or a budget"),
        (lambda: P.PruneChannels(budget="mac:0.5"), "did you mean 'macs'"),
        (lambda: P.PruneChannels(budget="macs:half"), "is written as 'macs:0.5'"),
        (lambda: fxc.MACs(1.5), "a fraction above 0 and at most 1"),
        (lambda: P.PruneChannels(0.5, round_to=0), "round_to must be a positive whole number"),
        (lambda: P.PruneChannels(0.5, scope="world"), "scope must be one of"),
        (lambda: P.Train(epochs=-1), "epochs must be"),
        (lambda: P.Train(loss="crossentropy"), "did you mean 'cross_entropy'"),
    ],
)
def test_options_without_sense_are_refused(make: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()  # type: ignore[operator]
