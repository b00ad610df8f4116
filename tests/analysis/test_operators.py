"""Channels through operators beyond those of plain convolutional networks: removed equals masked, and enough goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress as fxc
from fxcompress import passes as P
from fxcompress.graph.compare import difference

Forward = Callable[["Pair", torch.Tensor], Any]


class Pair(nn.Module):
    """Two convolutions a, b of `width` channels, a forward between them and d, which reads what it makes."""

    def __init__(self, run: Forward, width: int = 8, reads: int = 8, more: dict[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 1), nn.Conv2d(3, width, 1)
        self.d = nn.Conv2d(reads, 3, 1)
        self.width = width
        self.more = nn.ModuleDict(more or {})
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.run(self, x))  # type: ignore[no-any-return]


def pruned(model: nn.Module, shape: tuple[int, ...] = (2, 3, 8, 8)) -> fxc.CompactModule:
    """Mask and remove half of all channels in float64; compare them at three batch sizes."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.double().eval()
    example = torch.randn(shape, dtype=torch.float64)
    masked = fxc.compile(model, [P.MaskChannels(0.5, scope="layer")], example)
    removed = fxc.compile(model, [P.MaskChannels(0.5, scope="layer"), P.RemoveChannels()], example)
    for batch in (1, 2, 5):
        x = torch.randn((batch, *shape[1:]), dtype=torch.float64)
        with torch.no_grad():
            expected = masked(x)
            assert expected.abs().max() > 1e-3
            assert difference(expected, removed(x)).relative <= 1e-10
    return removed


def widths(model: nn.Module, *names: str) -> list[int]:
    return [int(model.get_parameter(f"{name}.weight").shape[0]) for name in names]


# -- sizes computed at run time -------------------------------------------------------------------------------------


def with_the_width_of_another(net: Pair, x: torch.Tensor) -> Any:
    """The batch and the width of `a` state the shape of `b`, whose channels are others."""
    first, second = net.a(x), net.b(x)
    batch, width, height, breadth = first.shape
    return second.view(batch, 2, width // 2, height * breadth).reshape(batch, width, height, breadth) + first.mean(
        1, keepdim=True
    )


def frozen_with_the_width_of_another(net: Pair, x: torch.Tensor) -> Any:
    """The softmax freezes `b`; the width of `a` states its size nevertheless."""
    first, second = net.a(x), net.b(x)
    batch, width, height, breadth = first.shape
    return F.softmax(second.flatten(2), 1).view(batch, width, height, breadth) + first.mean(1, keepdim=True)


def positions_and_channels_in_one_number(net: Pair, x: torch.Tensor) -> Any:
    """A number that both the input and the width of `a` change states the size of a dimension of `b`."""
    first, second = net.a(x), net.b(x)
    rows = (first.shape[1] + first.shape[2]) // 2  # 8, as b has channels
    return second.flatten(2).reshape(x.shape[0], rows, -1).view(second.shape) + first.mean(1, keepdim=True)


def rows_of_all_channels(net: Pair, x: torch.Tensor) -> Any:
    """The width of `a` states the size of a dimension that holds channels of `b`, and positions."""
    first, second = net.a(x), net.b(x)
    rows = second.reshape(x.shape[0], first.shape[1] * x.shape[2], x.shape[3])
    return rows.reshape(second.shape) + first.mean(1, keepdim=True)


def slice_by_another_width(net: Pair, x: torch.Tensor) -> Any:
    first = net.a(x)
    return F.softmax(net.b(x), 1)[:, : first.shape[1]] + first.mean(1, keepdim=True)


def split_by_a_width(net: Pair, x: torch.Tensor) -> Any:
    first = net.a(x)
    left, right = F.softmax(net.b(x), 1).split(first.shape[1] // 2, dim=1)
    return torch.cat([right, left], 1) + first.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("run", "kept"),
    [
        (with_the_width_of_another, [4, 4]),
        (frozen_with_the_width_of_another, [4, 8]),
        (positions_and_channels_in_one_number, [4, 4]),
        (rows_of_all_channels, [8, 8]),
        (slice_by_another_width, [4, 8]),
        (split_by_a_width, [4, 8]),
    ],
)
def test_sizes_taken_from_another_tensor(run: Forward, kept: list[int]) -> None:
    """Whatever a size is computed from, it is right after the removal, or the channels stay."""
    assert widths(pruned(Pair(run)), "a", "b") == kept


