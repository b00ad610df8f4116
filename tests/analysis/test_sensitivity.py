"""Sensitivity: losses with one family masked, against masking by hand; shares from them; the plot and the figures."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.analysis.sensitivity import FamilySensitivity, Sensitivity
from fxcompress.analysis.sensitivity_plot import plot
from fxcompress.errors import InputError, OptionError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 20, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(20, 4),
    ).eval()  # fmt: skip


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = (4, 4, 3)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.randint(4, (n,), generator=generator)) for n in sizes]


def masked_by_hand(name: str, count: int) -> nn.Sequential:
    model = copy.deepcopy(net())
    weight, bias = model.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.bias")
    lowest = weight.detach().flatten(1).norm(dim=1).argsort()[:count]
    with torch.no_grad():
        weight[lowest], bias[lowest] = 0, 0
    return model


def test_losses_are_those_of_masking_one_family() -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = fxc.sensitivity(model, X, data(), "cross_entropy", steps=(0.2, 0.5))
    assert [(family.layer, family.channels) for family in found.families] == [("0", 10), ("2", 20)]
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    assert found.baseline == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
    for family, counts in zip(found.families, ((2, 5), (4, 10)), strict=True):
        expected = [F.cross_entropy(masked_by_hand(family.layer, count)(x), y).item() for count in counts]
        assert family.losses == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_without_targets_it_is_the_squared_error_against_the_outputs() -> None:
    found = fxc.sensitivity(net(), X, [x for x, _ in data()], steps=(0.5,))
    x = torch.cat([x for x, _ in data()])
    reference = net()(x)
    error = (masked_by_hand("2", 10)(x) - reference).square().sum() / reference.square().sum()
    assert found.baseline == 0
    assert found.families[1].losses == pytest.approx([error.item()], rel=1e-4)
    assert found.measure == "relative squared error"


def made_up() -> Sensitivity:
    steps = (0.25, 0.5, 0.75)
    gentle, harsh = (1.0, 1.0, 2.0), (1.5, 3.0, 9.0)
    return Sensitivity(
        "loss", 1.0, steps, (FamilySensitivity("a", ("a", "c"), 30, gentle), FamilySensitivity("b", ("b",), 10, harsh))
    )


@pytest.mark.parametrize("target", [0.0, 0.1, 0.4, 0.5, 0.6, 0.75])
def test_shares_hurt_alike_and_add_up(target: float) -> None:
    found = made_up().ratios(target)
    assert (30 * found["a"] + 10 * found["b"]) / 40 == pytest.approx(target, abs=1e-3)
    assert found["a"] >= found["b"]


def test_shares_are_where_the_losses_are_equal() -> None:
    # with the loss grown by 0.5: a at 0.5 + 0.25 * 0.5 = 0.625, b at 0.25; together (30 * 0.625 + 10 * 0.25) / 40
    found = made_up().ratios((30 * 0.625 + 10 * 0.25) / 40)
    assert found == pytest.approx({"a": 0.625, "b": 0.25}, abs=1e-3)
    with pytest.raises(OptionError, match=r"at least 0 and at most 0.75, not 0.9"):
        made_up().ratios(0.9)


def test_the_shares_drive_a_pass() -> None:
    model = net()
    ratios = fxc.sensitivity(model, X, data(), "cross_entropy").ratios(0.5)
    pruned = fxc.compile(model, [P.PruneChannels(ratios=ratios)], X)
    widths = [len(pruned.get_parameter(f"{name}.weight")) for name in ("0", "2")]
    assert sum(widths) == pytest.approx(15, abs=2)
    expected = [10 - int(10 * ratios["0"] + 1e-9), 20 - int(20 * ratios["2"] + 1e-9)]
    assert widths == expected


class Gate(nn.Module):
    """Cannot be traced as a whole: one of its parts can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return y if y.sum() > -1e9 else y + 1


def test_families_inside_regions_are_measured_on_the_whole_model() -> None:
    whole, part = (fxc.sensitivity(model.eval(), X, [X], steps=(0.5,)) for model in (Gate(), net()))
    assert [family.layer for family in whole.families] == ["body.0", "body.2"]
    for left, right in zip(whole.families, part.families, strict=True):
        assert left.losses == pytest.approx(right.losses, rel=1e-5)
    fxc.compile(Gate().eval(), [P.PruneChannels(ratios=whole.ratios(0.3))], X)


def test_mistakes_are_said() -> None:
    with pytest.raises(InputError, match="holds no batch"):
        fxc.sensitivity(net(), X, [])
    with pytest.raises(InputError, match="validation batch 1 is a Tensor, not a pair"):
        fxc.sensitivity(net(), X, [X], "mse")
    with pytest.raises(OptionError, match="steps must be rising ratios"):
        fxc.sensitivity(net(), X, [X], steps=(0.5, 0.2))
    with pytest.raises(OptionError, match="takes no importance 'taylor'"):
        fxc.sensitivity(net(), X, [X], importance="taylor")


def test_plot_text_and_figures(tmp_path: Path) -> None:
    found = made_up()
    plot(found, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    plot(found, tmp_path / "s.svg", "title")
    assert json.loads(json.dumps(found.to_dict()))["families"][0]["layer"] == "a"
    assert str(found).splitlines()[2].split() == ["a", "30", "1", "1", "2"]
    with pytest.raises(OptionError, match="cannot write the plot"):
        plot(found, tmp_path / "s.doc")
