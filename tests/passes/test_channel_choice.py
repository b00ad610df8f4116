"""Shares of single layers, layers that are left alone, and that nothing is masked in vain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.errors import OptionError
from fxcompress.graph.metadata import graph_info
from fxcompress.pipeline.text import parse, print_pass
from tests.strategies import Program, example, programs

X = torch.randn(2, 3, 8, 8)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(20, 10), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(x).relu())  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 20, 3), nn.ReLU())
        self.head = Head()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def widths(model: nn.Module, item: fxc.Pass) -> list[int]:
    compact = fxc.compile(model, [item], X)
    return [len(compact.get_parameter(f"{name}.weight")) for name in ("features.0", "features.2", "head.hidden")]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ratio": 0.5, "scope": "layer", "ratios": {"features.0": 0.3, "head.*": 0.0}}, [7, 10, 10]),
        ({"ratios": {"features": 0.5}}, [5, 10, 10]),
        ({"ratios": {"features.*": 0.5, "features.2": 0.1}}, [5, 18, 10]),
        ({"ratios": {"features.2": 0.1, "features.*": 0.5}}, [5, 10, 10]),
        ({"ratio": 0.5, "scope": "layer", "ignore": "features.0"}, [10, 10, 5]),
        ({"ratio": 0.5, "scope": "layer", "ignore": nn.Linear}, [5, 10, 10]),
        ({"ratio": 0.5, "scope": "layer", "ignore": (Head, "features.2")}, [5, 20, 10]),
    ],
)
def test_layers_have_shares_of_their_own_or_stay(options: dict[str, Any], expected: list[int]) -> None:
    assert widths(net(), P.PruneChannels(**options)) == expected


def test_a_module_of_the_callers_model_can_be_left_alone() -> None:
    model = net()
    assert widths(model, P.PruneChannels(0.5, scope="layer", ignore=model.head)) == [5, 10, 10]
    assert widths(model, P.PruneChannels(0.5, scope="layer", ignore=(model.features[0], "head.*"))) == [10, 10, 10]


def test_ratios_are_the_most_that_a_layer_loses_in_a_global_ranking() -> None:
    model = net()
    with torch.no_grad():  # the first layer is worth nothing next to the others
        model.features[0].weight[1:].mul_(1e-3)  # type: ignore[index]
    free = widths(model, P.PruneChannels(0.3))
    capped = widths(model, P.PruneChannels(0.3, ratios={"features.0": 0.2}))
    assert free[0] < 8
    assert capped[0] == 8
    assert sum(capped) == sum(free)


def test_a_budget_is_met_around_fixed_shares() -> None:
    item = P.PruneChannels(budget="parameters:0.5", scope="layer", ratios={"head.*": 0.0})
    compact = fxc.compile(net(), [item], X)
    assert compact.report is not None
    assert compact.report.after.parameters == pytest.approx(0.5 * compact.report.before.parameters, rel=0.03)
    assert len(compact.get_parameter("head.hidden.weight")) == 10


def test_ratios_have_a_text() -> None:
    item = P.PruneChannels(0.5, ratios={"features.0": 0.3, "0.weird name": 0.25, "head.*": 0})
    text = "prune-channels{ratio=0.5, ratios=[features.0:0.3, '0.weird name:0.25', head.*:0.0]}"
    assert print_pass(item) == text
    assert parse(text) == [item]
    assert parse("prune-channels{ratios=head.*:0.5}") == [P.PruneChannels(ratios={"head.*": 0.5})]
    assert str(P.PruneChannels(0.5, ignore=(nn.Linear, "a"))) == "prune-channels{ratio=0.5, ignore=[<Linear>, a]}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: P.PruneChannels(ratios={"a": 1.0}), "'a' must be at least 0 and below 1, not 1.0"),
        (lambda: P.PruneChannels(ratios="a"), "are written as"),
        (lambda: P.PruneChannels(ratios={0: 0.5}), "by the path or pattern of a layer, not 0"),
        (lambda: P.PruneChannels(0.5, ignore=3), "ignore takes patterns, modules or types, not 3"),
        (lambda: P.PruneChannels(0.5, batches=0), "batches must be a positive whole number"),
        (lambda: P.PruneChannels(0.5, aggregate="median"), "aggregate must be one of 'mean', 'sum', 'max'"),
        (lambda: widths(net(), P.PruneChannels(ratios={"haed.hidden": 0.5})), "did you mean 'head.hidden'"),
        (lambda: widths(net(), P.PruneChannels(0.5, ignore=nn.Conv3d)), "ignore=<Conv3d> matches no layer"),
        (lambda: widths(net(), P.PruneChannels(0.5, ignore=net().head)), "ignore=<Head> matches no layer"),
    ],
)
def test_options_without_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


class Kept(nn.Module):
    """A LayerNorm by hand over the channels of `mixed`: each channel carries the mean of all, masked or not."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.mixed = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.reader = nn.Conv2d(16, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mixed(self.free(x).relu())
        y = y - y.mean(1, keepdim=True)
        return self.reader(y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-5))  # type: ignore[no-any-return]


def masked_in_vain(passes: list[fxc.Pass], model: nn.Module, x: torch.Tensor) -> int:
    """Weights that are masked and still there."""
    compact = fxc.compile(model, passes, x, verify=False)
    return sum(int((~mask).sum()) for mask in graph_info(compact).masks.values())


def test_what_cannot_be_removed_is_not_masked_and_says_why() -> None:
    torch.manual_seed(0)
    model = Kept().eval()
    item = P.MaskChannels(0.5, scope="layer")
    masked = fxc.compile(model, [item], X)
    rows = {name: masked.get_parameter(f"{name}.weight").flatten(1) for name in ("free", "mixed")}
    dead = {name: int((tensor == 0).all(1).sum()) for name, tensor in rows.items()}
    assert dead == {"free": 8, "mixed": 0}
    assert masked_in_vain([item, P.RemoveChannels()], model, X) == 0
    assert masked.report is not None
    notes = {line.layer: line.notes for line in masked.report.layers}
    assert notes["free"] == ("masked 16 -> 8",)
    assert notes["mixed"][0].startswith("not masked: ")
    assert "no channel was chosen" not in notes["mixed"][0]


def test_trying_masks_out_leaves_every_tensor_as_it_was() -> None:
    from fxcompress.analysis.channels import analyse
    from fxcompress.analysis.importance import score
    from fxcompress.analysis.plans import choose_all
    from fxcompress.analysis.trial import masked

    graph = fxc.compile(net(), [], X)
    analysis = analyse(graph)
    plan = choose_all(analysis, score(graph, analysis, "l2"))
    before = dict(graph.named_parameters())
    expected = graph(X)
    with masked(graph, plan):
        assert not torch.equal(graph(X), expected)
    assert all(before[name] is parameter for name, parameter in graph.named_parameters())
    assert torch.equal(graph(X), expected)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(programs(), st.sampled_from([0.3, 0.6]), st.sampled_from(["layer", "global"]))
def test_nothing_is_masked_in_vain(model: Program, ratio: float, scope: str) -> None:
    passes = [P.MaskChannels(ratio, scope=scope), P.RemoveChannels()]
    assert masked_in_vain(passes, model, example()) == 0
