"""RemoveChannels, one test a number of its docstring, and every size written in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.errors import UnsupportedError
from fxcompress.graph.modules import PartialLayerNorm
from fxcompress.testing import assert_equivalent
from tests.strategies import randomise_statistics

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def zero_rows(layer: Any, rows: list[int], bias: bool = True) -> None:
    with torch.no_grad():
        layer.weight[rows] = 0
        if bias and layer.bias is not None:
            layer.bias[rows] = 0


def removed(model: nn.Module, x: torch.Tensor = X) -> fxc.CompactModule:
    model = model.double().eval()
    compact = fxc.compile(model, [P.RemoveChannels()], x)
    assert_equivalent(model, compact, x, 1e-10)
    return compact


def widths(module: nn.Module) -> list[int]:
    return [m.weight.shape[0] for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def test_1_channels_that_are_zero_go() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    zero_rows(model[0], [1, 5, 6])
    assert widths(removed(model)) == [5, 4]


def test_1_channels_that_nobody_reads_go() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sigmoid(), nn.Conv2d(8, 4, 3, padding=1))
    with torch.no_grad():
        model.get_parameter("2.weight")[:, [0, 3]] = 0
    assert widths(removed(model)) == [6, 4]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.Hardswish(), nn.PReLU(8)])
def test_2_constants_fold_into_the_bias_of_an_unpadded_convolution(activation: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation, nn.Conv2d(8, 4, 3, bias=False), nn.Flatten()
    )
    randomise_statistics(model)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.bias.data.abs_()  # constants that every activation lets through
    zero_rows(model[0], [0, 2, 7], bias=False)
    compact = removed(model)
    assert widths(compact) == [5, 4]
    assert compact.get_parameter("3.bias").abs().max() > 0


def test_2_constants_fold_into_linear_layers_behind_pooling_and_flatten() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 6), nn.Sigmoid(), nn.Linear(6, 3),
    )  # fmt: skip
    randomise_statistics(model)
    zero_rows(model[0], [0, 1, 2, 3])
    zero_rows(model[6], [5], bias=False)
    assert widths(removed(model)) == [4, 5, 3]


def test_3_a_layer_norm_remembers_removed_constants() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Sigmoid(), nn.LayerNorm(6), nn.Linear(6, 4))
    randomise_statistics(model)
    zero_rows(model[0], [1, 4], bias=False)
    with torch.no_grad():
        model.get_parameter("2.weight")[[1, 4]] = 0
    compact = removed(model)
    assert widths(compact) == [4, 4]
    layer = compact.get_submodule("2")
    assert isinstance(layer, PartialLayerNorm)
    assert (layer.stored, layer.width) == (4, 6)
    again = fxc.compile(compact, "prune-channels{ratio=0.5}", X)
    masked = fxc.compile(compact, "mask-channels{ratio=0.5}", X)
    assert_equivalent(masked, again, X, 1e-10)


def test_4_a_constant_read_by_a_padded_convolution_stays_with_its_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1))
    randomise_statistics(model)
    zero_rows(model[0], [0, 2])
    compact = removed(model)
    assert widths(compact) == [8, 4]
    assert compact.report is not None
    reason = next(line for line in compact.report.layers if line.layer == "0").notes[0]
    assert reason == "not pruned: a constant, but not zero, channel is read by a padded convolution (2)"


def test_4_a_constant_read_by_circular_padding_can_fold() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"))
    randomise_statistics(model)
    zero_rows(model[0], [0, 2])
    assert widths(removed(model)) == [6, 4]


def test_4_outputs_of_the_model_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    zero_rows(model[0], [0])
    assert widths(removed(model)) == [8]


def test_4_what_is_not_understood_keeps_its_inputs_with_its_name() -> None:
    class Sorts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.sort(self.first(x), dim=1).values)  # type: ignore[no-any-return]

    model = Sorts()
    zero_rows(model.first, [0, 1])
    compact = removed(model)
    assert widths(compact) == [8, 4]
    assert compact.report is not None
    reasons = {line.layer: line.notes for line in compact.report.layers}
    assert reasons["first"] == ("not pruned: read by sort (sort), which the channel rules do not know",)


def test_rows_that_go_can_make_columns_dead() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model.get_parameter("4.weight")[:, :3] = 0  # the first three channels in the middle are not read,
        model.get_parameter("2.weight")[3:, :2] = 0  # and they alone read the first two
    assert widths(removed(model)) == [6, 5, 4]


def test_a_layer_that_would_lose_all_of_its_channels_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    zero_rows(model[0], list(range(8)))
    with pytest.raises(UnsupportedError, match="'0' would lose all of its 8 channels: every weight is zero"):
        fxc.compile(model, [P.RemoveChannels()], X.float())


def test_layers_state_their_new_sizes() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3, groups=8), nn.PReLU(8), nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 1, groups=2), nn.ConvTranspose2d(16, 8, 2), nn.Conv2d(8, 4, 1),
    ).double().eval()  # fmt: skip
    compact = fxc.compile(model, [P.PruneChannels(0.5, scope="layer")], X)
    assert "GroupNorm(2, 4," in str(compact.get_submodule("1"))
    assert "Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), groups=4)" in str(compact.get_submodule("2"))
    assert "PReLU(num_parameters=4)" in str(compact.get_submodule("3"))
    assert "BatchNorm2d(4," in str(compact.get_submodule("4"))
    assert "Conv2d(4, 8, kernel_size=(1, 1), stride=(1, 1), groups=2)" in str(compact.get_submodule("5"))
    assert "ConvTranspose2d(8, 4," in str(compact.get_submodule("6"))


def _view(x: torch.Tensor) -> torch.Tensor:
    return x.view(2, 8, -1).sum(2)


def _split(x: torch.Tensor) -> torch.Tensor:
    first, second = torch.split(x, 4, dim=1)
    return torch.cat([first * second, first], 1).mean((2, 3))


def _slices(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:, 2:], x[:, :6], x[:, -3:, 1:, 1:].mean((2, 3), keepdim=True).expand(-1, -1, 6, 6)], 1).mean(
        (2, 3)
    )


def _pad(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (1, 1, 1, 1, 2, 2)).mean((2, 3))


def _expand(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3), keepdim=True).expand(2, 8, 3, 3).flatten(1)


def _unflatten(x: torch.Tensor) -> torch.Tensor:
    return torch.unflatten(x.flatten(1), 1, (8, 36)).sum(2)


def _pixel_shuffle(x: torch.Tensor) -> torch.Tensor:
    return F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2).mean((2, 3))


def _stack(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x.sigmoid()], dim=1).sum(1).mean((2, 3))


@pytest.mark.parametrize("reshape", [_view, _split, _slices, _pad, _expand, _unflatten, _pixel_shuffle, _stack])
def test_every_size_in_the_graph_is_rewritten(reshape: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.linear = nn.Linear(reshape(torch.zeros(2, 8, 6, 6)).shape[1], 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(reshape(self.conv(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Model().double().eval()
    masked = fxc.compile(model, [P.MaskChannels(0.5, importance="random")], X)
    pruned = fxc.compile(model, [P.PruneChannels(0.5, importance="random")], X)
    assert_equivalent(masked, pruned, X, 1e-10)
    assert pruned.get_parameter("conv.weight").shape[0] < 8


def test_training_after_removal_works_and_gradients_reach_everything() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    compact = fxc.compile(model, [P.PruneChannels(0.5)], X.float()).train()
    compact(X.float()).sum().backward()
    assert all(p.grad is not None for p in compact.parameters())