class Divided(nn.Module):
    """Channels divided by a table of numbers that only the buffer knows."""

    periods: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Linear(3, 8), nn.Linear(8, 3)
        self.register_buffer("periods", torch.arange(1.0, 9.0).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a: torch.Tensor = self.a(x)
        return self.d(a * torch.cos(x.sum(-1, keepdim=True) / self.periods[None]))  # type: ignore[no-any-return]


def test_what_is_divided_by_is_not_masked_but_follows() -> None:
    removed = pruned(Divided(), (2, 3))
    assert widths(removed, "a") == [4]
    assert removed.get_buffer("periods").shape == (4,)


# -- operators ------------------------------------------------------------------------------------------------------


def response_norm(net: Pair, x: torch.Tensor) -> Any:
    """Global response normalisation, as in ConvNeXt V2."""
    y = net.a(x)
    spread = y.norm(p=2, dim=(2, 3), keepdim=True)
    return y * (spread / (spread.mean(dim=1, keepdim=True) + 1e-6)) + y


def unfold_and_fold(net: Pair, x: torch.Tensor) -> Any:
    windows = F.unfold(net.a(x), 3, padding=1).relu()
    return F.fold(windows, (8, 8), 3, padding=1)


def heads_of_windows(net: Pair, x: torch.Tensor) -> Any:
    batch, width, height, breadth = net.a(x).shape
    windows = F.unfold(net.a(x), 2, stride=2).reshape(batch, 2, width // 2, 4, 16).transpose(-1, -2)
    windows = windows.softmax(-1) @ torch.ones(4, 4, dtype=x.dtype)
    return F.fold(windows.transpose(-1, -2).reshape(batch, width * 4, 16), (height, breadth), 2, stride=2)


def with_product(net: Pair, x: torch.Tensor) -> Any:
    """Rows of channels times columns of channels: addmm and baddbmm."""
    first, second = net.a(x).flatten(2), net.b(x).flatten(2)
    scores = torch.baddbmm(torch.ones(1, dtype=x.dtype), first.transpose(1, 2), second, beta=0.5, alpha=0.1)
    return torch.bmm(second, scores).view_as(net.a(x))


OPERATORS: dict[str, tuple[Forward, list[int]]] = {
    "tensor_split": (lambda net, x: torch.cat(net.a(x).tensor_split(3, dim=1)[::-1], 1) + net.b(x), [4, 4]),
    "tensor_split at indices": (lambda net, x: torch.cat(torch.tensor_split(net.a(x), [2, 5], 1), 1), [4, 8]),
    "reshape_as": (lambda net, x: net.a(x).flatten(2).reshape_as(net.b(x)), [4, 4]),
    "norm": (response_norm, [4, 8]),
    "norm of all": (lambda net, x: net.a(x) + net.b(x).norm(), [4, 4]),
    "norm over channels": (lambda net, x: net.a(x) * net.b(x).norm(dim=1, keepdim=True), [4, 4]),
    "least of channels": (lambda net, x: net.a(x) * net.b(x).norm(p=-1, dim=1, keepdim=True), [4, 8]),
    "normalize": (lambda net, x: F.normalize(net.a(x), dim=1) + net.b(x), [4, 4]),
    "max of two": (lambda net, x: torch.max(net.a(x), net.b(x)).relu(), [4, 4]),
    "min over positions": (lambda net, x: net.a(x).min(3, keepdim=True)[0] + net.b(x), [4, 4]),
    "max over channels": (lambda net, x: net.a(x) + net.b(x).max(1, keepdim=True).values, [4, 8]),
    "repeat_interleave": (lambda net, x: net.a(x).repeat_interleave(x.shape[0], dim=0)[: x.shape[0]], [4, 8]),
    "triangle": (lambda net, x: torch.triu(net.a(x)) + net.b(x).tril(-1), [4, 4]),
    "logsumexp": (lambda net, x: net.a(x) * net.b(x).logsumexp((2, 3), keepdim=True), [4, 4]),
    "movedim": (lambda net, x: F.layer_norm(net.a(x).movedim(1, -1), (8,)).movedim(-1, 1), [4, 8]),
    "moveaxis": (lambda net, x: torch.moveaxis(torch.moveaxis(net.a(x), (1, 2), (2, 1)), 1, 2), [4, 8]),
    "grid_sample": (
        lambda net, x: F.grid_sample(net.a(x), x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False), [4, 8]
    ),
    "unfold and fold": (unfold_and_fold, [4, 8]),
    "products with a sum": (with_product, [4, 4]),
    "roll": (lambda net, x: net.a(x).roll(1, 1) + net.b(x).roll(1, 2), [8, 8]),
    "gather": (lambda net, x: net.a(x).gather(1, torch.zeros(x.shape[0], 8, 8, 8).long()) + net.b(x), [8, 8]),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_channels_pass_or_stay(name: str) -> None:
    run, kept = OPERATORS[name]
    model = Pair(run)
    if kept[1] == 8 and "net.b" not in str(run.__code__.co_names) and "b" not in run.__code__.co_names:
        del model.b
        kept = kept[:1]
    assert widths(pruned(model), *"ab"[: len(kept)]) == kept


def test_a_gated_linear_unit_ties_its_halves() -> None:
    removed = pruned(Pair(lambda net, x: F.glu(net.a(x), dim=1), reads=4))
    assert widths(removed, "a") == [4]
    assert removed.get_parameter("d.weight").shape[1] == 2


def test_windows_split_into_heads() -> None:
    assert widths(pruned(Pair(heads_of_windows)), "a") == [4]


@pytest.mark.parametrize("affine", [False, True])
def test_a_group_norm_of_one_group_remembers_removed_constants(affine: bool) -> None:
    norm = nn.GroupNorm(1, 8, affine=affine)
    model = Pair(lambda net, x: net.more["norm"](net.a(x)), more={"norm": norm})
    removed = pruned(model)
    assert widths(removed, "a") == [4]
    assert removed.get_submodule("more.norm").config()["width"] == 8  # type: ignore[operator]


class Standardised(nn.Conv2d):
    """A convolution whose filters are brought to mean zero and variance one, times a gain (NFNets)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None,
            weight=(self.gain * 0.5).view(-1), training=True, momentum=0.0, eps=1e-6,
        ).reshape_as(self.weight)  # fmt: skip
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_standardised_weights(groups: int) -> None:
    """What the statistics of the filters lose is remembered, groups stay of one size."""
    model = nn.Sequential(
        Standardised(3, 8, 1), nn.ReLU(), Standardised(8, 8, 3, padding=1, groups=groups), nn.SiLU(),
        Standardised(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1),
    )  # fmt: skip
    assert widths(pruned(model), "0", "2", "4") == [4, 4, 4]


def channel_attention(net: Pair, x: torch.Tensor) -> Any:
    """ECA: a convolution over the channels, so that no channel can go without moving its neighbours."""
    a = net.a(x)
    weights = net.more["eca"](a.mean((2, 3)).view(a.shape[0], 1, -1)).sigmoid().view(a.shape[0], -1, 1, 1)
    return net.more["inner"](a * weights.expand_as(a)).relu() + net.b(x) * weights


def test_what_is_convolved_over_keeps_its_own_channels_only_and_says_why() -> None:
    model = Pair(channel_attention, more={"eca": nn.Conv1d(1, 1, 3, padding=1), "inner": nn.Conv2d(8, 8, 1)})
    removed = pruned(model)
    assert widths(removed, "a", "b") == [8, 8]
    assert removed.report is not None
    notes = {line.layer: line.notes for line in removed.report.layers}
    assert notes["a"][-1] == "not pruned: convolved over by more.eca"
    assert notes["b"][-1].endswith("ties it to a dimension of fixed size (convolved over by more.eca)")
    free = Pair(lambda net, x: net.more["out"](channel_attention(net, x)).relu(), reads=6,
                more={**model.more, "out": nn.Conv2d(8, 6, 1)})  # fmt: skip
    assert widths(pruned(free), "a", "more.out") == [8, 3]


class CosineAttention(nn.Module):
    """Attention with normalised queries and keys, whose bias for keys is zeroed at run time, as in Swin V2."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.qkv.bias.clone()
        length = bias.numel() // 3
        bias[length : 2 * length].zero_()
        made = F.linear(x, self.qkv.weight, bias)
        query, key, value = made.reshape(x.size(0), x.size(1), 3, 2, 4).permute(2, 0, 3, 1, 4)
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        return self.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_positions_of_heads_with_normalised_queries_go() -> None:
    removed = pruned(CosineAttention(), (2, 5, 8))
    assert removed.get_parameter("qkv.weight").shape == (12, 8)
    assert removed.get_parameter("qkv.bias").shape == (12,)
    assert removed.get_parameter("proj.weight").shape == (8, 4)
